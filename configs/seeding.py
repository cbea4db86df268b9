"""Seeds and random generators for one purpose each, so that no random draw changes another one."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(*parts: int | str) -> int:
    """A seed of 63 bits for one purpose; different purposes get unrelated seeds.

    Args:
        parts: what the seed is for, such as `derive_seed(seed, "order", epoch)`.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A new CPU generator for one purpose.

    Args:
        parts: what it is for, as in `derive_seed`.
    """
    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Within the block, seed torch's global CPU generator; afterwards restore its state.

    For code that can only draw from the global generator, such as torchvision's transforms and the initialisers of
    modules. The generators of Python and NumPy are not covered; this project never draws from them.

    Args:
        parts: what the draws are for, as in `derive_seed`.
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
