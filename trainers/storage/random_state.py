"""Converts the state of all random generators of a process to tensors, and back."""

import random

import numpy as np
import torch
from torch import Tensor


def random_state(rank: int) -> dict[str, Tensor]:
    """The state of the generators of torch, Python and NumPy in this process.

    TailTune never draws from these generators, but a method or a library may.

    Args:
        rank: index of this process.

    Returns:
        Name → tensor; the names begin with `rng.<rank>.` and are part of the file format.
    """
    python = torch.tensor([int(word) for word in random.getstate()[1]], dtype=torch.int64)
    numpy = np.random.get_state(legacy=False)
    position = torch.tensor([numpy["state"]["pos"], numpy["has_gauss"]])
    state = {
        "torch": torch.get_rng_state(),
        "python": python,
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy_position": position,
        "numpy_gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"rng.{rank}.{name}": tensor for name, tensor in state.items()}


def processes_of(tensors: dict[str, Tensor]) -> int:
    """The number of processes whose generators a saved state has.

    Args:
        tensors: name → tensor of a saved state.
    """
    return len({name.split(".")[1] for name in tensors if name.startswith("rng.")})


def restore_random_state(tensors: dict[str, Tensor], rank: int) -> None:
    """Restore the state of the generators that `random_state` returned.

    Args:
        tensors: name → tensor of a saved state; other tensors are ignored.
        rank: index of this process.
    """
    state = {name.split(".", 2)[2]: tensor for name, tensor in tensors.items() if name.startswith(f"rng.{rank}.")}
    torch.set_rng_state(state["torch"])
    random.setstate((3, tuple(state["python"].tolist()), None))
    position, has_gauss = state["numpy_position"].tolist()
    key = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, float(state["numpy_gauss"])))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
