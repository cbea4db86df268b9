"""Checkpoints of RIDE, SADE and BatchFormer's version of RIDE, whose networks are our ResNets under other names."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models.heads.classifiers import CosineClassifier
from tailtune.models.heads.expert_heads import heads_of
from tailtune.trainers.foreign_checkpoints.checkpoint_file import BACKBONE, ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.class_numbering import ID, Numbering
from tailtune.trainers.methods import Method
from tailtune.trainers.storage.checkpoint import check_fit

NAMES = (
    (r"layer(\d)s\.(\d+)\.", r"model.encoder.net.branches.\2.layer\1."),
    (r"linears\.(\d+)\.", r"model.head.\1."),
    (r"linear\.", "model.head."),
    (r"expert_help_pred_hidden_fcs\.", "hidden."),
    (r"expert_help_pred_fc\.", "output."),
    (r"", "model.encoder.net."),
)
"""How a name begins below `backbone.` → ours; the first that fits counts."""
ASKS = "expert_help_pred_"
LEFT_OUT = {
    "encoder_layers.": "its encoder across the batch, which is for training only, is left out",
    ASKS: "its expert assignment is left out, so all experts are asked (method ride_ea uses it)",
}
HEAD = "model.head."
SCALE = 30
"""The original's factor on cosine logits; no file says it."""


def is_ride(file: ForeignCheckpoint) -> bool:
    return any(name.startswith(BACKBONE) for name in file.tensors)


@torch.no_grad()
def load(file: ForeignCheckpoint, method: Method, numbering: Numbering | None = None) -> str:
    """Fill a method's model from a file, strictly; returns a report in words.

    Args:
        numbering: of iNaturalist's classes in the data; the file has their category ids.

    Raises:
        UserError: everything that is missing, unexpected or of another shape, by name; another kind of head.
    """
    state = {name.removeprefix(BACKBONE): each for name, each in file.tensors.items()}
    notes: list[str] = []
    for prefix, note in LEFT_OUT.items():
        kept = {name: each for name, each in state.items() if not name.startswith(prefix)}
        if len(kept) < len(state) and not (prefix == ASKS and not method.asks_every_expert):
            state, notes = kept, [*notes, note]
    tensors, own = dict(_renamed(state)), dict(_own(method))
    remedy = "give the backbone, num_experts, expert_split, reduce_dimension, classifier and data of that training"
    check_fit(own, tensors, str(file.path), remedy)
    cosine, heads = _is_cosine(state), heads_of(method.model.head)
    if cosine != isinstance(heads[0], CosineClassifier):
        wanted = "CosineClassifier with scale 30" if cosine else "LinearClassifier"
        raise UserError(f"{file.path} has heads of another kind; give classifier {wanted}")
    order = numbering.order(ID) if numbering else None
    for name, target in own.items():
        target.copy_(tensors[name] if order is None or not name.startswith(HEAD) else tensors[name][order])
    if numbering and order is not None:
        notes.append(numbering.said(ID))
    method.model.set_precision()  # anew, because it derives from weights that may have changed
    if cosine and heads[0].scale != SCALE:
        notes.append(f"its cosine logits are times {heads[0].scale:g} (scale), and {SCALE} in the original")
    mean, std = ([round(each, 4) for each in own.flatten().tolist()] for own in (method.model.mean, method.model.std))
    notes.append(f"pixels are normalised by mean {mean} and std {std}; was it others, set pixel_mean and pixel_std")
    return "; ".join([f"read {file.path}: {len(tensors)} tensors, heads: {len(heads)}", *notes])


def our_name(name: str) -> str:
    """Of a tensor below the original's `backbone.`."""
    return next(re.sub(f"^{old}", new, name, count=1) for old, new in NAMES if re.match(old, name))


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Cosine heads are [D, C] there."""
    cosine = _is_cosine(state)
    for name, each in state.items():
        yield our_name(name), each.T if cosine and name.startswith("linear") and each.ndim == 2 else each


def _is_cosine(state: Mapping[str, Tensor]) -> bool:
    return not any(name.startswith("linear") and name.endswith(".bias") for name in state)


def _own(method: Method) -> Iterator[tuple[str, Tensor]]:
    """What a file has to hold: the model, and what decides about experts."""
    yield from ((f"model.{name}", each) for name, each in method.model.state_dict().items())
    if not method.asks_every_expert:
        for part in ("hidden", "output"):
            yield from method.get_submodule(part).state_dict(prefix=f"{part}.").items()
