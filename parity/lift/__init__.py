"""LIFT and PEL."""
