"""`data shard`: writes the images of a data set as tar shards with an index, and the YAML that trains from them."""

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tailtune.configs.atomic_file import atomic_file, sync_folder, temporary_path
from tailtune.configs.errors import UserError, lookup
from tailtune.datasets.commands.result_files import cannot_write, plain_name
from tailtune.datasets.commands.shard_writer import write_shards
from tailtune.datasets.data_settings import DataSettings
from tailtune.datasets.sources.available_images import AvailableImages
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.sources.shard_index import ShardIndex, index_name
from tailtune.datasets.splits.split_records import ChosenSplits, Split
from tailtune.datasets.splits.unreadable_images import UnreadableImages, check_readable
from tailtune.datasets.table import DATASETS

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
IN_THE_INDEX = ("root", "lists", "train_list", "val_list", "test_list", "class_counts", "num_classes")
"""Options of the source that its shards do not need: their values are in the index."""
FROM_LISTS = ("shift_files", "dirichlet_list", "descriptors", "label_field")
"""Options that name files in the folder of the lists, or that translate the labels of lists."""


@dataclass(frozen=True)
class ShardRequest:
    """What `data shard` shall write."""

    data: DataSettings
    output: Path
    """The new folder; it must not exist."""
    max_bytes: int
    """Size that a shard has at most, unless a single image is larger."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """Options that the data config and the command line set; those that the shards still need go into their YAML."""


def shard_data(request: ShardRequest) -> str:
    """Write the shards of each split, the indexes and the YAML, completely or not at all.

    Args:
        request: the data, and where to write.

    Returns:
        What was written, for the terminal.

    Raises:
        UserError: the data are not in files, cannot be read or are too large for the disk; the output exists.
    """
    output = request.output
    if re.match(r"\w[\w+.-]+:/", str(output)):
        raise UserError(f"--out {output} is an address: write the shards to a folder, and copy the folder there")
    if os.path.lexists(output):
        raise UserError(f"--out {output} exists already: name another folder, or remove it")
    available = _available(request.data)
    sources = {name: source for name, source in _by_split(available).items() if source is not None}
    for split in sources:
        _check_outside(request, split)
    class_names = available.outline.class_names
    needed = _needed_bytes(sources, class_names)
    temporary = temporary_path(output)
    try:
        temporary.mkdir(parents=True)
        if (free := shutil.disk_usage(temporary).free) < needed:
            raise UserError(
                f"the shards need {needed:,} bytes, but {output.parent.absolute()} has {free:,} left: free the space, "
                "or choose another folder"
            )
        indexes = [
            write_shards(source, temporary, split, [*sources], class_names, request.max_bytes)
            for split, source in sources.items()
        ]
        write_indexes(temporary, indexes, yaml_name(request.data.data), shard_config(request))
        temporary.rename(output)
        sync_folder(output.parent)
    except OSError as error:
        raise cannot_write(output, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return summary(output, indexes)


def parse_size(text: str) -> int:
    """A number of bytes such as `256MB`, `1.5 GiB` or `1000000`.

    Args:
        text: what the user wrote.

    Raises:
        ValueError: it is no size, or less than one byte.
    """
    found = re.fullmatch(r"(\d{1,12}(?:\.\d{1,3})?)\s*([a-zA-Z]*)", text.strip())
    factor = UNITS.get(found[2].upper()) if found else None
    if found is None or factor is None or float(found[1]) * factor < 1:
        raise ValueError(text)
    return int(float(found[1]) * factor)


def _available(options: DataSettings) -> AvailableImages:
    """All images of the data, which have to be files or in shards."""
    # Class names of ImageNet are in a library that imports torch; the YAML asks for them again.
    options = replace(options, classnames=None) if options.classnames == "imagenet" else options
    entry = lookup(DATASETS, options.dataset, "dataset")
    if entry.built_in:
        raise UserError(f"the images of data '{options.data}' come with a library and are no files; nothing to shard")
    return entry.load(options)


def _by_split(available: AvailableImages) -> dict[str, NamedSource | None]:
    sources = {"train": available.train, "val": available.val, "test": available.test}
    return {name: source if isinstance(source, NamedSource) else None for name, source in sources.items()}


def _check_outside(request: ShardRequest, split: str) -> None:
    """Refuse to write into the class folders of a split."""
    folders = request.data.folders
    if request.data.dataset == "ImageFolder":
        images = os.path.realpath(folders.image_root() / split)
        if Path(os.path.realpath(request.output)).is_relative_to(images):
            raise UserError(f"--out {request.output} lies in the folder of the images; name a folder outside")


def _needed_bytes(sources: Mapping[str, NamedSource], class_names: Sequence[str]) -> int:
    """About how many bytes the shards have; every image is checked for this."""
    splits = {name: Split(source, np.arange(len(source))) for name, source in sources.items()}
    try:
        checked = check_readable(ChosenSplits(splits, (), ()), None, class_names, skip=False)
    except UnreadableImages as error:
        remedy = "replace them, or take them out of the lists or folders"
        raise UnreadableImages(error.problems, remedy) from None
    sizes = [split.sizes for split in checked.by_name.values() if split.sizes is not None]
    return sum(int((-(-each // 512) * 512 + 1536).sum()) for each in sizes)


def shard_config(request: ShardRequest) -> dict[str, Any]:
    """The options of the YAML that trains from the shards.

    Args:
        request: the data, and the options that were set for them.
    """
    values, options = request.values, request.data
    config: dict[str, Any] = {"dataset": "Shards", "root": "."}
    config |= {key: value for key, value in values.items() if key not in (*IN_THE_INDEX, "dataset")}
    if options.classnames not in (None, "imagenet"):
        del config["classnames"]
    if any(values.get(key) for key in FROM_LISTS) and options.dataset in ("ImageList", "Shards"):
        holds = [folder for folder in options.folders.for_lists() if (folder / str(options.test_list)).is_file()]
        if holds:
            config |= {"lists": os.path.abspath(holds[0])}
        if values.get("shift_files") or values.get("dirichlet_list"):
            config |= {"test_list": options.test_list}
    return config


def yaml_name(data: str) -> str:
    """Name of the YAML file beside the shards.

    Args:
        data: name of the data. The YAML keeps it, because model configs have options for names of data.
    """
    return f"{plain_name(data)}.yaml"


def write_indexes(folder: Path, indexes: Sequence[ShardIndex], name: str, config: Mapping[str, Any]) -> None:
    """Write the index of each split and the YAML.

    Args:
        folder: the folder of the shards.
        indexes: the index of each split.
        name: name of the YAML file.
        config: its options.

    Raises:
        OSError: the file system refuses to write.
    """
    train = next(index for index in indexes if index.split == "train")
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    header = (
        f"# shards of {len(counts)} classes, {counts.min():,} … {counts.max():,} training images each; made by data "
        "shard. Set root to their address if they are elsewhere."
    )
    files = {index_name(index.split): index.encoded() for index in indexes}
    files[name] = f"{header}\n{yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)}".encode()
    for file_name, content in files.items():
        with atomic_file(folder / file_name) as file:
            file.write(content)


def summary(folder: Path, indexes: Sequence[ShardIndex]) -> str:
    """What was written, for the terminal.

    Args:
        folder: the folder of the shards.
        indexes: the index of each split.
    """
    lines = [f"{folder}: {len(indexes[0].class_names)} classes"]
    for index in indexes:
        size, number = sum(shard.size for shard in index.shards), len(index.shards)
        shards = "1 shard" if number == 1 else f"{number:,} shards"
        lines.append(f"  {index.split}: {len(index.labels):,} images, {size:,} bytes, {shards}")
    return "\n".join(lines)
