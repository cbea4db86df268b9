"""Test sets with other class frequencies, chosen from the one test split."""
