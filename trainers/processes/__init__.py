"""Processes of a run: the console, signals, the launcher, and how each process ends."""
