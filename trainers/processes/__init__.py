"""Handles the processes of a run: console, signals, the launcher that started them, and how each process ends."""
