"""Finds the files of the splits that are not images, and refuses them or leaves them out of training."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.datasets.images.decode_many import decode_many
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.splits.split_records import ChosenSplits, Split, StoredSplits

log = logging.getLogger("tailtune")
MAX_NAMED_IMAGES = 10
"""Number of unreadable images that a message names."""
LEAVE_OUT = "replace them by images, or leave them out with `on_bad_image skip`"
"""The remedy for images that cannot be read."""


class UnreadableImages(UserError):
    """Some files of the splits cannot be read as images.

    Args:
        problems: where an image comes from → what is wrong with it.
        remedy: what the user can do; empty: replace the files or leave them out.
    """

    def __init__(self, problems: Mapping[str, str], remedy: str = "") -> None:
        self.problems = problems
        named = [f"{location}: {reason}" for location, reason in list(problems.items())[:MAX_NAMED_IMAGES]]
        more = f"; and {len(problems) - MAX_NAMED_IMAGES} more" if len(problems) > MAX_NAMED_IMAGES else ""
        count = f"{len(problems):,} images" if len(problems) > 1 else "1 image"
        remedy = remedy or LEAVE_OUT
        super().__init__(f"cannot read {count}: {'; '.join(named)}{more}; {remedy}")


def inspect_splits(chosen: ChosenSplits, read_headers: bool = True) -> tuple[ChosenSplits, dict[str, str]]:
    """Check all files of the splits without decoding them.

    Args:
        chosen: the splits.
        read_headers: open each file and read its first bytes. If false, only kinds and sizes are checked.

    Returns:
        The splits with the sizes of their files (−1 for a missing one); and path → what is wrong with it.
    """
    by_name, problems = dict(chosen.by_name), dict[str, str]()
    for name, split in chosen.by_name.items():
        if isinstance(split.source, NamedSource):
            paths = split.paths()
            inspection = split.source.inspect(split.indices, read_headers)
            by_name[name] = replace(split, sizes=inspection.sizes)
            problems |= {paths[i]: reason for i, reason in inspection.problems.items()}
    return replace(chosen, by_name=by_name), problems


def check_readable(
    chosen: ChosenSplits, stored: StoredSplits | None, class_names: Sequence[str], skip: bool
) -> ChosenSplits:
    """Check that all files of the splits are images: each exists, is regular, and begins like an image.

    With `skip`, training images that cannot be read are left out, so that class counts and priors are those of the
    images that can be read. Every training image is decoded for this, unless the run has decoded it before. Test
    images are not left out, because test distributions refer to their positions; the evaluation counts those that it
    cannot read.

    Args:
        chosen: the splits.
        stored: the splits of the run that is continued or evaluated.
        class_names: C names, for messages.
        skip: the option `on_bad_image` is `skip`.

    Returns:
        The splits with file sizes and, with `skip`, without unreadable training images.

    Raises:
        UnreadableImages: some files are not images and `skip` is false; or a class has no other image; or a name
            holds a line break.
    """
    chosen, problems = inspect_splits(chosen)
    paths = (path for split in chosen.by_name.values() for path in split.paths())
    if unlisted := {path: "its name holds a line break" for path in paths if "\n" in path}:
        raise UnreadableImages(
            _by_location(chosen, unlisted), "rename it: the run's lists have one line for each image"
        )
    if not skip:
        if problems:
            raise UnreadableImages(_by_location(chosen, problems))
        return chosen
    train = chosen.by_name["train"]
    problems |= _undecodable(train, problems.keys(), _decoded_before(stored))
    readable = drop_from_train(chosen, problems)
    remaining = readable.by_name["train"]
    _check_every_class(chosen, remaining, problems, class_names)
    for location, reason in list(_by_location(chosen, problems).items())[:MAX_NAMED_IMAGES]:
        log.warning("warning: cannot read %s: %s", location, reason)
    if left_out := len(train.indices) - len(remaining.indices):
        log.warning("warning: %d of %d training images cannot be read and are left out", left_out, len(train.indices))
    return replace(readable, unreadable=problems, left_out=left_out)


def _check_every_class(
    chosen: ChosenSplits, remaining: Split, problems: Mapping[str, str], class_names: Sequence[str]
) -> None:
    """Refuse to leave out all training images of a class."""
    train = chosen.by_name["train"]
    labels = train.source.labels[train.indices]
    for label in np.setdiff1d(labels, remaining.source.labels[remaining.indices]):
        in_class = {path for path, path_label in zip(train.paths(), labels, strict=True) if path_label == label}
        of_class = {path: reason for path, reason in problems.items() if path in in_class}
        remedy = f"class '{class_names[label]}' has no other training image: add one"
        raise UnreadableImages(_by_location(chosen, of_class), remedy)


def _decoded_before(stored: StoredSplits | None) -> dict[str, int]:
    """Path → size of the training images that the run has decoded."""
    return {} if stored is None else dict(stored.records["train"].path_sizes())


def _undecodable(split: Split, bad: Collection[str], known: Mapping[str, int]) -> dict[str, str]:
    """Decode the images of a split, except bad ones and those of known path and size. Returns path → problem."""
    source = split.source
    if not isinstance(source, NamedSource) or split.sizes is None:
        return {}
    files = zip(split.paths(), split.sizes.tolist(), split.indices.tolist(), strict=True)
    indices = [index for path, size, index in files if path not in bad and known.get(path) != size]
    results = decode_many(indices, load=source.decode)
    return {source.paths[indices[result.position]]: result.problem for result in results if result.problem}


def drop_from_train(chosen: ChosenSplits, paths: Collection[str]) -> ChosenSplits:
    """The splits without some training images.

    Args:
        chosen: the splits.
        paths: the images to leave out of `train`.
    """
    train = chosen.by_name["train"]
    if not paths or not isinstance(train.source, NamedSource):
        return chosen
    remaining = np.array([i for i, path in enumerate(train.paths()) if path not in paths], dtype=np.int64)
    return replace(chosen, by_name={**chosen.by_name, "train": train.take(remaining)})


def _by_location(chosen: ChosenSplits, problems: Mapping[str, str]) -> dict[str, str]:
    """Convert path → problem to location → problem, for messages."""
    located = {}
    for split in chosen.by_name.values():
        for index, path in zip(split.indices, split.paths(), strict=False):
            if path in problems:
                located[split.source.location(int(index))] = problems[path]
    return located
