"""Class frequencies that a user states in a JSON file."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tailtune.configs.errors import UserError, unknown
from tailtune.datasets.sources.image_list import first_file
from tailtune.datasets.sources.text_files import read_json

TOLERANCE = 0.01
"""How far the sum of frequencies may be from 1, as it is where each is rounded."""
LARGEST = 1e15
"""Of a number in a file of frequencies or counts; sums of such are exact enough."""


def read_class_frequencies(name: str, folders: Sequence[Path], num_classes: int, names: Sequence[str] | None) -> Tensor:
    """Read class frequencies from a JSON file: frequencies, which sum to 1, or whole numbers of images.

    Args:
        name: of the file.
        folders: where it may lie, beside the current folder.
        num_classes: number C of classes.
        names: of the classes, where the file may name them; None: they are not known yet.

    Returns:
        Frequencies [C], float64, which sum to 1.

    Raises:
        UserError: no such file, or one that does not fit the classes.
    """
    file = first_file(str(Path(name).expanduser()), [Path(), *folders])
    if file is None:
        raise UserError(f"target_prior: no file '{name}'")
    content = read_json(file, "target_prior")
    if isinstance(content, dict):
        for strange in content.keys() - set(names or content):
            raise unknown(f"class of target_prior in {file}", strange, names or ())
        missing = next((each for each in names or () if each not in content), None)
        if missing is not None:
            raise UserError(f"target_prior: {file} has no number for class '{missing}'")
        content = [content[each] for each in names or content]
    if not isinstance(content, list) or len(content) != num_classes:
        size = f", not {len(content)}" if isinstance(content, list) else ""
        raise UserError(f"target_prior: {file} must hold a number for each of the {num_classes} classes{size}")
    good = all(type(each) in (int, float) and 0 <= each <= LARGEST for each in content)
    if not good or not sum(content):
        raise UserError(f"target_prior: {file} must hold numbers from 0 on, not all of them 0")
    total = math.fsum(content)
    if abs(total - 1) > TOLERANCE and not all(type(each) is int for each in content):
        raise UserError(
            f"target_prior: the class frequencies in {file} sum to {total:.6g}, not to 1; give frequencies that do, or "
            "numbers of images, as whole numbers"
        )
    return torch.tensor(content, dtype=torch.float64) / total
