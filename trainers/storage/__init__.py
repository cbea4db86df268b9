"""Writes and reads the files of a run. A file is written completely or not at all, and checked before it is read."""
