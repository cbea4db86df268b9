"""Compares finished runs: tables, tests over the same test images, and curves."""
