"""Test sets of drawn class frequencies: the evaluation of DirMixE (Yang et al. 2024), as its published scripts do it.

Of each component of a mixture of Dirichlet distributions (uniform, forward and backward, as in shifts.py) a few test
sets are drawn, one after another from one stream of NumPy's legacy numbers, so that the images are the published ones
too. Before each of them comes the draw of the images that weights are learnt from; for CIFAR before both one of the
training images, of which nothing is used but the numbers that it takes from the stream.
Like entries.py this file is part of the builder and sees the config.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from yacs.config import CfgNode

from tailtune.configs.errors import UserError, shown
from tailtune.datasets.long_tail import longtail_counts
from tailtune.datasets.sources.published_lists import is_published

DIRICHLET = "dirichlet"
COMPONENTS = ("uniform", "forward", "backward")
LEARN: Mapping[str, str] = MappingProxyType(
    {
        "independent": "",
        "equal": ", itself being to learn from",
        "disjoint": ", half of each class, the other half being to learn from",
    }
)
"""What weights are learnt from → what it adds to the origin of a test set."""
TRIALS = 3
CIFAR = (100.0, None, 1)
LISTS: Mapping[str, tuple[float, float, int]] = MappingProxyType(
    {"ImageNet_LT_uniform.txt": (50.0, 1e4, 1), "iNaturalist18_val.txt": (3.0, 1e5, 0)}
)
"""The published settings: ratio, concentration (None: images of the largest class), fewest images of a class. In the
lists the largest class has as many images as the ratio."""


class Drawn(NamedTuple):
    """A test set."""

    wanted: np.ndarray
    """Images of each class that the draw asks for, int64 [C]."""
    positions: np.ndarray
    origin: str
    learn: np.ndarray | None = None
    """Images that weights are learnt from; None: the same."""


@dataclass(frozen=True)
class ImagesByClass:
    """What test sets are drawn from. Its classes stand in the order in which numbers are taken for them."""

    labels: np.ndarray
    """[C]."""
    places: np.ndarray
    """Of each class in the order by training images, the most frequent being 0, [C]."""
    members: Sequence[np.ndarray]
    """Positions of the images of each class."""
    largest: float
    """Images of the largest class of a test set."""
    train_images: int | None
    """Training images of every class before subsampling, where a draw of them comes first."""


def dirichlet_names(name: str, trials: int) -> list[str]:
    """The test sets that a name stands for: all, those of a component, or one.

    Raises:
        UserError: none.
    """
    every = [f"{DIRICHLET}-{component}{k}" for component in COMPONENTS for k in range(1, trials + 1)]
    found = [each for each in every if name in (DIRICHLET, each, _component(each))]
    if not found:
        forms = f"{DIRICHLET}, {', '.join(dict.fromkeys(map(_component, every)))}"
        raise UserError(
            f"test_dists: unknown distribution '{shown(name)}'; choices: {forms}, or one draw such as {every[-1]} "
            f"(dirichlet_trials {trials})"
        )
    return found


def component(name: str) -> str | None:
    """Component of a test set's name; None for a test set of another kind."""
    return _component(name).removeprefix(f"{DIRICHLET}-") if name.startswith(f"{DIRICHLET}-") else None


def check_dirichlet(cfg: CfgNode) -> None:
    """Refuse options that do not fit, without images."""
    if cfg.dirichlet_concentration is not None and cfg.dirichlet_concentration <= 0:
        raise UserError(f"dirichlet_concentration {cfg.dirichlet_concentration:g}: it has to be above 0, such as 10000")
    if cfg.dirichlet_list and cfg.dataset != "ImageList":
        raise UserError(f"dirichlet_list {cfg.dirichlet_list}: it is for dataset ImageList; set it to none")


