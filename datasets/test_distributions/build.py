"""Test sets of other class frequencies: subsets of the one test split, so that its logits answer for all of them.

SADE (Zhang et al. 2022, section 5): `forward<r>` is long-tailed with the frequent classes of training in front, its
largest class being r times its smallest; `backward<r>` is the reverse, `uniform` has as many images of every class.
Like entries.py this file is part of the builder and sees the config.
"""

import logging
import re
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs.errors import UserError, shown
from tailtune.configs.seeding import mix
from tailtune.datasets.data_bundle import DataInfo, Shift
from tailtune.datasets.long_tail import longtail_counts, some_positions, subsample
from tailtune.datasets.sources.image_list import CATEGORIES, Listing, find_list, first_file, read_list, taxon_labels
from tailtune.datasets.sources.published_lists import is_published, published_at
from tailtune.datasets.table import list_folders
from tailtune.datasets.test_distributions.dirichlet import (
    DIRICHLET,
    Drawn,
    ImagesByClass,
    check_dirichlet,
    dirichlet_names,
    draw_test_sets,
    origin,
)
from tailtune.datasets.test_distributions.published_order import introsort_argsort

log = logging.getLogger("tailtune")
Rule = Callable[[float, int, float], list[int]]
"""Images of the largest class, number of classes, smallest / largest class → images per class in the class order."""


def _backward(largest: float, num_classes: int, factor: float) -> list[int]:
    return longtail_counts(largest, num_classes, factor)[::-1]


KINDS: Mapping[str, Rule] = MappingProxyType({"forward": longtail_counts, "backward": _backward})
UNIFORM, ALL = "uniform", "all"
AS_IT_IS = "test"
"""The test set itself, where something is learnt from it and no other distribution is asked for."""
FORMS = "all, uniform, forward<r> or backward<r> with a whole number r from 1, such as backward50; or dirichlet"


def shift_names(cfg: CfgNode) -> tuple[str, ...]:
    """The distributions that `test_dists` asks for, `all` replaced by those of the data; needs no images.

    Raises:
        UserError: an unknown name, or options of distributions that do not fit.
    """
    names: list[str] = []
    for name in cfg.test_dists or ():
        if name.startswith(DIRICHLET):
            names += dirichlet_names(name, cfg.dirichlet_trials)
            continue
        names += _all(cfg.shift_ratios) if name == ALL else [name]
        rule(names[-1], {})
    check_dirichlet(cfg)
    for name, factor in (cfg.shift_factors or {}).items():
        rule(name, {}, "shift_factors")
        if not 0 < factor <= 1:
            raise UserError(f"shift_factors: {name} {factor:g} is not above 0 and at most 1 (smallest / largest class)")
    if cfg.shift_files and (cfg.dataset != "ImageList" or "{name}" not in cfg.shift_files):
        raise UserError(f"shift_files {cfg.shift_files}: it is for dataset ImageList and has {{name}} in it")
    if names and cfg.shift_order == "published" and cfg.label_field not in ("", "id", "name"):
        raise UserError(
            f"shift_order published is the order of species: with label_field {cfg.label_field} set shift_order counts"
        )
    return tuple(dict.fromkeys(names))


def build_shifts(cfg: CfgNode, info: DataInfo, test_labels: Tensor) -> tuple[Shift, ...]:
    """The test sets that `test_dists` asks for; without it the whole one where `adapt` or `target_prior` needs one.

    Reads no image: at most list files, where the data are lists.

    Args:
        info: of the training data.
        test_labels: of the test split, as far as `max_test_images` keeps it, [N].

    Raises:
        UserError: as `shift_names`; a list file that does not fit the test split or the class frequencies.
    """
    names = shift_names(cfg)
    if not names and cfg.adapt is None and cfg.target_prior is None:
        return ()
    if not names:
        whole = torch.bincount(test_labels, minlength=info.num_classes)
        return (Shift(AS_IT_IS, whole, torch.arange(len(test_labels)), "the test images as they are"),)
    split = _TestSplit(cfg, test_labels.numpy(), info.num_classes)
    order, shifts = class_order(cfg, info), []
    drawn = _dirichlet(cfg, info, split, order) if any(name.startswith(DIRICHLET) for name in names) else {}
    for name in names:
        wanted, positions, source, learn = drawn[name] if name in drawn else _decayed(cfg, name, split, order)
        counts = np.bincount(split.labels[positions], minlength=info.num_classes)
        notes = "; ".join([source, *_notes(wanted, split.have, counts)])
        learnt = None if learn is None else torch.from_numpy(learn)
        shifts.append(Shift(name, torch.from_numpy(counts), torch.from_numpy(positions), notes, learnt))
    if split.missing:
        first = split.missing[0]
        place = published_at(Path(first).name)
        log.info("test_dists: %d lists are missing, their images are drawn: %s %s", len(split.missing), first, place)
    return tuple(shifts)


