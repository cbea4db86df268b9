"""What `data verify` found, as a JSON report and as text for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tailtune.datasets.long_tail import shot_masks

SCHEMA = 1
"""Version of the JSON report; docs/data.md describes it."""
SHOWN = 10
"""Entries of a list that the terminal shows; the report has all of them."""
SHOWN_CLASSES = 3
"""Most and least frequent classes that the terminal shows."""


@dataclass
class SplitFindings:
    """What was found in one split."""

    counts: list[int]
    """Images per class, [C]."""
    list_file: str | None = None
    missing: list[str] = field(default_factory=list)
    """Relative paths."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Relative path → reason."""


@dataclass
class Findings:
    """Everything that `data verify` found."""

    data: str
    root: str | None
    """None for data without files."""
    class_names: Sequence[str]
    many_above: int
    few_below: int
    splits: dict[str, SplitFindings] = field(default_factory=dict)
    lists: dict[str, str] = field(default_factory=dict)
    """Path of a list file → how it compares with the published one."""
    bad_lists: list[str] = field(default_factory=list)
    """Those of `lists` that have the name of a published list and other content."""
    files: dict[str, str] = field(default_factory=dict)
    """Other file of the data set → what is wrong with it; empty if nothing is."""
    wrong_names: str = ""
    """What is wrong with the class names."""
    release: list[str] = field(default_factory=list)
    """What was probably given instead."""
    notes: list[str] = field(default_factory=list)
    images_checked: bool = True
    decoded: bool = False
    exact: list[list[dict[str, str]]] | None = None
    """Groups of files with the same content, each as split and path; None: they were not looked for."""
    near: list[dict[str, Any]] | None = None
    """Pairs of similar images; None: they were not looked for."""
    near_total: int = 0

    def problems(self) -> list[str]:
        """What is wrong, one sentence each; similar images are no problem by themselves."""
        found = []
        for name, split in self.splits.items():
            for number, what in ((len(split.missing), "missing"), (len(split.unreadable), "unreadable")):
                if number:
                    found.append(f"{number:,} of {sum(split.counts):,} {name} images are {what}")
        found += [self.wrong_names] if self.wrong_names else []
        found += [f"{file} {self.lists[file]}" for file in self.bad_lists]
        found += [f"{file}: {problem}" for file, problem in self.files.items() if problem]
        if self.exact:
            number = len(self.exact)
            found.append(f"{number:,} {'image is' if number == 1 else 'images are'} in several splits")
        return found

    def as_json(self) -> dict[str, Any]:
        """The report."""
        splits = {
            name: {
                "images": sum(split.counts),
                "list": split.list_file,
                "counts": split.counts,
                "missing": split.missing,
                "unreadable": split.unreadable,
            }
            for name, split in self.splits.items()
        }
        return {
            "schema": SCHEMA,
            "data": self.data,
            "root": self.root,
            "ok": not self.problems(),
            "problems": self.problems(),
            "class_names": list(self.class_names),
            "groups": self.groups(),
            "splits": splits,
            "lists": self.lists,
            "files": self.files,
            "release": self.release,
            "notes": self.notes,
            "images_checked": self.images_checked,
            "decoded": self.decoded,
            "duplicates": {"exact": self.exact, "near": self.near, "near_total": self.near_total},
        }

    def groups(self) -> dict[str, int]:
        """Number of many-, medium- and few-shot classes, by the training images; empty without a training split."""
        if "train" not in self.splits:
            return {}
        masks = shot_masks(self.splits["train"].counts, self.many_above, self.few_below)
        return {name: int(mask.sum()) for name, mask in masks.items()}

    def as_text(self) -> str:
        """What the terminal shows."""
        lines = [f"{self.data}: {self.root}" if self.root else self.data]
        lines += [f"  {line}" for line in self._split_lines()]
        lines += [f"  list {file}: {status}" for file, status in self.lists.items()]
        lines += [f"  file {file}: {problem or 'ok'}" for file, problem in self.files.items()]
        lines += [f"  note: {note}" for note in self.notes]
        for name, split in self.splits.items():
            lines += _shown(f"missing in {name}", split.missing)
            lines += _shown(f"unreadable in {name}", [f"{path}: {why}" for path, why in split.unreadable.items()])
        lines += _shown("the same file in several splits", [_joined(group) for group in self.exact or []])
        near = [f"{pair['a']} ~ {pair['b']} ({pair['bits']} bits differ)" for pair in self.near or []]
        lines += _shown("nearly the same image in several splits", near, self.near_total)
        lines += [f"probably: {sentence}" for sentence in self.release]
        problems = self.problems()
        lines.append(f"problems: {'; '.join(problems)}" if problems else "no problem found")
        return "\n".join(lines)

    def _split_lines(self) -> list[str]:
        if not self.splits:
            return []
        rows = [["split", "images", "classes", "images per class", "missing", "unreadable"]]
        for name, split in self.splits.items():
            counts = np.array(split.counts)
            checked = [f"{len(split.missing):,}", f"{len(split.unreadable):,}"] if self.images_checked else ["–", "–"]
            spread = f"{counts.min():,} … {counts.max():,}"
            rows.append([name, f"{counts.sum():,}", f"{int((counts > 0).sum()):,}", spread, *checked])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if groups := self.groups():
            lines.append(f"classes: {groups['many']} many-shot, {groups['med']} medium-shot, {groups['few']} few-shot")
        return lines + _class_lines(self.class_names, next(iter(self.splits.values())).counts)


def _class_lines(names: Sequence[str], counts: Sequence[int]) -> list[str]:
    """The most and the least frequent classes with their numbers of images."""
    order = np.argsort(-np.array(counts), kind="stable").tolist()
    if len(order) > 2 * SHOWN_CLASSES:
        shown = [f"{names[label]} {counts[label]:,}" for label in order]
        return [", ".join([*shown[:SHOWN_CLASSES], "…", *shown[-SHOWN_CLASSES:]])]
    return [", ".join(f"{names[label]} {counts[label]:,}" for label in order)]


def _shown(heading: str, entries: Sequence[str], total: int | None = None) -> list[str]:
    """A heading with the number of entries, and the first entries; nothing if there are none."""
    total = len(entries) if total is None else total
    if not total:
        return []
    more = [f"    … and {total - SHOWN:,} more"] if total > SHOWN else []
    return [f"  {heading}: {total:,}", *(f"    {entry}" for entry in entries[:SHOWN]), *more]


def _joined(group: Sequence[Mapping[str, str]]) -> str:
    """The first file of each split, and the number of the others."""
    first: dict[str, str] = {}
    for entry in group:
        first.setdefault(entry["split"], entry["path"])
    more = f" (and {len(group) - len(first):,} more)" if len(group) > len(first) else ""
    return " = ".join(f"{split}: {path}" for split, path in first.items()) + more
