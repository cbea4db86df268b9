"""Texts that describe each class. With the option `prompt descriptor` they are used instead of the class names."""

import json
from collections.abc import Sequence
from pathlib import Path

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_list import first_file

PUBLISHED_AT = "https://github.com/shijxcs/LIFT, utils/descriptors_imagenet.json"


def class_descriptors(name: str, folders: Sequence[Path], class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Read the descriptions of the classes from a JSON object: class name → list of texts.

    In class names `_` means a space, in the file and in `class_names`.

    Args:
        name: path of the file in one of the folders.
        folders: where to look for it.
        class_names: C names.

    Returns:
        The texts of each class, [C].

    Raises:
        UserError: there is no such file, it is not such a JSON object, or a class is missing in it.
    """
    file = first_file(name, folders)
    if file is None:
        tried = ", ".join(str((folder / name).absolute()) for folder in folders)
        raise UserError(f"descriptors: no file {tried}; ImageNet's is published at {PUBLISHED_AT}")
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        texts = {key.replace("_", " "): _as_texts(value) for key, value in content.items()}
    except (ValueError, AttributeError, RecursionError):
        raise UserError(f"descriptors: {file} must be a JSON object, class name → list of strings") from None
    spaced_names = [class_name.replace("_", " ") for class_name in class_names]
    for class_name in spaced_names:
        if class_name not in texts:
            raise UserError(f"descriptors: {file} has no entry for class '{class_name}'; every class needs one")
    return tuple(texts[class_name] for class_name in spaced_names)


def _as_texts(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError
    return tuple(value)
