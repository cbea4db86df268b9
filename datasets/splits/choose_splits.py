"""Chooses which images each split takes: long-tailed subsets, held-out images, or the splits that a run has stored.

Whether a file is held out depends on a digest of its path among the files of its class. So new files in one class do
not change the split of another class. Once a run has stored its splits, they are read back: images that it was trained
on never become test images, whatever is added to the data later.
"""

from collections.abc import Mapping

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import derive_seed
from tailtune.datasets.data_settings import SplitSettings
from tailtune.datasets.long_tail import SUBSET_SEED, capped_counts, capped_subset, check_hold_out, hold_out, subsample
from tailtune.datasets.sources.available_images import AvailableImages
from tailtune.datasets.sources.image_sources import Source
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.splits.split_records import (
    CONTENT,
    SIZE,
    ChosenSplits,
    Record,
    Split,
    StoredSplits,
    positions_in_source,
)


def choose_splits(options: SplitSettings, data: AvailableImages, stored: StoredSplits | None = None) -> ChosenSplits:
    """Choose the images of each split. No image file is opened.

    Args:
        options: which subsets and held-out images are asked for.
        data: all images.
        stored: the splits of the run that is continued or evaluated. Its held-out images are used again.

    Returns:
        The splits, without file sizes.

    Raises:
        UserError: a class would keep no training image.
    """
    source, names = data.train, data.outline.class_names
    has_paths = isinstance(source, NamedSource)
    holds_out = bool(options.test_per_class or options.val_per_class)
    if stored is not None and holds_out and has_paths and (restored := _restored(data, stored)) is not None:
        return restored
    rest = np.arange(len(source))
    splits: dict[str, Split] = {}
    if data.test is not None:
        splits["test"] = Split(data.test, np.arange(len(data.test)))
    else:
        held_out, rest = _hold_out(source, rest, options.test_per_class, names, "test_per_class")
        splits["test"] = Split(source, held_out)
    if options.imb_factor is not None:
        rest = rest[subsample(source.labels[rest], capped_counts(data.outline.available, options.imb_factor))]
    if options.val_per_class:
        held_out, rest = _hold_out(source, rest, options.val_per_class, names, "val_per_class")
        splits["val"] = Split(source, held_out)
    elif data.val is not None:
        splits["val"] = Split(data.val, np.arange(len(data.val)))
    if options.subset_cap is not None:
        rest = rest[capped_subset(source.labels[rest], options.subset_cap, options.subset_seed)]
    splits["train"] = Split(source, _in_stored_order(source, rest, stored) if stored and has_paths else rest)
    return ChosenSplits(splits, _paths_in_no_split(source, splits) if has_paths else (), ())


def _hold_out(
    source: Source, candidates: np.ndarray, per_class: int, names: tuple[str, ...], key: str
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates that are held out, sorted by class, and the others in their order; positions in the source."""
    labels = source.labels[candidates]
    check_hold_out(np.bincount(labels, minlength=len(names)), per_class, names, key)
    if not isinstance(source, NamedSource):  # built-in data cannot grow and keep the split of earlier versions
        held_out, rest = hold_out(labels, per_class, names, key)
        return candidates[held_out], candidates[rest]
    digests = np.array(
        [derive_seed(SUBSET_SEED, "hold out", path) for path in source.paths.at(candidates)], dtype=np.uint64
    )
    by_class = np.lexsort((digests, labels))
    rank_in_class = np.arange(len(candidates)) - np.searchsorted(labels[by_class], labels[by_class])
    held_out = by_class[rank_in_class < per_class]
    return candidates[held_out], candidates[np.setdiff1d(np.arange(len(candidates)), held_out)]


def _in_stored_order(source: Source, positions: np.ndarray, stored: StoredSplits) -> np.ndarray:
    """The positions in the order in which the run stored them, because batches depend on it; new ones come last."""
    stored_positions = positions_in_source(stored.records["train"].paths, source)
    known = stored_positions[np.isin(stored_positions, positions)]
    return np.concatenate([known, positions[~np.isin(positions, known)]])


def _restored(data: AvailableImages, stored: StoredSplits) -> ChosenSplits | None:
    """The stored splits without images that are gone; None if all training images are gone, as in other data."""
    sources = {"train": data.train, "test": data.test or data.train, "val": data.val or data.train}
    splits = {}
    for name, record in stored.records.items():
        positions = positions_in_source(record.paths, sources[name])
        splits[name] = Split(sources[name], positions[positions >= 0])
    if len(splits["train"].indices) == 0:
        return None
    counts = np.bincount(data.train.labels[splits["train"].indices], minlength=len(data.outline.class_names))
    if not counts.all():
        name = data.outline.class_names[int(counts.argmin())]
        raise UserError(
            f"class '{name}' has none of the images left that this run was trained on; put the images back, or start "
            "over with `resume False`"
        )
    if data.test is not None:  # a test split of its own is taken as it is now
        splits["test"] = Split(data.test, np.arange(len(data.test)))
    known = {path for record in stored.records.values() for path in record.paths}
    known |= {*stored.unused, *stored.unreadable}
    unused = _paths_in_no_split(data.train, splits)
    new = tuple(path for path in unused if path not in known)
    return ChosenSplits(splits, tuple(path for path in unused if path in known), new)


def _paths_in_no_split(source: Source, splits: Mapping[str, Split]) -> tuple[str, ...]:
    """Paths of the images of the training source that no split took."""
    assert isinstance(source, NamedSource)
    taken = [split.indices for split in splits.values() if split.source is source]
    rest = np.setdiff1d(np.arange(len(source)), np.concatenate(taken))
    return tuple(source.paths.at(rest))


def make_records(options: SplitSettings, chosen: ChosenSplits, stored: StoredSplits | None = None) -> dict[str, Record]:
    """The record of each split.

    Args:
        options: the name of the data set, and the kind of fingerprint.
        chosen: the splits with file sizes, as `inspect_splits` returns them.
        stored: the splits of the run that is continued or evaluated. Its kind of fingerprint is used again.

    Returns:
        Name of a split → its record.
    """
    records = {}
    for name, split in chosen.by_name.items():
        if not isinstance(split.source, NamedSource):
            records[name] = Record.built_in(options.dataset)
            continue
        assert split.sizes is not None, "call inspect_splits first"
        before = stored.records.get(name) if stored else None
        kind = before.kind if before and before.kind in (SIZE, CONTENT) else options.data_fingerprint
        records[name] = Record.of(split.source, split.indices, split.sizes, kind)
    return records
