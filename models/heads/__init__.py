"""Classifiers on the feature: `HEADS` in `classifiers.py`, their initialisation, one head for each expert."""
