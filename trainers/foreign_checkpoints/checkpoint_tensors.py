"""Reads the tensors of a checkpoint file of another project. Code that a file may contain is not executed."""

from typing import Any

from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models.backbones.safe_torch_load import (
    READ_ERRORS,
    STATE_DICT_OF_SAVED,
    State,
    explain_read_error,
    refuse_bad_tensors,
    safe_torch_load,
)
from tailtune.trainers.foreign_checkpoints.checkpoint_file import BACKBONE, ForeignCheckpoint

LIFT_PLUS_NAMES = ("classifier.", "image_", "text_")
"""Beginnings of all names in LIFT+'s `tuner`: those of the head, and of both encoders and what is behind them."""
PARALLEL = "module."
"""Prefix that DataParallel adds to names."""
TUNER_AND_HEAD_OF_SAVED = "{part: s[part] for part in ('tuner', 'head')}"
"""Python expression that selects the needed parts of LIFT's saved object `s`."""


def read_tensors(file: ForeignCheckpoint) -> State:
    """Read the tensors of a file.

    Args:
        file: the file.

    Returns:
        Name → tensor: `tuner.…` and `head.…`, or `backbone.…`, without DataParallel's `module.`.

    Raises:
        UserError: the file cannot be opened, or does not contain only tensors.
    """
    try:
        content = safe_torch_load(file.path)
    except READ_ERRORS as error:
        keep = TUNER_AND_HEAD_OF_SAVED if file.kind == "lift" else STATE_DICT_OF_SAVED
        raise UserError(f"{file.path} {explain_read_error(file.path, error, keep)}") from error
    tensors = _tensors_of(content if isinstance(content, dict) else {}, file)
    refuse_bad_tensors(tensors, str(file.path))
    return tensors


def _tensors_of(content: dict[Any, Any], file: ForeignCheckpoint) -> State:
    if _is_state_dict(content.get("tuner")) and _is_state_dict(content.get("head")):
        return {
            f"{part}.{name}": tensor
            for part in ("tuner", "head")
            for name, tensor in _without_parallel(content[part]).items()
        }
    tuner = _without_parallel(content["tuner"]) if _is_state_dict(content.get("tuner")) else {}
    if "head" not in content and any(name.startswith(LIFT_PLUS_NAMES) for name in tuner):
        return {f"tuner.{name}": tensor for name, tensor in tuner.items()}
    state = content.get("state_dict", content)
    if _is_state_dict(state) and any(name.endswith("conv1.weight") for name in state):
        return {f"{BACKBONE}{name.removeprefix(BACKBONE)}": tensor for name, tensor in _without_parallel(state).items()}
    raise UserError(
        f"{file.path} is no checkpoint that can be read here: those of LIFT and PEL are state dicts 'tuner' and "
        "'head', those of LIFT+ a 'tuner' alone, those of RIDE and SADE a 'state_dict' of their networks"
    )


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    )


def _without_parallel(state: State) -> State:
    return {name.removeprefix(PARALLEL): tensor for name, tensor in state.items()}
