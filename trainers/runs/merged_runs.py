"""`merge_runs`: a run starts from the weights of several finished runs, merged one after another (LT-Soups)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import key_names, option
from tailtune.configs.value_parsers import as_paths
from tailtune.trainers.runs.run_folder import FACTS, find_checkpoint
from tailtune.trainers.storage.checkpoint import check_fit
from tailtune.trainers.storage.manifest import read_json

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class MergeOptions:
    """Which finished runs are merged, and how."""

    runs: list[str] | None = option(
        None,
        "Folders of finished runs, separated by commas. Their weights are merged into those of the run that `after` "
        "names, one after another.",
        as_paths,
        key="merge_runs",
        zero_shot=False,
    )
    share: float = option(
        0.7,
        "Share of the next weights when they are merged into those so far, with merge_runs.",
        key="merge_share",
        least=0.0,
        most=1.0,
    )
    together: int = option(
        1,
        "Number of consecutive runs of merge_runs whose mean is merged as one.",
        key="merge_together",
        least=1,
        most=10**4,
    )


def check_merge(options: MergeOptions, after: str | None, takes_weights: bool) -> None:
    """Check the options of a merge. No run is looked for.

    Args:
        options: of the run.
        after: model config of the earlier run, which gives the first weights.
        takes_weights: whether the method starts from the weights of the earlier run.

    Raises:
        UserError: the options do not fit each other.
    """
    if options.runs is None:
        default = MergeOptions()
        for field, key in key_names(MergeOptions).items():
            if getattr(options, field) != getattr(default, field):
                raise UserError(f"{key} {getattr(options, field)}: nothing is merged without merge_runs; leave it out")
        return
    if after is None:
        raise UserError(
            "merge_runs merges into the weights of an earlier run: name that one's model config with `after`"
        )
    if not takes_weights:
        raise UserError("merge_runs: the earlier run of this method is a teacher, and no start; leave it out")
    if len(options.runs) % options.together:
        raise UserError(
            f"merge_runs names {len(options.runs)} runs, which is no multiple of merge_together {options.together}"
        )


def folders(options: MergeOptions) -> list[Path]:
    """The folders of the runs that are merged, in order.

    Raises:
        UserError: a run is missing, of other people's code, or named twice.
    """
    found: list[Path] = []
    for name in options.runs or ():
        path, foreign = find_checkpoint(name, "merge_runs", "finish this run first")
        if foreign is not None:
            raise UserError(f"merge_runs: {foreign.path} is of other people's code; name runs of our own")
        if path.resolve() in [other.resolve() for other in found]:
            raise UserError(f"merge_runs: {path} is there twice")
        found.append(path)
    return found


def facts_of(options: MergeOptions) -> dict[str, Any]:
    """The entry of a checkpoint's facts that says which runs were merged: folder → identity of its checkpoint."""
    merged_runs = {path.as_posix(): read_json(path / FACTS)["sha256"] for path in folders(options)}
    return {"merged": merged_runs} if merged_runs else {}


def check_unchanged(options: MergeOptions, facts: Mapping[str, Any]) -> None:
    """Raise a `UserError` if the merged runs are not those of a checkpoint's facts, because they were trained again."""
    if facts_of(options) != {name: value for name, value in facts.items() if name == "merged"}:
        raise UserError(
            "merge_runs: a run that was merged was trained again since, so the start cannot be computed; repeat the "
            "merging run with `resume False`"
        )


def merged(start: Tensors, options: MergeOptions, read: Callable[[Path], Tensors]) -> Tensors:
    """θ ← (1 − s) θ + s θ_k for each group of runs in order, where θ_k is the mean of the group.

    So the last group has the weight s, and the one before it s (1 − s). The mean and θ are computed in fp64.

    Args:
        start: the first θ, by name.
        options: which runs, s = `share`, and the size of a group.
        read: checkpoint folder → its tensors.

    Raises:
        UserError: a run has other tensors than the start, or other integers, such as the positions of `mask`.
    """
    found = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in start.items()}
    paths = folders(options)
    for first in range(0, len(paths), options.together):
        group = paths[first : first + options.together]
        states = [_checked(start, read(path / "checkpoint"), path) for path in group]
        for name, tensor in found.items():
            if tensor.is_floating_point():
                mean = torch.stack([state[name].double() for state in states]).mean(0)
                found[name] = torch.lerp(tensor, mean, options.share)
    return {name: tensor.to(start[name].dtype) for name, tensor in found.items()}


def _checked(start: Tensors, tensors: Tensors, path: Path) -> Tensors:
    check_fit(start, tensors, f"merge_runs: {path}", "give its run the options of the run that `after` names")
    for name, tensor in start.items():
        counts = name.endswith("num_batches_tracked")
        if not tensor.is_floating_point() and not counts and not torch.equal(tensor, tensors[name]):
            raise UserError(f"merge_runs: {name} of {path} differs; runs of one mask_seed and mask_ratio can be merged")
    return tensors


def merge_weights(groups: int, share: float) -> Sequence[float]:
    """The weights in the result: of the start, then of each group."""
    return [(1 - share) ** groups, *(share * (1 - share) ** (groups - 1 - number) for number in range(groups))]
