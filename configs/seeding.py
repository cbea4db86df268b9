"""Random numbers as pure functions of what they are for: no draw disturbs another."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def mix(*parts: int | str) -> int:
    """A 63-bit seed from any tuple; different tuples give unrelated seeds."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own for one purpose, e.g. `generator(seed, "order", epoch)`."""
    return torch.Generator().manual_seed(mix(*parts))


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Within the block torch's global CPU generator is a function of `parts`; afterwards it is as before.

    For code that draws from the global generator and takes no other: torchvision's transforms, module
    initialisers. Only torch's CPU generator is covered; Python's and NumPy's are never used here.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(mix(*parts))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
