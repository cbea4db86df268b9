"""Training loops that wait before each step, ours and those of the originals; `benchmarks/compare.py` runs them."""
