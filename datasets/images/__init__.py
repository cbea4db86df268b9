"""Image files and transforms: from bytes to uint8 tensors."""
