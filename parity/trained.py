"""Our side of comparisons with an original that fine-tunes a small backbone: one forward pass, and three steps."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.datasets.build_data import build_info
from tailtune.models import BACKBONES, ClassificationModel, build_model
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone
from tailtune.parity.errors import error, error_of_all, largest_error, with_prefix
from tailtune.parity.job import Tensors
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer
from tailtune.trainers.precision import PRECISIONS, cast_trainable

PREC = {"float32": "fp32", "float64": "fp64"}
FLOOR = 1e-3
"""As a share of the largest gradient's norm: what a smaller gradient's error is divided by."""
Read = Callable[[ClassificationModel], Tensors]
"""Trained values and running statistics of our model, copied, under the original's names and in its shapes."""


def register_clips(folder: Path, configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Make small CLIPs entries of our table.

    Args:
        folder: where open_clip's config files go.
        configs: name → open_clip's config.
    """
    for name, config in configs.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(config))
        BACKBONES[name] = OpenClipBackbone(name, config=file)


def built(cfg: CfgNode, names: tuple[str, ...], counts: Tensor, descriptors: Any = None) -> Method:
    """The method of a resolved config for classes with these names and numbers of images [C]."""
    info = replace(build_info(cfg), class_names=names, class_counts=counts)
    return build_method(cfg, build_model(cfg, names, descriptors=descriptors), info)


def exact_scale(file: Path) -> dict[str, float]:
    """The option that makes the factor of text features the exponential in fp64; that of our models is one in fp32.

    Args:
        file: the weights of a CLIP.
    """
    with safe_open(file, "pt") as weights:
        return {"textclassifier.scale": math.exp(weights.get_tensor("logit_scale"))}


def training_errors(
    cfg: CfgNode,
    method: Method,
    load: Callable[[ClassificationModel], object],
    read: Read,
    original: Tensors,
    images: Tensor,
    labels: Tensor,
    of_all: bool = False,
) -> dict[str, float]:
    """Errors of the first forward and backward pass, and after three steps, from the original's own start.

    Args:
        cfg: config of the case.
        method: ours, with any weights.
        load: fills our model with the values that the original started from.
        read: gives their present values.
        original: its features (if it has them), logits, losses, gradients and values.
        images: batches [4, B, 3, H, W] in the precision of the case; the last is for evaluation.
        labels: their labels [4, B].
        of_all: whether gradients, and what trains, are measured as one vector, or else each tensor for itself.
    """
    measure = error_of_all if of_all else largest_error
    model, precision = method.model, PRECISIONS[cfg.prec]
    load(model)
    model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    before = read(model)
    errors = {}
    with torch.no_grad():
        method.eval()
        if "features" in original:
            errors["features"] = error(model.features(images[-1]), original["features"])
        errors["logits"] = error(method.predict(images[-1]), original["logits"])
    optimizer = build_optimizer(method.param_groups(), Plan.of(cfg, len(labels[0])))
    method.train()
    for step, (batch, targets) in enumerate(zip(images[:3], labels[:3], strict=True)):
        outcome = method({"image": batch, "label": targets, "weight": torch.ones(len(batch), dtype=batch.dtype)})
        loss = outcome.loss_sum / outcome.weight
        loss.backward()
        if step == 0:
            errors["loss"] = error(loss, original["losses"][0])
            gradients = error_of_all if of_all else partial(largest_error, floor=FLOOR)
            errors["gradients"] = gradient_error(method, read, with_prefix(original, "gradient."), gradients)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = method.eval().predict(images[-1])
    ours, theirs = read(model), with_prefix(original, "after.")
    of_last_step = (error(loss, original["losses"][-1]), error(logits, original["after_logits"]))
    errors["after_3_steps"] = max(*of_last_step, measure(ours, theirs))
    our_changes, changes = (
        {name: value.double() - before[name].double() for name, value in side.items()} for side in (ours, theirs)
    )
    return errors | {"changes": measure(our_changes, changes)}


def gradient_error(
    method: Method, read: Read, original: Tensors, measure: Callable[[Tensors, Tensors], float]
) -> float:
    """Error of the gradients; infinite if another number of values is trained."""
    if sum(gradient.numel() for gradient in original.values()) != method.model.counts()["trainable"]:
        return math.inf
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]
    kept = [parameter.data for parameter in parameters]
    for parameter in parameters:  # `read` reads values, so gradients take their place meanwhile
        assert parameter.grad is not None
        parameter.data = parameter.grad
    gradients = read(method.model)
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data = value
    return measure(gradients, original)


def of_precisions(errors: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """The figures of a row: those in fp32, and the largest one in fp64, that of the changes included.

    Args:
        errors: float32, float64 → what `training_errors` gave.
    """
    figures: dict[str, float] = {}
    for prec, found in errors.items():
        changes = found.pop("changes")
        figures |= found if prec == "float32" else {"float64": max(changes, *found.values())}
    return figures
