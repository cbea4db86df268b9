"""METHODS: name → method. A method is one file here and one line in the table."""

from collections.abc import Callable
from typing import Any

from configs import CfgNode, Declared
from configs.errors import lookup
from datasets.bundle import DataInfo
from models import Classifier
from models.peft_table import draws
from models.tuners import TUNERS
from trainers.losses import BATCH_COUPLED, LOSSES
from trainers.methods.base import Method, Objective

METHODS: dict[str, type[Method]] = {
    "classify": Method,  # zero-shot, head only, PEFT, full fine-tuning: one model, one loss
}


def declared() -> Declared:
    """What the tables say about options: those of methods, and which values couple the images of a batch."""
    coupled: dict[str, Callable[[Any], bool]] = {
        "method": lambda name: name in METHODS and METHODS[name].couples,
        "loss_type": lambda name: name in BATCH_COUPLED,
        "peft_args": draws,
        **{name: bool for name, tuner in TUNERS.items() if tuner.on_batch},
    }
    return Declared({name: method.Options for name, method in METHODS.items()}, coupled)


def build_method(cfg: CfgNode, model: Classifier, info: DataInfo) -> Method:
    """The method of a config around a model."""
    method = lookup(METHODS, cfg.method, "method")
    loss = lookup(LOSSES, cfg.loss_type, "loss_type")
    coupled = cfg.loss_type in BATCH_COUPLED
    objective = Objective(info.class_counts, loss, cfg.tau, cfg.scale, coupled, cfg.drw_epoch)
    return method(model, objective, method.Options(**cfg.get(cfg.method, {})))