def _all(ratios: list[int]) -> list[str]:
    return [*(f"forward{r}" for r in reversed(ratios)), UNIFORM, *(f"backward{r}" for r in ratios)]


def rule(name: str, factors: Mapping[str, float], key: str = "test_dists") -> Callable[[float, int], list[int]]:
    """Largest class, number of classes → images per class in the class order."""
    if name == UNIFORM:
        return partial(longtail_counts, imb_factor=1.0)
    found = re.fullmatch(r"([a-z]+)([1-9]\d{0,8})", name)
    if found is None or found[1] not in KINDS:
        raise UserError(f"{key}: unknown distribution '{shown(name)}'; choices: {FORMS}")
    factor, kind = factors.get(name, 1 / int(found[2])), KINDS[found[1]]
    return lambda largest, num_classes: kind(largest, num_classes, factor)


def _decayed(cfg: CfgNode, name: str, split: "_TestSplit", order: np.ndarray) -> Drawn:
    """The test set of a rule, such as forward50."""
    wanted = np.zeros(len(order), dtype=np.int64)
    wanted[order] = rule(name, cfg.shift_factors or {})(split.largest(), len(order))
    return Drawn(wanted, *split.choose(name, wanted))


def _dirichlet(cfg: CfgNode, info: DataInfo, split: "_TestSplit", order: np.ndarray) -> dict[str, Drawn]:
    """Drawn test sets; numbers are drawn class by class in the order of the lists' own labels."""
    own = _list_order(cfg, len(order))
    positions, source = split.in_order()
    by_class = np.split(positions[split.labels[positions].argsort(kind="stable")], split.have.cumsum()[:-1])
    members = [by_class[k] for k in own]
    train = int(info.class_counts.max()) + cfg.val_per_class if cfg.shift_order == "label" else None
    return draw_test_sets(cfg, ImagesByClass(own, order.argsort()[own], members, split.largest(), train), source)


def class_order(cfg: CfgNode, info: DataInfo) -> np.ndarray:
    """Classes, those first that training has most images of, [C]."""
    counts = info.class_counts.numpy()
    if cfg.shift_order == "label":
        return np.arange(len(counts))
    if cfg.shift_order == "counts":
        return (-counts).argsort(kind="stable")
    # The published order comes from counts in the order of the lists' own labels, which decides between equal ones.
    own = _list_order(cfg, len(counts))
    return own[introsort_argsort(counts[own].tolist())[::-1]]


def _list_order(cfg: CfgNode, num_classes: int) -> np.ndarray:
    """Classes in the order of the labels of published lists, [C]."""
    new_label = _new_labels(cfg) if cfg.shift_order == "published" else None
    own = np.arange(num_classes) if new_label is None else new_label
    if sorted(own) != list(range(num_classes)):
        raise UserError(f"shift_order published: label_field {cfg.label_field} merges classes; set shift_order counts")
    return own


