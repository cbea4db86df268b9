"""Samplers, data loader and its worker processes."""
