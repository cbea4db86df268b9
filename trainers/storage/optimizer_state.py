"""Converts the state of any torch optimizer to named tensors and numbers, without pickle, and back."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

PREFIX = "optimizer."
"""Prefix of the names of an optimizer's tensors, `optimizer.<group>.<parameter>.<name>`."""
OLD_PREFIX = "momentum."
"""Prefix that earlier versions gave to SGD's momentum, `momentum.<group>.<parameter>`. They saved no other state."""
MOMENTUM = "momentum_buffer"


def optimizer_state(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Collect the values that an optimizer needs in order to continue exactly from the present step.

    Args:
        optimizer: an optimizer of torch, or Accelerate's wrapper of one.

    Returns:
        First: the tensors, with keys `optimizer.<group>.<parameter>.<name>`. Second: values for JSON. `numbers` holds
        the other values of parameters, with keys `<group>.<parameter>.<name>`; `groups` holds the settings of groups.
    """
    stored = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for position, index in _positions(stored["param_groups"]):
        for name, value in stored["state"].get(index, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{PREFIX}{position}.{name}"] = value
            elif value is not None:  # torch stores None for a value that does not exist yet
                numbers[f"{position}.{name}"] = value
    groups = [{name: value for name, value in group.items() if name != "params"} for group in stored["param_groups"]]
    return tensors, {"numbers": numbers, "groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], values: Mapping[str, Any] | None
) -> None:
    """Restore the state of an optimizer that `optimizer_state` returned.

    Args:
        optimizer: an optimizer with the same groups of parameters.
        tensors: name → tensor of a saved state; other tensors than those of the optimizer are ignored.
        values: the second part of what `optimizer_state` returned; None: the state was saved by an earlier version.
    """
    stored = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for position, index in _positions(stored["param_groups"]):
        parameter_state = _with_prefix(tensors, f"{PREFIX}{position}.")
        if f"{OLD_PREFIX}{position}" in tensors:
            parameter_state[MOMENTUM] = tensors[f"{OLD_PREFIX}{position}"]
        if values is not None:
            parameter_state |= _with_prefix(values["numbers"], f"{position}.")
        if parameter_state:
            state[index] = parameter_state
    groups = stored["param_groups"]
    for group, saved in zip(groups, values["groups"] if values is not None else [], strict=values is not None):
        group |= {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _positions(groups: list[dict[str, Any]]) -> Iterator[tuple[str, int]]:
    """For every parameter, its position `<group>.<parameter>` and its index in torch's state."""
    for group_index, group in enumerate(groups):
        for parameter_index, index in enumerate(group["params"]):
            yield f"{group_index}.{parameter_index}", index


def _with_prefix(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
