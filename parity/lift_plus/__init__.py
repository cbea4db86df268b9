"""LIFT+."""
