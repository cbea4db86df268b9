"""Strings that describe each class, which `prompt descriptor` reads instead of the class names."""

import json
from collections.abc import Sequence
from pathlib import Path

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_list import first_file

PUBLISHED_AT = "https://github.com/shijxcs/LIFT, utils/descriptors_imagenet.json"


def class_descriptors(name: str, folders: Sequence[Path], class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The strings of each class from a JSON of class name → list of strings; `_` in a name reads as a space.

    Raises:
        UserError: no such file, another kind of file, or a class that is not in it.
    """
    file = first_file(name, folders)
    if file is None:
        tried = ", ".join(str((folder / name).absolute()) for folder in folders)
        raise UserError(f"descriptors: no file {tried}; ImageNet's is published at {PUBLISHED_AT}")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        found = {key.replace("_", " "): _strings(value) for key, value in content.items()}
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"descriptors: {file} must be a JSON object, class name → list of strings") from None
    spoken = [each.replace("_", " ") for each in class_names]
    for each in spoken:
        if each not in found:
            raise UserError(f"descriptors: {file} has no entry for class '{each}'; every class needs one")
    return tuple(found[each] for each in spoken)


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each.strip() for each in value):
        raise ValueError
    return tuple(value)
