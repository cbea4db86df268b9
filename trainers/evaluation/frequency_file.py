"""Class frequencies that a user gives in a JSON file."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tailtune.configs.errors import UserError, unknown
from tailtune.datasets.sources.image_list import first_file
from tailtune.datasets.sources.text_files import read_json

TOLERANCE = 0.01
"""Largest accepted difference of the sum of frequencies from 1; rounded frequencies do not sum to exactly 1."""
LARGEST = 1e15
"""Largest number that a file may contain. Sums of numbers up to this are exact enough in fp64."""


def read_class_frequencies(name: str, folders: Sequence[Path], num_classes: int, names: Sequence[str] | None) -> Tensor:
    """Read class frequencies from a JSON file.

    The file holds a list with one number for each class, or an object from class name to number. The numbers are
    frequencies, which sum to 1, or numbers of images, which are whole.

    Args:
        name: path of the file, or its name in one of the folders.
        folders: folders in which the file is searched, in addition to the current folder.
        num_classes: number C of classes.
        names: names of the classes in label order; None: not known yet.

    Returns:
        Frequencies [C] in fp64, which sum to 1.

    Raises:
        UserError: the file does not exist, or its content does not fit the classes.
    """
    file = first_file(str(Path(name).expanduser()), [Path(), *folders])
    if file is None:
        raise UserError(f"target_prior: no file '{name}'")
    content = read_json(file, "target_prior")
    if isinstance(content, dict):
        for strange in content.keys() - set(names or content):
            raise unknown(f"class of target_prior in {file}", strange, names or ())
        missing = next((class_name for class_name in names or () if class_name not in content), None)
        if missing is not None:
            raise UserError(f"target_prior: {file} has no number for class '{missing}'")
        content = [content[class_name] for class_name in names or content]
    if not isinstance(content, list) or len(content) != num_classes:
        size = f", not {len(content)}" if isinstance(content, list) else ""
        raise UserError(f"target_prior: {file} must hold a number for each of the {num_classes} classes{size}")
    valid = all(type(value) in (int, float) and 0 <= value <= LARGEST for value in content)
    if not valid or not sum(content):
        raise UserError(f"target_prior: {file} must hold numbers from 0 on, not all of them 0")
    total = math.fsum(content)
    if abs(total - 1) > TOLERANCE and not all(type(value) is int for value in content):
        raise UserError(
            f"target_prior: the class frequencies in {file} sum to {total:.6g}, not to 1; give frequencies that do, or "
            "numbers of images, as whole numbers"
        )
    return torch.tensor(content, dtype=torch.float64) / total
