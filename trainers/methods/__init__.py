"""METHODS: name → method. A method is one file here and one line in the table."""

from configs import CfgNode
from configs.errors import lookup
from datasets.bundle import DataInfo
from models import Classifier
from trainers.losses import LOSSES
from trainers.methods.base import Method, Objective

METHODS: dict[str, type[Method]] = {
    "classify": Method,  # zero-shot, head only, PEFT, full fine-tuning: one model, one loss
}


def method_options() -> dict[str, type]:
    """Method → its `Options`, for the option table."""
    return {name: method.Options for name, method in METHODS.items()}


def build_method(cfg: CfgNode, model: Classifier, info: DataInfo) -> Method:
    """The method of a config around a model."""
    method = lookup(METHODS, cfg.method, "method")
    objective = Objective(info.class_counts, lookup(LOSSES, cfg.loss_type, "loss_type"), cfg.tau)
    return method(model, objective, method.Options(**cfg.get(cfg.method, {})))
