"""Options that choose method, loss and sampler. Options of one entry are declared in its own file or its imports."""

from dataclasses import dataclass

from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_int, as_str


@dataclass(frozen=True)
class MethodOptions:
    """The choice of method, loss, sampler and initial weights."""

    method: str = option(
        "classify", "Training method: how the loss is made of the experts' logits.", table="METHODS", zero_shot=False
    )
    after: str | None = option(
        None,
        "Model config of an earlier run, which is finished first and which this run starts from. None means no such "
        "run.",
        as_str,
        zero_shot=False,
    )
    loss_type: str = option("LA", "Loss that training minimises.", table="LOSSES")
    drw_epoch: int | None = option(
        None,
        "Epoch (the first is 0) from which on the loss weights classes by their effective number of images. None means "
        "never.",
        as_int,
        least=0,
        most=10**6,
    )
    sampler: str = option("shuffle", "Which training images make up an epoch.", table="SAMPLERS")
    pair_sampler: str | None = option(
        None,
        "How a second training image is chosen beside each one, for methods h2t and glmc. None means that there is "
        "none.",
        as_str,
        table="SAMPLERS",
        zero_shot=False,
    )
