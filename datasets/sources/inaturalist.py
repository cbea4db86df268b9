"""iNaturalist 2018: the labels and class names that follow from its taxonomy, and the statistics of its pixels."""

from pathlib import Path

import numpy as np

from tailtune.configs.errors import UserError, lookup
from tailtune.datasets.sources.text_files import read_json

MEAN, STD = (0.466, 0.471, 0.380), (0.195, 0.194, 0.192)
TAXA = ("name", "genus", "family", "order", "class", "phylum", "kingdom")
"""Ranks of its taxonomy; `name` is the species."""
CATEGORIES = "categories.json"
"""The file that describes its categories."""


def taxon_labels(categories: Path, label_field: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and class names of iNaturalist 2018 on one rank of its taxonomy.

    The field `id` keeps the category ids as labels, with the names of the species. For a taxon, the label is the rank
    of its name among the sorted different names, as in LIFT. So species of the same name become one class, and "NA" is
    a class.

    Args:
        categories: categories.json of the data set, a list of records.
        label_field: `id` or an entry of `TAXA`.

    Returns:
        Label of each category id, int64 [ids]; and C class names.

    Raises:
        UserError: an unknown field, or the file has other content.
    """
    field = "name" if label_field == "id" else lookup({taxon: taxon for taxon in TAXA}, label_field, "label_field")
    try:
        records = sorted(read_json(categories, "label_field"), key=lambda record: record["id"])
        values = [str(record[field]) for record in records]
        ids = [record["id"] for record in records]
    except (TypeError, KeyError) as error:
        raise UserError(
            f"{categories}: expected the records of iNaturalist 2018 with 'id' and '{field}'; download the file again"
        ) from error
    if not records:
        raise UserError(f"{categories} lists no category; download iNaturalist 2018's file")
    if ids != list(range(len(ids))):
        raise UserError(f"{categories}: the ids are not 0 … {len(ids) - 1}; download iNaturalist 2018's file")
    if label_field == "id":
        return np.arange(len(ids)), tuple(values)
    names = sorted(set(values))
    rank = {name: label for label, name in enumerate(names)}
    return np.array([rank[value] for value in values], dtype=np.int64), tuple(names)
