"""Chooses which images each split takes: long-tailed subsets, held-out images, or the splits that a run has stored.

Whether a file is held out depends on a digest of its path among the files of its class. So new files in one class do
not change the split of another class. Once a run has stored its splits, they are read back: images that it was trained
on never become test images, whatever is added to the data later.
"""

from collections import Counter
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
        UserError: a class would keep no training image, or an image that is listed twice might be held out once.
    """
    source, names = data.train, data.outline.class_names
    holds_out = bool(options.test_per_class or options.val_per_class)
    held: Mapping[str, np.ndarray] = {}
    if stored is not None and holds_out and isinstance(source, NamedSource):
        if not stored.of_earlier:
            if (restored := _restored(data, stored)) is not None:
                return restored
        elif (positions_in_source(stored.records["train"].paths, source) >= 0).any():  # not of other data
            held = {name: positions_in_source(record.paths, source) for name, record in stored.records.items()}
    rest = np.arange(len(source))
    splits: dict[str, Split] = {}
    if data.test is not None:
        splits["test"] = _whole(data.test, "test", stored)
    else:
        chosen, rest = _hold_out(source, rest, options.test_per_class, names, "test_per_class", held.get("test"))
        splits["test"] = Split(source, chosen)
    if options.imb_factor is not None:
        rest = rest[subsample(source.labels[rest], capped_counts(data.outline.available, options.imb_factor))]
    if options.val_per_class:
        chosen, rest = _hold_out(source, rest, options.val_per_class, names, "val_per_class", held.get("val"))
        splits["val"] = Split(source, chosen)
    elif data.val is not None:
        splits["val"] = _whole(data.val, "val", stored)
    if options.subset_cap is not None:
        rest = rest[capped_subset(source.labels[rest], options.subset_cap, options.subset_seed)]
    has_paths = isinstance(source, NamedSource)
    splits["train"] = Split(source, _in_stored_order(source, rest, stored) if stored and has_paths else rest)
    unused = _paths_in_no_split(source, splits) if has_paths else ()
    return ChosenSplits(splits, unused, (), class_names=names)


def _hold_out(
    source: Source,
    candidates: np.ndarray,
    per_class: int,
    names: tuple[str, ...],
    key: str,
    held: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The candidates that are held out, sorted by class, and the others in their order; positions in the source.

    An earlier stage has perhaps held some out already, at the positions `held`, where −1 is an image that is gone.
    """
    if held is not None:
        return held[np.isin(held, candidates)], candidates[~np.isin(candidates, held)]
    labels = source.labels[candidates]
    check_hold_out(np.bincount(labels, minlength=len(names)), per_class, names, key)
    if not isinstance(source, NamedSource):  # built-in data cannot grow and keep the split of earlier versions
        held_out, rest = hold_out(labels, per_class, names, key)
        return candidates[held_out], candidates[rest]
    paths = source.paths.at(candidates)
    if repeated := next((path for path, count in Counter(paths).items() if count > 1), None):
        raise UserError(
            f"{key} {per_class}: {repeated} is listed several times, so it might be both held out and trained on; list "
            "each image once"
        )
    digests = np.array([derive_seed(SUBSET_SEED, "hold out", path) for path in paths], dtype=np.uint64)
    by_class = np.lexsort((digests, labels))
    rank_in_class = np.arange(len(candidates)) - np.searchsorted(labels[by_class], labels[by_class])
    held_out = by_class[rank_in_class < per_class]
    return candidates[held_out], candidates[np.setdiff1d(np.arange(len(candidates)), held_out)]


def _whole(source: Source, name: str, stored: StoredSplits | None) -> Split:
    """All images of a split of its own. If they are those that the run stored, they have the order in which it did.

    Stored logits name the images by their positions, so a list that was sorted anew must not change them.
    """
    positions = np.arange(len(source))
    if stored is None or name not in stored.records or not isinstance(source, NamedSource):
        return Split(source, positions)
    stored_positions = positions_in_source(stored.records[name].paths, source)
    same = len(stored_positions) == len(source) and bool((stored_positions >= 0).all())
    return Split(source, stored_positions if same else positions)


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
        splits["test"] = _whole(data.test, "test", stored)
    known = {path for record in stored.records.values() for path in record.paths}
    known |= {*stored.unused, *stored.unreadable}
    unused = _paths_in_no_split(data.train, splits)
    new = tuple(path for path in unused if path not in known)
    unused = tuple(path for path in unused if path in known)
    return ChosenSplits(splits, unused, new, class_names=data.outline.class_names)


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
