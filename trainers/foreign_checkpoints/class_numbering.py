"""Reorders the classes of iNaturalist, because other projects number its species differently.

RIDE, SADE, BatchFormer and DirMixE use the category ids of the lists. LIFT and PEL sort the species by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_list import find_list
from tailtune.datasets.sources.inaturalist import CATEGORIES, taxon_labels

ID, NAME = "id", "name"


@dataclass(frozen=True)
class Numbering:
    """The class numbering of iNaturalist in the present data.

    Args:
        field: value of the option `label_field`.
        folders: folders that are searched for categories.json.
    """

    field: str
    folders: Sequence[Path]

    def order(self, theirs: str) -> Tensor | None:
        """The label of each class in a checkpoint.

        Args:
            theirs: the value of `label_field` with which the checkpoint was trained.

        Returns:
            For each label of the data, the label in the checkpoint, int64 [C]; None if all labels are the same.

        Raises:
            UserError: categories.json is missing, or a class on one side corresponds to several on the other side.
        """
        if theirs == self.field:
            return None
        file = find_list(CATEGORIES, self.folders)
        our_labels, our_names = taxon_labels(file, self.field)
        their_labels, their_names = taxon_labels(file, theirs)
        pairs = set(zip(our_labels.tolist(), their_labels.tolist(), strict=True))
        if not len(pairs) == len(our_names) == len(their_names):
            raise UserError(
                f"label_field {self.field} joins species that the checkpoint tells apart, because it was trained on "
                f"their {theirs}; give `label_field {theirs}`"
            )
        order = torch.empty(len(our_names), dtype=torch.int64)
        order[torch.from_numpy(our_labels)] = torch.from_numpy(their_labels)
        return order

    def report(self, theirs: str) -> str:
        """A sentence about the reordering, for a checkpoint that was trained with `label_field` equal to `theirs`."""
        by = "category id" if theirs == ID else theirs
        return f"its classes, numbered by {by}, are put into the order of label_field {self.field}"