def draw_test_sets(cfg: CfgNode, pool: ImagesByClass, source: str) -> dict[str, Drawn]:
    """All test sets by name, in the order of the draws, of which each depends on those before.

    Args:
        source: where they come from, for people.
    """
    stream = np.random.RandomState(cfg.shift_seed % 2**32)
    sets: dict[str, Drawn] = {}
    for name in dirichlet_names(DIRICHLET, cfg.dirichlet_trials):
        if pool.train_images is not None:
            unused = [np.arange(pool.train_images)] * len(pool.labels)
            choose(stream, draw_counts(stream, *_component_of(cfg, name, pool, pool.train_images)), unused)
        drawn = []
        for _ in ("to learn from", "to evaluate"):
            counts = draw_counts(stream, *_component_of(cfg, name, pool, pool.largest))
            drawn.append(choose(stream, counts, pool.members))
        wanted = np.zeros(len(pool.labels), dtype=np.int64)
        wanted[pool.labels] = counts
        evaluated, learn = _divided(cfg.dirichlet_learn, *drawn)
        sets[name] = Drawn(wanted, evaluated, source + LEARN[cfg.dirichlet_learn], learn)
    return sets


def origin(cfg: CfgNode, path: Path | None, whole: bool) -> str:
    """Where drawn images come from, for people.

    Args:
        path: the list in whose order images are shuffled, where there is one.
        whole: all images of a balanced test split are there.
    """
    setting = cfg.dirichlet_ratio, cfg.dirichlet_concentration, cfg.dirichlet_least
    if cfg.shift_order == "label":
        published = setting == CIFAR and cfg.shift_max is None
    else:
        known = path is not None and cfg.shift_order == "published" and is_published(path)
        sized = cfg.shift_max in (None, cfg.dirichlet_ratio)
        published = path is not None and known and sized and setting == LISTS.get(path.name)
    if published and whole and cfg.dirichlet_trials == TRIALS and cfg.shift_seed == 0:
        return "the published construction"
    missing = f", without the list {cfg.dirichlet_list}" if cfg.dirichlet_list and path is None else ""
    return f"drawn with seed {cfg.shift_seed}{missing}"


def draw_counts(
    stream: np.random.RandomState, base: Sequence[int], largest: float, concentration: float, least: int
) -> list[int]:
    """Images of each class: q ~ Dir(S · r / Σ r) for r_c = base_c · (1 + 0.1 · (U − 0.5)), count_c = q_c / max q · m.

    In the original's order of floating-point operations, since counts are truncated. It bounds r from below only for
    ImageNet and iNaturalist; r of CIFAR is never that small.

    Args:
        base: [C].
        largest: m.
        concentration: S.
        least: images of a class at least.
    """
    rates = [max(each + (stream.random_sample() - 0.5) * 0.1 * each, 1e-7) for each in base]
    total = sum(rates)
    shares = stream.dirichlet([each * concentration / total for each in rates])
    top = max(shares)
    if not top > 0:  # every gamma variate has underflowed
        raise UserError(f"dirichlet_concentration {concentration:g} is too small for {len(base)} classes; set it to 1")
    return [max(int(each / top * largest), least) for each in shares]


def choose(stream: np.random.RandomState, counts: Sequence[int], members: Sequence[np.ndarray]) -> list[np.ndarray]:
    """So many images of each class, as far as it has them, [C] positions."""
    chosen = []
    for count, each in zip(counts, members, strict=True):
        shuffled = each.copy()
        stream.shuffle(shuffled)
        chosen.append(shuffled[:count])
    return chosen


def _component_of(cfg: CfgNode, name: str, pool: ImagesByClass, largest: float) -> tuple[list[int], float, float, int]:
    """Arguments of `draw_counts`."""
    kind = component(name)
    shape = longtail_counts(largest, len(pool.places), 1.0 if kind == "uniform" else 1 / cfg.dirichlet_ratio)
    base = np.array(shape[::-1] if kind == "backward" else shape)[pool.places].tolist()
    concentration = largest if cfg.dirichlet_concentration is None else cfg.dirichlet_concentration
    return base, largest, concentration, cfg.dirichlet_least


def _divided(kind: str, first: list[np.ndarray], second: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions to evaluate and to learn from, of the two draws of a trial."""
    if kind == "equal":
        return np.concatenate(second), None
    if kind == "independent":
        return np.concatenate(second), np.concatenate(first)
    halves = [(each[: -(-len(each) // 2)], each[-(-len(each) // 2) :]) for each in second]
    evaluated, learn = zip(*halves, strict=True)
    return np.concatenate(evaluated), np.concatenate(learn)


def _component(name: str) -> str:
    """A name without the number of its draw."""
    return name.rstrip("0123456789")
