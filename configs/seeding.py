"""Creates seeds and random generators for one purpose each, so that one random draw does not change another.

torch is imported by the functions that need it: `derive_seed` is also called before torch is loaded.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(*parts: int | str) -> int:
    """Compute a seed of 63 bits for one purpose. Different purposes get unrelated seeds.

    Args:
        parts: describe the purpose, as in `derive_seed(seed, "order", epoch)`.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> "torch.Generator":
    """Create a CPU generator for one purpose.

    Args:
        parts: describe the purpose, as in `derive_seed`.
    """
    import torch

    return torch.Generator().manual_seed(derive_seed(*parts))


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Within the block, seed torch's global CPU generator; afterwards restore its state.

    This is for code that can only draw from the global generator, such as torchvision's transforms and the initialisers
    of modules. The generators of Python and NumPy are not seeded, because TailTune never draws from them.

    Args:
        parts: describe the purpose, as in `derive_seed`.
    """
    import torch

    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(derive_seed(*parts))
    try:
        yield
    finally:
        torch.default_generator.set_state(state)
