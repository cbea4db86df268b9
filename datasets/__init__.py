"""Data sets: where images and labels come from, how they are split, transformed and loaded.

`build_data.py` builds the data of a run from its config; `table.py` has the table of data sets.
"""
