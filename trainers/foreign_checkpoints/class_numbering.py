"""Which class is which in other people's checkpoints for iNaturalist, whose species everybody numbers otherwise.

RIDE, SADE, BatchFormer and DirMixE keep the category ids of the lists; LIFT and PEL rank the species by name.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_list import CATEGORIES, find_list, taxon_labels

ID, NAME = "id", "name"


@dataclass(frozen=True)
class Numbering:
    """How the data at hand number the species of iNaturalist.

    Args:
        field: the option `label_field`.
        folders: where categories.json may lie.
    """

    field: str
    folders: Sequence[Path]

    def order(self, theirs: str) -> Tensor | None:
        """Label there of each label here, int64 [C]; None where they are the same.

        Args:
            theirs: the `label_field` that a checkpoint was trained with.

        Raises:
            UserError: no categories.json, or one class of the one is several of the other.
        """
        if theirs == self.field:
            return None
        file = find_list(CATEGORIES, self.folders)
        (here, names), (there, others) = (taxon_labels(file, field) for field in (self.field, theirs))
        if not len(set(zip(here.tolist(), there.tolist(), strict=True))) == len(names) == len(others):
            raise UserError(
                f"label_field {self.field} joins species that the checkpoint tells apart, because it was trained on "
                f"their {theirs}; give `label_field {theirs}`"
            )
        order = torch.empty(len(names), dtype=torch.int64)
        order[torch.from_numpy(here)] = torch.from_numpy(there)
        return order

    def said(self, theirs: str) -> str:
        """What was done, for the report."""
        by = "category id" if theirs == ID else theirs
        return f"its classes, numbered by {by}, are put into the order of label_field {self.field}"
