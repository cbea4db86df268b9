"""Loads checkpoints of RIDE, SADE and BatchFormer. Their networks are TailTune's ResNets with other parameter names."""

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
"""Pattern for the beginning of a name, without `backbone.` → the replacement. The first matching pattern is used."""
EXPERT_ASSIGNMENT = "expert_help_pred_"
"""Prefix of the names of tensors of RIDE's expert assignment."""
LEFT_OUT = {
    "encoder_layers.": "its encoder across the batch, which is for training only, is left out",
    EXPERT_ASSIGNMENT: "its expert assignment is left out, so all experts are asked (method ride_ea uses it)",
}
"""Prefix of the names of tensors that may be left out → note for the report."""
HEAD = "model.head."
SCALE = 30
"""Scale of RIDE's cosine logits. RIDE's checkpoints do not contain it."""


def is_ride(file: ForeignCheckpoint) -> bool:
    """Whether a file is a checkpoint of RIDE, SADE or BatchFormer."""
    return any(name.startswith(BACKBONE) for name in file.tensors)


@torch.no_grad()
def load(file: ForeignCheckpoint, method: Method, numbering: Numbering | None = None) -> str:
    """Load a file into a method. Every tensor must have the right name and shape.

    Args:
        file: the file.
        method: the method to fill.
        numbering: class numbering of iNaturalist in the data. These projects use the category ids.

    Returns:
        A report in words.

    Raises:
        UserError: names the tensors that are missing, unexpected or of another shape; or the head is of another kind.
    """
    state = {name.removeprefix(BACKBONE): tensor for name, tensor in file.tensors.items()}
    notes: list[str] = []
    for prefix, note in LEFT_OUT.items():
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
        if len(kept) < len(state) and not (prefix == EXPERT_ASSIGNMENT and not method.asks_every_expert):
            state, notes = kept, [*notes, note]
    tensors, current = dict(_renamed(state)), dict(_tensors_to_fill(method))
    remedy = "give the backbone, num_experts, expert_split, reduce_dimension, classifier and data of that training"
    check_fit(current, tensors, str(file.path), remedy)
    cosine, heads = _is_cosine(state), heads_of(method.model.head)
    if cosine != isinstance(heads[0], CosineClassifier):
        wanted = "CosineClassifier with scale 30" if cosine else "LinearClassifier"
        raise UserError(f"{file.path} has heads of another kind; give classifier {wanted}")
    order = numbering.order(ID) if numbering else None
    for name, target in current.items():
        target.copy_(tensors[name] if order is None or not name.startswith(HEAD) else tensors[name][order])
    if numbering and order is not None:
        notes.append(numbering.report(ID))
    method.model.set_precision()  # again, because some of its tensors are computed from the weights
    if cosine and heads[0].scale != SCALE:
        notes.append(f"its cosine logits are times {heads[0].scale:g} (scale), and {SCALE} in the original")
    model = method.model
    mean, std = ([round(value, 4) for value in stats.flatten().tolist()] for stats in (model.mean, model.std))
    notes.append(
        f"pixels are normalised by mean {mean} and std {std}; if the training used others, set pixel_mean and pixel_std"
    )
    return "; ".join([f"read {file.path}: {len(tensors)} tensors, heads: {len(heads)}", *notes])


def our_name(name: str) -> str:
    """TailTune's name of the tensor that RIDE calls `backbone.<name>`."""
    return next(re.sub(f"^{old}", new, name, count=1) for old, new in NAMES if re.match(old, name))


def _renamed(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Pairs of TailTune's name and tensor of a file. RIDE stores the weight of a cosine head as [D, C]."""
    cosine = _is_cosine(state)
    for name, tensor in state.items():
        transposed = cosine and name.startswith("linear") and tensor.ndim == 2
        yield our_name(name), tensor.T if transposed else tensor


def _is_cosine(state: Mapping[str, Tensor]) -> bool:
    """Whether the heads of a file are cosine classifiers, which have no bias."""
    return not any(name.startswith("linear") and name.endswith(".bias") for name in state)


def _tensors_to_fill(method: Method) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a file has to contain: those of the model and of the layers of the expert assignment."""
    yield from ((f"model.{name}", tensor) for name, tensor in method.model.state_dict().items())
    if not method.asks_every_expert:
        for layer in ("hidden", "output"):
            yield from method.get_submodule(layer).state_dict(prefix=f"{layer}.").items()
