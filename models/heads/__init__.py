"""Heads, from features to logits: the table `HEADS` in `classifiers.py`, their initialisation, heads of experts."""
