"""Builds the test distributions. All are subsets of the one test split, so its logits are enough to evaluate them."""

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tailtune.datasets.data_bundle import DataInfo, TestDistribution
from tailtune.datasets.sources.published_lists import published_at
from tailtune.datasets.test_distributions.class_order import class_order, published_label_order
from tailtune.datasets.test_distributions.dirichlet import DIRICHLET, DrawnTestSet, ImagesByClass, draw_test_sets
from tailtune.datasets.test_distributions.evaluated_split import EvaluatedSplit, Rows
from tailtune.datasets.test_distributions.frequency_rules import distribution_names, frequency_rule
from tailtune.datasets.test_distributions.settings import DistributionSettings

log = logging.getLogger("tailtune")
WHOLE_TEST_SET = "test"
"""Name of the distribution of all test images, which `adapt` and `target_prior` use if `test_dists` is not set."""


def build_distributions(
    options: DistributionSettings, info: DataInfo, test_labels: Tensor, rows: Rows = lambda: None
) -> tuple[TestDistribution, ...]:
    """The test distributions that the option `test_dists` asks for.

    No image is read, only list files if the data are given by lists.

    Args:
        options: which distributions, and how their images are chosen.
        info: facts about the training data.
        test_labels: labels of the test split, as far as `max_test_images` keeps it, int64 [N].
        rows: as in `EvaluatedSplit`; called only if the images of a distribution are those of a list.

    Returns:
        The distributions in the order of the option; empty if nothing asks for one.

    Raises:
        UserError: as `distribution_names`; or a list file that does not fit the test split or the class frequencies.
    """
    names = distribution_names(options)
    if not names and not options.needs_distribution:
        return ()
    if not names:
        counts = torch.bincount(test_labels, minlength=info.num_classes)
        positions = torch.arange(len(test_labels))
        return (TestDistribution(WHOLE_TEST_SET, counts, positions, "the test images as they are"),)
    split = EvaluatedSplit(options, test_labels.numpy(), info.num_classes, rows)
    order = class_order(options, info)
    has_draws = any(name.startswith(DIRICHLET) for name in names)
    drawn = _dirichlet_test_sets(options, info, split, order) if has_draws else {}
    test_sets = {name: drawn[name] if name in drawn else _by_rule(options, name, split, order) for name in names}
    _log_missing_lists(split)
    return tuple(_distribution(name, test_set, split) for name, test_set in test_sets.items())


def _by_rule(options: DistributionSettings, name: str, split: EvaluatedSplit, order: np.ndarray) -> DrawnTestSet:
    """The test set of a frequency rule, such as `forward50`."""
    wanted = np.zeros(len(order), dtype=np.int64)
    wanted[order] = frequency_rule(name, options.shift_factors)(split.largest_class(), len(order))
    return DrawnTestSet(wanted, *split.choose(name, wanted))


def _dirichlet_test_sets(
    options: DistributionSettings, info: DataInfo, split: EvaluatedSplit, order: np.ndarray
) -> dict[str, DrawnTestSet]:
    """All Dirichlet test sets by name. Random numbers are drawn for the classes in the label order of the lists."""
    classes = published_label_order(options, len(order))
    positions, origin = split.dirichlet_order()
    by_label = positions[split.labels[positions].argsort(kind="stable")]
    images_by_label = np.split(by_label, split.counts.cumsum()[:-1])
    draws_training_images = options.shift_order == "label"
    images = ImagesByClass(
        classes=classes,
        ranks=order.argsort()[classes],
        positions=[images_by_label[label] for label in classes],
        largest_class=split.largest_class(),
        train_images=int(info.natural_counts.max()) + options.val_per_class if draws_training_images else None,
    )
    return draw_test_sets(options.dirichlet, options.shift_seed, images, origin)


def _distribution(name: str, test_set: DrawnTestSet, split: EvaluatedSplit) -> TestDistribution:
    """A test set in the form that evaluations use, with notes about classes that have too few images."""
    counts = np.bincount(split.labels[test_set.positions], minlength=len(split.counts))
    notes = {
        "classes with fewer images than asked for": int((test_set.wanted > split.counts).sum()),
        "classes without an image": int((counts == 0).sum()),
    }
    learn = test_set.learn_positions
    return TestDistribution(
        name=name,
        counts=torch.from_numpy(counts),
        positions=torch.from_numpy(test_set.positions),
        origin="; ".join([test_set.origin, *(f"{note}: {number}" for note, number in notes.items() if number)]),
        learn_positions=None if learn is None else torch.from_numpy(learn),
    )


def _log_missing_lists(split: EvaluatedSplit) -> None:
    if split.missing_lists:
        number, first = len(split.missing_lists), split.missing_lists[0]
        log.info(
            "test_dists: images are drawn at random because list files are missing (%d): %s %s",
            number,
            first,
            published_at(Path(first).name),
        )
