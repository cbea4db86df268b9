"""Which images of the data each split takes: subsets, hold-outs, and the splits that a run has written down.

A hold-out of files is decided for each file by a digest of its path, within its class: new files of one class change
nothing for another. Once a run has written its splits down they are read back, so that its test images stay apart from
those that it was trained on whatever is added later. Part of the builder: it sees the config.
"""

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import mix
from tailtune.datasets.images.image_files import BadPicture, inspect_files, load_rgb
from tailtune.datasets.long_tail import SUBSET_SEED, capped_counts, check_hold_out, hold_out, subsample
from tailtune.datasets.sources.available_images import AvailableImages
from tailtune.datasets.sources.image_sources import FileSource, Source
from tailtune.datasets.splits.split_records import (
    CONTENT,
    SIZE,
    ChosenSplits,
    Record,
    Split,
    StoredSplits,
    positions_of,
)

log = logging.getLogger("tailtune")
FIRST = 10
"""Unreadable images that a message names."""


def choose(cfg: CfgNode, data: AvailableImages, kept: StoredSplits | None = None) -> ChosenSplits:
    """The images of each split; none of them has been looked at.

    Args:
        data: what there is.
        kept: splits of the run that is continued or evaluated; its hold-outs are taken over.

    Raises:
        UserError: a class would keep no image.
    """
    source, names = data.train, data.outline.class_names
    files = isinstance(source, FileSource)
    holds_out = bool(cfg.test_per_class or cfg.val_per_class)
    if kept is not None and holds_out and files and (found := _as_kept(cfg, data, kept)) is not None:
        return found
    rest = np.arange(len(source))
    splits: dict[str, Split] = {}
    if data.test is not None:
        splits["test"] = Split(data.test, np.arange(len(data.test)))
    else:
        held, rest = _hold_out(source, rest, cfg.test_per_class, names, "test_per_class")
        splits["test"] = Split(source, held)
    if cfg.imb_factor is not None:
        rest = rest[subsample(source.labels[rest], capped_counts(data.outline.available, cfg.imb_factor))]
    if cfg.val_per_class:
        held, rest = _hold_out(source, rest, cfg.val_per_class, names, "val_per_class")
        splits["val"] = Split(source, held)
    elif data.val is not None:
        splits["val"] = Split(data.val, np.arange(len(data.val)))
    splits["train"] = Split(source, _in_order(source, rest, kept) if kept is not None and files else rest)
    return ChosenSplits(splits, _left_over(source, splits) if files else (), ())


