"""Side-by-side comparison with the original implementations."""
