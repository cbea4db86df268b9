"""Comparison with the originals' own code: `python parity/compare.py SUBJECT CHECKOUT …` writes docs/parity.json.

A folder for each subject: `cases` lists what is compared, `original` runs in the original's process, `ours` runs here
and compares, `subject` says where the original comes from, what was changed to run it, and which errors are accepted.
"""
