"""Which class is which in checkpoints of other projects for iNaturalist, whose species they number differently.

RIDE, SADE, BatchFormer and DirMixE keep the category ids of the lists; LIFT and PEL rank the species by name.
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
    """How the data at hand number the species of iNaturalist.

    Args:
        field: the option `label_field`.
        folders: folders in which categories.json may be.
    """

    field: str
    folders: Sequence[Path]

    def order(self, theirs: str) -> Tensor | None:
        """The order of a checkpoint's classes.

        Args:
            theirs: the `label_field` with which the checkpoint was trained.

        Returns:
            For each label of the data the label of the checkpoint, int64 [C]; None if they are the same.

        Raises:
            UserError: there is no categories.json, or one class of the one corresponds to several of the other.
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
        """A sentence about the reordering, for the report of a checkpoint with `label_field` `theirs`."""
        by = "category id" if theirs == ID else theirs
        return f"its classes, numbered by {by}, are put into the order of label_field {self.field}"
