"""Our side of the comparison with LIFT: through our builders and the importer of LIFT's checkpoints."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs import CfgNode, load_configs
from tailtune.datasets.sources.class_descriptors import class_descriptors
from tailtune.models import BACKBONES, ClassificationModel, resolve
from tailtune.models.backbones.timm_backbone import TimmBackbone
from tailtune.models.heads.head_init import HeadContext
from tailtune.models.tuners.table import TUNERS
from tailtune.parity.errors import error, number_error, with_prefix
from tailtune.parity.job import Case, Job, Tensors
from tailtune.parity.lift.cases import BATCH, COUNTS, GROUPS, NAMES, OPEN_CLIP, SIDES, TIMM
from tailtune.parity.subject import Row
from tailtune.parity.trained import PREC, built, of_precisions, register_clips, training_errors
from tailtune.trainers.evaluation import metrics
from tailtune.trainers.foreign_checkpoints import lift
from tailtune.trainers.foreign_checkpoints.checkpoint_file import LIFT_FILE, ForeignCheckpoint
from tailtune.trainers.methods import Method
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer, set_lr
from tailtune.trainers.option_schema import declared

Build = Callable[[Job, Case, str], tuple[CfgNode, Method]]
FIGURES = ("features", "logits", "loss", "gradients", "after_3_steps", "float64", "value")


def build(job: Job, case: Case, prec: str = "float32") -> tuple[CfgNode, Method]:
    """Config and method of a case, by the same builders as in a run."""
    register_clips(job.folder, OPEN_CLIP)
    BACKBONES["IN21K-ViT-small"] = TimmBackbone(TIMM)
    options = {"backbone": case["backbone"], "pretrained": job.folder / f"{case['backbone']}.safetensors"}
    options |= {"resolution": SIDES[case["backbone"]], "adapter_dim": "none", "init_head": "none", "prec": PREC[prec]}
    options |= {"lr": 0.01, "num_epochs": 1, "batch_size": BATCH}
    options |= {"descriptors": job.settings["descriptors"], **case["options"]}
    pairs = [str(part) for pair in options.items() for part in pair]
    cfg = resolve(load_configs("fake_lt", "tiny_clip", pairs, declared())[-1])
    names = tuple(case["names"])
    counts = torch.tensor(COUNTS) if len(names) == len(COUNTS) else torch.ones(len(names))
    descriptors = class_descriptors(cfg.descriptors, [Path()], names) if cfg.prompt == "descriptor" else None
    return cfg, built(cfg, names, counts, descriptors)


# --- networks --------------------------------------------------------------------------------------------------------


def compare_network(
    case: Case, job: Job, build: Build = build, importer: Any = lift, one_vector: bool = False
) -> list[Row]:
    """The row of a tuner, head, loss, head initialisation, or of what trains text.

    Args:
        case: the case.
        job: the answers of the original.
        build: (job, case, precision) → config and method of the case.
        importer: module with `load` and `layout` for the checkpoint that the original started from.
        one_vector: whether gradients in fp32, and what trains, are measured as one vector.
    """
    figures: dict[str, float] = {}
    errors: dict[str, dict[str, float]] = {}
    for prec in case["prec"]:
        original = with_prefix(job.tensors(case), f"{prec}.")
        images = job.inputs[case["backbone"]].to(getattr(torch, prec))
        cfg, method = build(job, case, prec)
        if case["kind"] == "init":
            figures["value"] = initialisation_error(method, original, images, job.inputs["labels"])
            continue
        chosen = [name for name in TUNERS if cfg[name]]
        start = ForeignCheckpoint(job.folder / f"{case['number']}.{prec}" / LIFT_FILE)
        load, read = partial(importer.load, start, tuners=chosen), partial(values, importer, tuners=chosen)
        of_all = one_vector and prec == "float32"
        errors[prec] = training_errors(cfg, method, load, read, original, images, job.inputs["labels"], of_all)
    return [row(case["kind"], case["name"], case["backbone"], case["note"], **figures, **of_precisions(errors))]


def values(importer: Any, model: ClassificationModel, tuners: list[str]) -> Tensors:
    """Trained values and running statistics under the original's names."""
    return {name: place.read().clone() for name, place in importer.layout(model, tuners).items()}


@torch.no_grad()
def initialisation_error(method: Method, original: Tensors, images: Tensor, labels: Tensor) -> float:
    """Error of the head's first weight, or of the logits of zero-shot.

    Args:
        method: ours, with the backbone's weights.
        original: its `weight` or `logits`; `train_features` in place of ours, if there are any.
        images: batches [4, B, 3, H, W]; the last is for evaluation.
        labels: their labels [4, B].
    """
    model = method.model.eval()
    with model.encoder.untuned():
        features = original.get("train_features", model.features(images[:3].flatten(0, 1)))
        context = HeadContext(
            labels=labels[:3].flatten(),
            num_classes=len(COUNTS),
            feature_dim=model.encoder.feature_dim,
            seed=0,
            device=torch.device("cpu"),
            encode_images=lambda _: [(features, torch.arange(len(features)))],
            sum_over_processes=lambda tensor: tensor,
        )
        method.prepare(context)
    if "logits" in original:
        return error(method.predict(images[-1]), original["logits"])
    return error(model.head.get_parameter("weight"), original["weight"])


# --- numbers ---------------------------------------------------------------------------------------------------------


def compare_metrics(case: Case, job: Job) -> list[Row]:
    """A row for each metric."""
    groups = dict(zip(("many", "med", "few"), map(torch.tensor, GROUPS), strict=True))
    ours = metrics.evaluate(job.inputs["metric_logits"], job.inputs["metric_labels"], groups)
    original = job.fact("metrics", case)
    return [row("metrics", name, value=number_error(ours[name], value)) for name, value in original.items()]


def compare_schedule(case: Case, job: Job) -> list[Row]:
    """Learning rates of all epochs of a schedule."""
    cfg, method = build(job, {"backbone": "CLIP-ViT-small", "options": {}, "names": NAMES})
    plan = replace(Plan.of(cfg, BATCH), epochs=case["epochs"])
    optimizer = build_optimizer(method.param_groups(), plan)
    rates = [set_lr(optimizer, plan, epoch) for epoch in range(plan.epochs)]
    return [row("schedule", case["name"], value=max(map(number_error, rates, job.fact("schedule", case))))]


def compare_size(case: Case, job: Job) -> list[Row]:
    """Numbers of parameters of a tuner, whose size follows from the number of classes."""
    errors = []
    for classes, size in zip(case["classes"], job.fact("size", case), strict=True):
        _, method = build(job, {**case, "names": [f"class {number}" for number in range(classes)]})
        errors.append(number_error(method.model.counts()["tuner"], size))
    note = f"parameters for {', '.join(map(str, case['classes']))} classes"
    return [row("size", case["name"], case["backbone"], note, value=max(errors))]


def row(kind: str, name: str, backbone: str = "", note: str = "", **figures: float) -> Row:
    """A row with the figures that there are."""
    return {"kind": kind, "name": name, "backbone": backbone, **dict.fromkeys(FIGURES), **figures, "note": note}