def _hold_out(
    source: Source, among: np.ndarray, per_class: int, names: tuple[str, ...], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """Positions held out, by class, and those that remain in their order."""
    labels = source.labels[among]
    check_hold_out(np.bincount(labels, minlength=len(names)), per_class, names, key)
    if not isinstance(source, FileSource):  # data that cannot grow keep the split that they always had
        held, rest = hold_out(labels, per_class, names, key)
        return among[held], among[rest]
    draws = np.array([mix(SUBSET_SEED, "hold out", source.paths[i]) for i in among], dtype=np.uint64)
    by_class = np.lexsort((draws, labels))
    place = np.arange(len(among)) - np.searchsorted(labels[by_class], labels[by_class])
    held = by_class[place < per_class]
    return among[held], among[np.setdiff1d(np.arange(len(among)), held)]


def _in_order(source: Source, positions: np.ndarray, kept: StoredSplits) -> np.ndarray:
    """The same images in the order in which the run has them, of which its batches are made."""
    where = positions_of(kept.records["train"].paths, source)
    known = where[np.isin(where, positions)]
    return np.concatenate([known, positions[~np.isin(positions, known)]])


def _as_kept(cfg: CfgNode, data: AvailableImages, kept: StoredSplits) -> ChosenSplits | None:
    """The splits that were written down, as far as their images are there; None if none is: those are other data."""
    sources = {"train": data.train, "test": data.test or data.train, "val": data.val or data.train}
    splits = {}
    for name, record in kept.records.items():
        where = positions_of(record.paths, sources[name])
        splits[name] = Split(sources[name], where[where >= 0])
    if len(splits["train"].indices) == 0:
        return None
    counts = np.bincount(data.train.labels[splits["train"].indices], minlength=len(data.outline.class_names))
    if not counts.all():
        name = data.outline.class_names[int(counts.argmin())]
        raise UserError(
            f"class '{name}' has no image of those that this run was trained on; put the images back, or start over "
            "with `resume False`"
        )
    if data.test is not None:  # a test split of its own may have changed
        splits["test"] = Split(data.test, np.arange(len(data.test)))
    known = {path for record in kept.records.values() for path in record.paths} | {*kept.unused, *kept.unreadable}
    left = _left_over(data.train, splits)
    new = tuple(path for path in left if path not in known)
    return ChosenSplits(splits, tuple(path for path in left if path in known), new)


def _left_over(source: Source, splits: dict[str, Split]) -> tuple[str, ...]:
    """Paths of the training source that no split took."""
    assert isinstance(source, FileSource)
    taken = [each.indices for each in splits.values() if each.source is source]
    rest = np.setdiff1d(np.arange(len(source)), np.concatenate(taken))
    return tuple(source.paths[i] for i in rest)


class UnreadableImages(UserError):
    """Files of the splits that are no images.

    Args:
        problems: where the image comes from → what is wrong.
        every: nothing is left without them.
    """

    def __init__(self, problems: Mapping[str, str], every: str = "") -> None:
        self.problems = problems
        shown = [f"{where}: {why}" for where, why in list(problems.items())[:FIRST]]
        more = f"; and {len(problems) - FIRST} more" if len(problems) > FIRST else ""
        count = f"{len(problems):,} images" if len(problems) > 1 else "1 image"
        remedy = every or "put good files in their place, or leave them out with `on_bad_image skip`"
        super().__init__(f"cannot read {count}: {'; '.join(shown)}{more}; {remedy}")


def readable(cfg: CfgNode, chosen: ChosenSplits, kept: StoredSplits | None, names: Sequence[str]) -> ChosenSplits:
    """The splits after one cheap look at every file: is it there, regular, and does it begin like an image?

    With `on_bad_image skip` training is without the images that cannot be read, so that class counts and priors are of
    those that can; each is decoded once for that, but for those that the run at hand has decoded before. Test images
    stay, because test distributions are made of their positions; the evaluation counts those that it cannot read.

    Args:
        names: of the classes, for messages.

    Raises:
        UnreadableImages: there are some and they are not to be left out; or a class has no other.
    """
    chosen, problems = look(chosen)
    paths = (path for split in chosen.splits.values() for path in split.paths())
    if unlisted := {path: "its name holds a line break" for path in paths if "\n" in path}:
        raise UnreadableImages(_placed(chosen, unlisted), "rename it: the run's lists of images have a line for each")
    if cfg.on_bad_image != "skip":
        if problems:
            raise UnreadableImages(_placed(chosen, problems))
        return chosen
    train = chosen.splits["train"]
    problems |= _undecodable(train, problems.keys(), _decoded(kept))
    found = without(chosen, problems)
    left = found.splits["train"]
    labels = train.source.labels[train.indices]
    for label in np.setdiff1d(labels, left.source.labels[left.indices]):
        own = {path for path, each in zip(train.paths(), labels, strict=True) if each == label}
        named = {path: why for path, why in problems.items() if path in own}
        raise UnreadableImages(_placed(chosen, named), f"class '{names[label]}' has no other training image")
    for place, why in list(_placed(chosen, problems).items())[:FIRST]:
        log.warning("warning: cannot read %s: %s", place, why)
    if lost := len(train.indices) - len(left.indices):
        log.warning("warning: %d of %d training images cannot be read and are left out", lost, len(train.indices))
    return replace(found, unreadable=problems, left_out=lost)


def _decoded(kept: StoredSplits | None) -> dict[str, int]:
    """Path → size of the training images that the run has decoded."""
    return {} if kept is None else dict(kept.records["train"].lengths())


def look(chosen: ChosenSplits, headers: bool = True) -> tuple[ChosenSplits, dict[str, str]]:
    """The splits with the sizes of their files (−1 where there is none), and path → what is wrong with it.

    Args:
        headers: open the files; else only their sizes are asked for.
    """
    seen, problems = dict(chosen.splits), dict[str, str]()
    for name, split in chosen.splits.items():
        if isinstance(split.source, FileSource):
            paths = split.paths()
            found = inspect_files([split.source.root / path for path in paths], headers)
            seen[name] = replace(split, sizes=found.sizes)
            problems |= {paths[i]: why for i, why in found.problems.items()}
    return replace(chosen, splits=seen), problems


def _undecodable(split: Split, bad: Collection[str], known: Mapping[str, int]) -> dict[str, str]:
    """Path → why, of the images that cannot be decoded; those of `known` path and size have been."""
    if not isinstance(split.source, FileSource) or split.sizes is None:
        return {}
    files = zip(split.paths(), split.sizes.tolist(), strict=True)
    todo = [(split.source.root, path) for path, size in files if path not in bad and known.get(path) != size]

    def reason(item: tuple[Path, str]) -> str | None:
        try:
            load_rgb(item[0] / item[1])
        except BadPicture as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders let other threads run
        shown = tqdm(
            pool.map(reason, todo), "decoding images", len(todo), delay=2, leave=False, unit="image", disable=None
        )
        return {path: why for (_, path), why in zip(todo, shown, strict=True) if why is not None}


def without(chosen: ChosenSplits, paths: Collection[str]) -> ChosenSplits:
    """The splits, training without some images."""
    train = chosen.splits["train"]
    if not paths or not isinstance(train.source, FileSource):
        return chosen
    left = np.array([i for i, path in enumerate(train.paths()) if path not in paths], dtype=np.int64)
    return replace(chosen, splits={**chosen.splits, "train": train.take(left)})


def _placed(chosen: ChosenSplits, problems: Mapping[str, str]) -> dict[str, str]:
    """Where an image comes from, for people → what is wrong with it."""
    found = {}
    for split in chosen.splits.values():
        for index, path in zip(split.indices, split.paths(), strict=False):
            if path in problems:
                found[split.source.where(int(index))] = problems[path]
    return found


def records(cfg: CfgNode, chosen: ChosenSplits, kept: StoredSplits | None = None) -> dict[str, Record]:
    """What each split is made of, after `look`; fingerprints are of the kind that the run wrote down."""
    found = {}
    for name, split in chosen.splits.items():
        if not isinstance(split.source, FileSource):
            found[name] = Record.built_in(cfg.dataset)
            continue
        assert split.sizes is not None, "look first"
        before = kept.records.get(name) if kept else None
        kind = before.kind if before and before.kind in (SIZE, CONTENT) else cfg.data_fingerprint
        found[name] = Record.of(split.source, split.indices, split.sizes, kind)
    return found
