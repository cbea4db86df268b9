"""The order of the classes in test distributions, and the labels of published lists."""

from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError
from tailtune.datasets.data_bundle import DataInfo
from tailtune.datasets.sources.image_list import find_list, read_list
from tailtune.datasets.sources.inaturalist import CATEGORIES, taxon_labels
from tailtune.datasets.sources.listing import Listing
from tailtune.datasets.test_distributions.published_order import introsort_argsort
from tailtune.datasets.test_distributions.settings import DistributionSettings


def class_order(options: DistributionSettings, info: DataInfo) -> np.ndarray:
    """The classes in descending order of their training images, as the option `shift_order` breaks ties.

    Args:
        options: the options; `shift_order label` takes the order of the labels instead.
        info: facts about the training data.

    Returns:
        Class indices, int64 [C].

    Raises:
        UserError: as `published_label_order`.
    """
    counts = info.natural_counts.numpy()
    if options.shift_order == "label":
        return np.arange(len(counts))
    if options.shift_order == "counts":
        return (-counts).argsort(kind="stable")
    # The published order of classes with equal counts depends on the order in which the lists number the classes.
    label_order = published_label_order(options, len(counts))
    return label_order[introsort_argsort(counts[label_order].tolist())[::-1]]


def published_label_order(options: DistributionSettings, num_classes: int) -> np.ndarray:
    """The classes in the order of the labels that published lists give them.

    Args:
        options: the options; the order differs from 0 … C − 1 only for `shift_order published`.
        num_classes: number of classes C.

    Returns:
        Class indices, int64 [C].

    Raises:
        UserError: `label_field` merges classes of the lists.
    """
    new_label = _new_labels(options) if options.shift_order == "published" else None
    order = np.arange(num_classes) if new_label is None else new_label
    if sorted(order) != list(range(num_classes)):
        raise UserError(
            f"shift_order published: label_field {options.label_field} merges classes; set shift_order counts"
        )
    return order


def read_relabelled(options: DistributionSettings, file: Path) -> Listing:
    """Read a list file of test images, with its labels converted to the classes of the run.

    Args:
        options: the options; `label_field` decides the conversion.
        file: the list file.

    Raises:
        UserError: as `read_list`; or a label that the data do not have.
    """
    listing, new_label = read_list(file), _new_labels(options)
    return listing if new_label is None else listing.relabel(new_label)


def _new_labels(options: DistributionSettings) -> np.ndarray | None:
    """Label in the list files → class of the run, int64; None if they are the same."""
    if options.label_field in ("", "id"):
        return None
    return taxon_labels(find_list(CATEGORIES, options.folders.for_lists()), options.label_field)[0]