class _TestSplit:
    """The test split that test sets are chosen from.

    Args:
        labels: [N].
    """

    def __init__(self, cfg: CfgNode, labels: np.ndarray, num_classes: int) -> None:
        self.cfg, self.labels = cfg, labels
        self.have = np.bincount(labels, minlength=num_classes)  # [C]
        self.cut = cfg.max_test_images == len(labels)
        self.missing: list[str] = []
        """Lists that could have said which images."""

    def largest(self) -> float:
        """Images of the largest class of a long-tailed test set.

        A split that is cut short keeps about the same share of every class, and a smaller class the same shape.
        """
        mean = max(len(self.labels) / len(self.have), 1.0)
        if self.cfg.shift_max is not None:
            return min(self.cfg.shift_max, mean) if self.cut else self.cfg.shift_max
        return mean if self.cut or self.cfg.shift_order == "label" else int(self.have[self.have > 0].min())

    def choose(self, name: str, wanted: np.ndarray) -> tuple[np.ndarray, str]:
        """Positions of so many images of each class, and where the choice comes from."""
        cfg, missing = self.cfg, ""
        if (wanted >= self.have).all():
            return np.arange(len(self.labels)), "all test images"
        if cfg.shift_files and cfg.test_list:
            file = cfg.shift_files.replace("{name}", name)
            if path := first_file(file, list_folders(cfg)):
                return self.listed(path, wanted), f"{'published list' if is_published(path) else 'list'} {path.name}"
            self.missing.append(file)
            missing = f", without the list {file}"
        counts, by_label = np.minimum(wanted, self.have), cfg.shift_order == "label"
        # The published subsets of CIFAR share their images; otherwise every test set is a draw of its own.
        seed = cfg.shift_seed if by_label else mix(cfg.shift_seed, "shift", name)
        positions = subsample(self.labels, counts.tolist(), seed)
        if by_label and cfg.shift_seed == 0 and (counts == wanted).all() and not self.cut:
            return positions, "the published construction"
        return positions, f"drawn with seed {cfg.shift_seed}{missing}"

    def in_order(self) -> tuple[np.ndarray, str]:
        """All positions in the order that Dirichlet draws shuffle, and where those come from."""
        cfg, positions = self.cfg, np.arange(len(self.labels))
        file = (cfg.dirichlet_list or cfg.test_list) if cfg.dataset == "ImageList" else None
        path = first_file(file, list_folders(cfg)) if file else None
        if cfg.dirichlet_list and path:
            positions = self.listed(path, self.have)
        elif cfg.dirichlet_list:
            self.missing.append(cfg.dirichlet_list)
        return positions, origin(cfg, path, whole=not self.cut and len(set(self.have.tolist())) == 1)

    def listed(self, path: Path, wanted: np.ndarray) -> np.ndarray:
        """Positions of a list file's images, after a check that it is what it should be."""
        listing = _relabelled(self.cfg, path)
        positions = listing.positions_in(self.whole)
        counts = np.bincount(listing.labels, minlength=len(wanted))
        if not self.cut and (wrong := np.flatnonzero(counts != wanted)).size:
            k = wrong[0]
            raise UserError(
                f"{path} has {counts[k]} images of label {k}, the class counts and shift_… options say {wanted[k]}; "
                "with other training data than the published set `shift_files none`"
            )
        kept = some_positions(len(self.whole.paths), self.cfg.max_test_images)
        return kept.searchsorted(positions[np.isin(positions, kept)])

    @cached_property
    def whole(self) -> Listing:
        """The test list, of which the split is the part that `max_test_images` keeps."""
        whole = _relabelled(self.cfg, find_list(self.cfg.test_list, list_folders(self.cfg)))
        kept = some_positions(len(whole.paths), self.cfg.max_test_images)
        if not np.array_equal(whole.labels[kept], self.labels):
            raise UserError(f"{whole.file} is not the list of the evaluated images: start over with `resume False`")
        return whole


def _notes(wanted: np.ndarray, have: np.ndarray, counts: np.ndarray) -> list[str]:
    """What is particular about a test set."""
    numbers = {
        "classes with fewer images than asked for": int((wanted > have).sum()),
        "classes without an image": int((counts == 0).sum()),
    }
    return [f"{what}: {number}" for what, number in numbers.items() if number]


def _relabelled(cfg: CfgNode, file: Path) -> Listing:
    """A list file with labels as they are used here."""
    listing, new_label = read_list(file), _new_labels(cfg)
    return listing if new_label is None else listing.relabel(new_label)


def _new_labels(cfg: CfgNode) -> np.ndarray | None:
    """Label in the list files → label here, where these differ."""
    if cfg.label_field in ("", "id"):
        return None
    return taxon_labels(find_list(CATEGORIES, list_folders(cfg)), cfg.label_field)[0]
