"""Random numbers that are a pure function of what they are for, for a whole batch at once.

A generator would have to be seeded anew for each image, because the draws of an image must not depend on the worker,
rank or batch that it is in. Here each number is a hash (SplitMix64, Steele, Lea and Flood 2014) of the seed, the key
and the position of the number.
"""

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""Increment of SplitMix64."""
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))
UNUSED_BITS = np.uint64(11)
"""A float64 in [0, 1) has 53 random bits."""


def uniform_draws(seed: int, keys: np.ndarray, count: int) -> np.ndarray:
    """Independent numbers, uniform in [0, 1).

    Args:
        seed: seed of the purpose, below 2^63; see `derive_seed`.
        keys: what the numbers are for, int64 [B, K]. Equal rows get equal numbers.
        count: numbers for each row.

    Returns:
        float64 [B, count].
    """
    state = np.full(len(keys), seed, dtype=np.uint64)
    for column in keys.astype(np.int64).view(np.uint64).T:
        state = _mixed(state * GOLDEN + column)
    positions = np.arange(1, count + 1, dtype=np.uint64) * GOLDEN
    return (_mixed(state[:, None] + positions) >> UNUSED_BITS) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, a bijection of 64-bit numbers."""
    for shift, multiplier in zip(SHIFTS, MULTIPLIERS, strict=False):
        values = (values ^ (values >> shift)) * multiplier
    return values ^ (values >> SHIFTS[-1])
