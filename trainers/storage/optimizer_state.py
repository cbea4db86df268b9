"""The state of any optimizer of torch as named tensors and numbers, without pickle."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PREFIX = "optimizer."
"""How the names of an optimizer's tensors begin: `optimizer.<group>.<parameter>.<name>`."""
OLD_PREFIX = "momentum."
"""How earlier versions began the name of SGD's momentum, the only state they saved: `momentum.<group>.<parameter>`."""
MOMENTUM = "momentum_buffer"


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All that an optimizer needs to go on as if it had not been stopped.

    Args:
        optimizer: of torch, or Accelerate's around one.

    Returns:
        Its tensors by group, parameter and name; and for JSON the other values of parameters (`numbers`, by the same
        names) and the settings of each group (`groups`).
    """
    stored = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for place, index in _places(stored["param_groups"]):
        for name, value in stored["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}{place}.{name}"] = value
            elif value is not None:  # torch writes None where a value has not been made yet
                numbers[f"{place}.{name}"] = value
    groups = [{name: value for name, value in group.items() if name != "params"} for group in stored["param_groups"]]
    return tensors, {"numbers": numbers, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None
) -> None:
    """Undo `optimizer_state`, for an optimizer over the same groups of parameters.

    Args:
        tensors: of a whole state; others than the optimizer's are left alone.
        values: the second part of what `optimizer_state` returned; None: the state is of an earlier version.
    """
    stored = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for place, index in _places(stored["param_groups"]):
        found = _of_place(tensors, f"{PREFIX}{place}.")
        if f"{OLD_PREFIX}{place}" in tensors:
            found[MOMENTUM] = tensors[f"{OLD_PREFIX}{place}"]
        if values is not None:
            found |= _of_place(values["numbers"], f"{place}.")
        if found:
            state[index] = found
    groups = stored["param_groups"]
    for group, saved in zip(groups, values["groups"] if values is not None else [], strict=values is not None):
        group |= {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _places(groups: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """`<group>.<parameter>` and torch's own number of every parameter."""
    for g, group in enumerate(groups):
        for p, index in enumerate(group["params"]):
            yield f"{g}.{p}", index


def _of_place(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
