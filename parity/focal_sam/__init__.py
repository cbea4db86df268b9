"""The comparison with Focal-SAM."""
