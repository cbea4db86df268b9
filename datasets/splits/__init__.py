"""Training, validation and test splits: long-tailed subsets, hold-outs, and the record of each split."""
