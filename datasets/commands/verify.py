"""`data verify`: checks the lists and the images of a data set before anybody trains on them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError, lookup
from tailtune.datasets.commands.checksums import checksum
from tailtune.datasets.commands.copies import exact_copies, near_copies, perceptual_hash
from tailtune.datasets.commands.findings import Findings, SplitFindings
from tailtune.datasets.commands.notes import collected_notes
from tailtune.datasets.commands.releases import list_status, prefix_of, probable_release
from tailtune.datasets.commands.split_files import SplitFiles
from tailtune.datasets.commands.verify_shards import SHARD_DIGESTS, inspect_shards
from tailtune.datasets.data_settings import DataSettings, SplitSettings
from tailtune.datasets.images.decode_many import decode_many
from tailtune.datasets.images.inspect_files import inspect_files
from tailtune.datasets.images.regular_files import NotARegularFile
from tailtune.datasets.long_tail import capped, capped_counts, check_classes
from tailtune.datasets.sources.available_images import AvailableImages
from tailtune.datasets.sources.cifar import ARCHIVES, TEST_IMAGES
from tailtune.datasets.sources.class_names import same_names
from tailtune.datasets.sources.image_folder import SPLITS
from tailtune.datasets.sources.listing import Listing
from tailtune.datasets.sources.published_lists import PUBLISHED
from tailtune.datasets.splits.choose_splits import choose_splits
from tailtune.datasets.splits.split_records import Split
from tailtune.datasets.table import DATASETS, read_list_files


@dataclass(frozen=True)
class VerifyRequest:
    """What to check."""

    data: DataSettings
    splits: SplitSettings
    only: Collection[str] = ()
    """The splits whose lists are read; empty for all."""
    images: bool = True
    """Look for the images; if false, only the lists are checked."""
    decode: bool = False
    near: bool = False
    many_above: int = 100
    few_below: int = 20


def verify(request: VerifyRequest) -> Findings:
    """Check a data set.

    Args:
        request: the data, and what to check.

    Returns:
        What was found.

    Raises:
        UserError: the data cannot be checked at all: a list or the folder of the images is missing or wrong.
    """
    entry = lookup(DATASETS, request.data.dataset, "dataset")
    if entry.built_in:
        return _verify_built_in(request)
    with collected_notes() as notes:
        class_names, splits, listings = _read(request)
    findings = _empty_findings(request, class_names)
    findings.notes, findings.wrong_names = notes, "" if request.only else same_names(class_names)
    for name, split in splits.items():
        counts = np.bincount(split.source.labels[split.indices], minlength=len(class_names)).tolist()
        file = listings[name].file if name in listings else None
        findings.splits[name] = SplitFindings(counts, str(file) if file else None)
    _check_lists(request, listings, findings)
    if request.images:
        _check_images(request, SplitFiles(splits), findings)
    elif listings:
        findings.exact = _listed_in_several(splits)
    return findings


def _empty_findings(request: VerifyRequest, class_names: Collection[str]) -> Findings:
    built_in = lookup(DATASETS, request.data.dataset, "dataset").built_in
    folders = request.data.folders
    root = None if built_in else folders.url or str(folders.image_root().absolute())
    return Findings(
        request.data.data,
        root,
        tuple(class_names),
        request.many_above,
        request.few_below,
        images_checked=request.images,
        decoded=request.decode or request.near,
    )


def _read(request: VerifyRequest) -> tuple[tuple[str, ...], dict[str, Split], dict[str, Listing]]:
    """Class names, the images of each split, and what was read for it. No image is looked for."""
    if request.only:
        if request.data.dataset != "ImageList":
            raise UserError("--split is for data with list files; leave it out")
        files = request.data.list_files()
        if absent := set(request.only) - files.keys():
            lists = ", ".join(f"{name} ({file})" for name, file in files.items())
            raise UserError(f"--split {sorted(absent)[0]}: data '{request.data.data}' have lists of {lists} only")
        listings, names = read_list_files(request.data, request.only)
        num_classes = request.data.num_classes or 1 + max(int(each.labels.max()) for each in listings.values())
        names = names or tuple(f"class {label}" for label in range(num_classes))
        for listing in listings.values():
            listing.check_labels(len(names))
        root = request.data.folders.image_root()
        splits = {name: Split(each.files(root), np.arange(len(each.labels))) for name, each in listings.items()}
        return names, splits, listings
    # Class names of ImageNet are in a library that imports torch; the folders are names enough here.
    options = replace(request.data, classnames=None) if request.data.classnames == "imagenet" else request.data
    entry, by_split = lookup(DATASETS, options.dataset, "dataset"), dict[str, Listing]()
    if entry.listings is None:
        available = entry.load(options)
    else:
        root = options.folders.image_root()
        outline, train, test, val = entry.listings(options)
        test_files, val_files = (each.files(root) if each else None for each in (test, val))
        available = AvailableImages(outline, train.files(root), test_files, val_files)
        by_split = {"train": train, "test": test or train, "val": val or train}
    chosen, names = choose_splits(request.splits, available), available.outline.class_names
    trained = chosen.by_name["train"]
    check_classes(np.bincount(trained.source.labels[trained.indices], minlength=len(names)), names, options.data)
    order = sorted(chosen.by_name, key=SPLITS.index)
    return names, {name: chosen.by_name[name] for name in order}, by_split


def _check_lists(request: VerifyRequest, listings: dict[str, Listing], findings: Findings) -> None:
    """Compare the lists in use, and published lists beside them, with the published ones."""
    files = {listing.file: None for listing in listings.values() if listing.file}
    prefixes = {prefix for file in files if (prefix := prefix_of(file.name))}
    for folder in request.data.folders.for_lists():
        for name in PUBLISHED:
            if prefix_of(name) in prefixes and (folder / name).is_file():
                files.setdefault(folder / name)
    for file in files:
        status = list_status(file)
        findings.lists[str(file)] = status
        if file.name in PUBLISHED and not status.startswith("published"):
            findings.bad_lists.append(str(file))


def _listed_in_several(splits: Mapping[str, Split]) -> list[list[dict[str, str]]]:
    """The paths that several splits list, as entries of each of these."""
    found: dict[str, list[str]] = {}
    for name, split in splits.items():
        for path in dict.fromkeys(split.paths()):
            found.setdefault(path, []).append(name)
    return [[{"split": name, "path": path} for name in names] for path, names in found.items() if len(names) > 1]


def _check_images(request: VerifyRequest, files: SplitFiles, findings: Findings) -> None:
    """Look for every image, and compare and decode them if this is asked for."""
    in_shards = request.data.dataset == "Shards"
    root = Path() if in_shards else request.data.folders.image_root()
    if not root.is_dir():
        raise UserError(f"image folder not found: {root.absolute()} (set `root` to the folder of the images)")
    inspection = inspect_shards(files, findings) if in_shards else inspect_files(files)
    problems = dict(inspection.problems)
    missing = np.array([i for i, reason in problems.items() if reason.startswith("not found")], dtype=np.int64)
    for index in missing.tolist():
        findings.splits[files.split(index)].missing.append(files.relative(index))
        del problems[index]
    if len(missing) and not in_shards:
        lists = [Path(split.list_file).name for split in findings.splits.values() if split.list_file]
        prefix = next((found for name in lists if (found := prefix_of(name))), None)
        findings.release = probable_release(prefix, root, files.take(missing))
    sizes = inspection.sizes.copy()
    sizes[list(inspection.problems)] = -1
    copies = exact_copies(files, sizes, files.split_of, SHARD_DIGESTS if in_shards else None)
    problems |= copies.unreadable
    findings.exact = [[_entry(files, index) for index in group] for group in copies.groups]
    if request.decode or request.near:
        good = np.setdiff1d(np.arange(len(files)), [*inspection.problems, *copies.unreadable])
        problems |= _decode(request, files, good, findings)
    for index, reason in sorted(problems.items()):
        findings.splits[files.split(index)].unreadable[files.relative(index)] = reason


def _decode(request: VerifyRequest, files: SplitFiles, good: np.ndarray, findings: Findings) -> dict[int, str]:
    """Decode images; compare them if this is asked for. Returns position → why it cannot be decoded."""
    hashes, decoded = np.zeros(len(good), dtype=np.uint64), np.ones(len(good), dtype=bool)
    problems = {}
    for done in decode_many(good.tolist(), perceptual_hash if request.near else None, load=files.decode):
        if done.problem:
            decoded[done.position] = False
            problems[int(good[done.position])] = done.problem
        elif isinstance(done.result, int):
            hashes[done.position] = done.result
    if request.near:
        found = near_copies(files, good[decoded], hashes[decoded])
        same = {frozenset(pair) for group in findings.exact or [] for pair in _pairs(group)}
        findings.near = []
        for a, b, bits in found.pairs:
            names = [f"{entry['split']}: {entry['path']}" for entry in (_entry(files, a), _entry(files, b))]
            if frozenset(names) not in same:
                findings.near.append({"a": names[0], "b": names[1], "bits": bits})
        findings.near_total = found.total - (len(found.pairs) - len(findings.near))
    return problems


def _pairs(group: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    names = [f"{entry['split']}: {entry['path']}" for entry in group]
    return ((a, b) for i, a in enumerate(names) for b in names[i + 1 :])


def _entry(files: SplitFiles, index: int) -> dict[str, str]:
    return {"split": files.split(index), "path": files.relative(index)}


def _verify_built_in(request: VerifyRequest) -> Findings:
    """Check the files of CIFAR; digits and generated images come with a library and have no files to check."""
    options = request.data
    outline = lookup(DATASETS, options.dataset, "dataset").outline(options)
    findings = _empty_findings(request, outline.class_names)
    splits = request.splits
    counts = [count - splits.val_per_class for count in capped_counts(outline.available, splits.imb_factor)]
    check_classes(counts, outline.class_names, options.data)
    findings.splits["train"] = SplitFindings(capped(counts, splits.subset_cap))
    findings.images_checked = findings.decoded = False
    if (archive := ARCHIVES.get(options.dataset)) is None:
        findings.notes.append("these images come with the program; there are no files to check")
        return findings
    classes = len(outline.class_names)
    findings.splits["test"] = SplitFindings([TEST_IMAGES // classes] * classes)
    folder = options.folders.image_root().absolute() / archive.folder
    findings.root = str(folder)
    for name, md5 in archive.files.items():
        findings.files[name] = _problem_of(folder / name, md5)
    return findings


def _problem_of(file: Path, md5: str) -> str:
    """What is wrong with a file; an empty text if it has the checksum."""
    try:
        found = checksum(file, "md5")
    except NotARegularFile as reason:
        return str(reason)
    return "" if found == md5 else f"is damaged: its MD5 is {found} instead of {md5}"
