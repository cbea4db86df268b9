"""Test sets with class frequencies drawn from Dirichlet distributions: the evaluation of DirMixE (Yang et al. 2024).

A mixture of three components (uniform, forward, backward) is used, as in the published scripts. Of each component a few
test sets are drawn. All draws come one after another from one generator, NumPy's legacy one, so that the images are the
published ones, too. Each draw of a test set follows a draw of the images that weights are learnt from. For CIFAR the
original code draws training images before both; here this draw is repeated and its images are discarded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from tailtune.configs.errors import UserError, printable
from tailtune.datasets.long_tail import longtail_counts
from tailtune.datasets.sources.published_lists import is_published
from tailtune.datasets.test_distributions.options import DirichletOptions
from tailtune.datasets.test_distributions.settings import DistributionSettings

DIRICHLET = "dirichlet"
COMPONENTS = ("uniform", "forward", "backward")
LEARN: Mapping[str, str] = MappingProxyType(
    {
        "independent": "",
        "equal": ", weights are learnt from the same images",
        "disjoint": ", one half of each class, weights are learnt from the other half",
    }
)
"""Value of the option `dirichlet_learn` → what is added to the origin of a test set."""
PUBLISHED_TRIALS = 3
PUBLISHED_CIFAR = (100.0, None, 1)
"""Settings of the published scripts for CIFAR: ratio, concentration (None: images of the largest class), and smallest
number of images of a class."""
PUBLISHED_LISTS: Mapping[str, tuple[float, float, int]] = MappingProxyType(
    {"ImageNet_LT_uniform.txt": (50.0, 1e4, 1), "iNaturalist18_val.txt": (3.0, 1e5, 0)}
)
"""List file → the settings of its published script, as for CIFAR. The largest class has `ratio` images there."""


class DrawnTestSet(NamedTuple):
    """The images of a test distribution."""

    wanted: np.ndarray
    """Images of each class that the distribution asks for, int64 [C]. The split may have fewer."""
    positions: np.ndarray
    """Positions of the chosen images in the test split, int64 [n]."""
    origin: str
    """How the images were chosen, for reports."""
    learn_positions: np.ndarray | None = None
    """Images that weights are learnt from, as `positions`; None: the same images."""


@dataclass(frozen=True)
class ImagesByClass:
    """The images that test sets are drawn from. Random numbers are drawn for the classes in the order given here."""

    classes: np.ndarray
    """Class indices, int64 [C]."""
    ranks: np.ndarray
    """Rank of each class by its training images, from 0 for the most frequent one, int64 [C]."""
    positions: Sequence[np.ndarray]
    """Positions of the test images of each class, C arrays."""
    largest_class: float
    """Images of the largest class of a test set."""
    train_images: int | None
    """Training images of every class before subsampling, if training images are drawn first."""


def dirichlet_names(name: str, trials: int) -> list[str]:
    """The test sets that a name in `test_dists` stands for.

    Args:
        name: `dirichlet` for all, `dirichlet-<component>`, or one draw such as `dirichlet-forward2`.
        trials: draws of each component.

    Raises:
        UserError: another name.
    """
    all_names = [f"{DIRICHLET}-{component}{k}" for component in COMPONENTS for k in range(1, trials + 1)]
    names = [full_name for full_name in all_names if name in (DIRICHLET, full_name, _without_number(full_name))]
    if not names:
        choices = f"{DIRICHLET}, {', '.join(dict.fromkeys(map(_without_number, all_names)))}"
        raise UserError(
            f"test_dists: unknown distribution '{printable(name)}'; choices: {choices}, or one draw such as "
            f"{all_names[-1]} (dirichlet_trials {trials})"
        )
    return names


def component_of(name: str) -> str | None:
    """The component of a Dirichlet test set; None for any other test distribution.

    Args:
        name: name of the test distribution, such as `dirichlet-forward2` (component `forward`).
    """
    return _without_number(name).removeprefix(f"{DIRICHLET}-") if name.startswith(f"{DIRICHLET}-") else None


def check_dirichlet(options: DirichletOptions, may_have_lists: bool) -> None:
    """Check options that do not depend on the images.

    Args:
        options: the options.
        may_have_lists: whether the test images may be those of a list.

    Raises:
        UserError: the concentration is not positive, or a list file is given for data without lists.
    """
    if options.concentration is not None and options.concentration <= 0:
        raise UserError(f"dirichlet_concentration {options.concentration:g} must be above 0, for example 10000")
    if options.list and not may_have_lists:
        raise UserError(
            f"dirichlet_list {options.list}: it needs dataset ImageList, or Shards with test_list; set it to none"
        )


def draw_test_sets(options: DirichletOptions, seed: int, images: ImagesByClass, origin: str) -> dict[str, DrawnTestSet]:
    """Draw the test sets of all components.

    Args:
        options: the options.
        seed: the option `shift_seed`.
        images: the images to draw from.
        origin: how the images are chosen, for reports.

    Returns:
        Name → test set, in the order of the draws. Each draw depends on the earlier ones.

    Raises:
        UserError: the concentration is too small to draw class frequencies.
    """
    random = np.random.RandomState(seed % 2**32)
    test_sets: dict[str, DrawnTestSet] = {}
    for name in dirichlet_names(DIRICHLET, options.trials):
        if images.train_images is not None:
            train_positions = [np.arange(images.train_images)] * len(images.classes)
            counts = draw_counts(random, *_count_arguments(options, name, images, images.train_images))
            draw_images(random, counts, train_positions)
        draws = []
        for _ in ("to learn from", "to evaluate"):
            counts = draw_counts(random, *_count_arguments(options, name, images, images.largest_class))
            draws.append(draw_images(random, counts, images.positions))
        wanted = np.zeros(len(images.classes), dtype=np.int64)
        wanted[images.classes] = counts
        positions, learn_positions = _divide(options.learn, *draws)
        test_sets[name] = DrawnTestSet(wanted, positions, origin + LEARN[options.learn], learn_positions)
    return test_sets


def describe_origin(options: DistributionSettings, path: Path | None, is_whole: bool) -> str:
    """How the images of the draws are chosen, for reports.

    Args:
        options: the options.
        path: the list file in whose order images are shuffled, if there is one.
        is_whole: the test split is balanced and not cut by `max_test_images`.

    Returns:
        "the published construction" if everything is as in the published scripts, else a text with the seed.
    """
    dirichlet = options.dirichlet
    settings = dirichlet.ratio, dirichlet.concentration, dirichlet.least
    if options.shift_order == "label":
        is_published_setting = settings == PUBLISHED_CIFAR and options.shift_max is None
    else:
        same_order = path is not None and options.shift_order == "published" and is_published(path)
        same_size = options.shift_max in (None, dirichlet.ratio)
        is_published_setting = (
            path is not None and same_order and same_size and settings == PUBLISHED_LISTS.get(path.name)
        )
    same_draws = dirichlet.trials == PUBLISHED_TRIALS and options.shift_seed == 0
    if is_published_setting and is_whole and same_draws:
        return "the published construction"
    note = f", without the list {dirichlet.list}" if dirichlet.list and path is None else ""
    return f"drawn with seed {options.shift_seed}{note}"


def draw_counts(
    random: np.random.RandomState, base: Sequence[int], largest: float, concentration: float, least: int
) -> list[int]:
    """Draw the number of images of each class.

    q ~ Dir(S · r / Σ r) with r_c = base_c · (1 + 0.1 · (U − 0.5)), U uniform on [0, 1); count_c = ⌊q_c / max q · m⌋.
    The floating-point operations have the order of the original code, because the results are rounded down. The
    original bounds r from below only for ImageNet and iNaturalist, but for CIFAR r is never that small.

    Args:
        random: the generator.
        base: class counts before the draw, [C].
        largest: images of the largest class m.
        concentration: sum of the parameters of the Dirichlet distribution S.
        least: smallest number of images of a class.

    Returns:
        Images per class, [C].

    Raises:
        UserError: the concentration is so small that all drawn numbers are 0.
    """
    rates = [max(count + (random.random_sample() - 0.5) * 0.1 * count, 1e-7) for count in base]
    total = sum(rates)
    shares = random.dirichlet([rate * concentration / total for rate in rates])
    top = max(shares)
    if not top > 0:  # every number of the underlying gamma distributions is too small for a float
        raise UserError(f"dirichlet_concentration {concentration:g} is too small for {len(base)} classes; set it to 1")
    return [max(int(share / top * largest), least) for share in shares]


def draw_images(
    random: np.random.RandomState, counts: Sequence[int], positions: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Draw images of each class.

    Args:
        random: the generator.
        counts: images to draw of each class, [C]; a class that has fewer gives all of them.
        positions: positions of the images of each class, C arrays.

    Returns:
        The drawn positions of each class, C arrays.
    """
    drawn = []
    for count, class_positions in zip(counts, positions, strict=True):
        shuffled = class_positions.copy()
        random.shuffle(shuffled)
        drawn.append(shuffled[:count])
    return drawn


def _count_arguments(
    options: DirichletOptions, name: str, images: ImagesByClass, largest: float
) -> tuple[list[int], float, float, int]:
    """Arguments of `draw_counts` after the generator."""
    component = component_of(name)
    by_rank = longtail_counts(largest, len(images.ranks), 1.0 if component == "uniform" else 1 / options.ratio)
    base = np.array(by_rank[::-1] if component == "backward" else by_rank)[images.ranks].tolist()
    concentration = largest if options.concentration is None else options.concentration
    return base, largest, concentration, options.least


def _divide(learn: str, first: list[np.ndarray], second: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions to evaluate and to learn from, made of the two draws of a trial; None: the same."""
    if learn == "equal":
        return np.concatenate(second), None
    if learn == "independent":
        return np.concatenate(second), np.concatenate(first)
    halves = [(drawn[: -(-len(drawn) // 2)], drawn[-(-len(drawn) // 2) :]) for drawn in second]
    evaluated, learnt_from = zip(*halves, strict=True)
    return np.concatenate(evaluated), np.concatenate(learnt_from)


def _without_number(name: str) -> str:
    """A name without the number of its draw."""
    return name.rstrip("0123456789")
