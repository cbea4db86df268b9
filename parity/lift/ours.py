"""Our side of parity_lift.py: through our builders and loaders, compared with what the original left in files."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tailtune.configs import load_configs
from tailtune.datasets import build_info
from tailtune.datasets.sources.class_descriptors import class_descriptors
from tailtune.models import BACKBONES, ClassificationModel, build_model, resolve
from tailtune.models.backbones.open_clip_models import OpenClipBackbone
from tailtune.models.backbones.timm_models import TimmBackbone
from tailtune.models.heads.initialisation import HeadContext
from tailtune.models.tuners.table import TUNERS
from tailtune.parity.lift.cases import BATCH, COUNTS, GROUPS, NAMES, OPEN_CLIP, SIDES, TIMM, Case, sizes
from tailtune.trainers.evaluation import metrics
from tailtune.trainers.foreign_checkpoints import lift
from tailtune.trainers.foreign_checkpoints.checkpoint_file import FILE, ForeignCheckpoint
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.optim import Plan, build_optimizer, set_lr
from tailtune.trainers.options import declared
from tailtune.trainers.precision import PRECISIONS, cast_trainable

PREC = {"float32": "fp32", "float64": "fp64"}
FLOOR = 1e-3
Tensors = dict[str, Tensor]
ChosenSplits = tuple[list[str], Any]
"""Tuners that are on, and `partial`."""


def register(folder: Path) -> None:
    """The small backbones become entries of our table."""
    for name, config in OPEN_CLIP.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(config))
        BACKBONES[name] = OpenClipBackbone(name, config=file)
    BACKBONES["IN21K-ViT-small"] = TimmBackbone(TIMM)


def build(folder: Path, case: Case, prec: str = "float32", checkout: Path = Path()) -> tuple[Any, Method]:
    """Config and method of a case, by the same builders as a run."""
    own = {"backbone": case["backbone"], "pretrained": folder / f"{case['backbone']}.safetensors"}
    own |= {"resolution": SIDES[case["backbone"]], "adapter_dim": "none", "init_head": "none", "prec": PREC[prec]}
    own |= {"lr": 0.01, "num_epochs": 1, "batch_size": BATCH}
    own |= {"descriptors": checkout / "utils" / "descriptors_imagenet.json", **case["options"]}
    pairs = [str(part) for pair in own.items() for part in pair]
    cfg = resolve(load_configs("fake_lt", "tiny_clip", pairs, declared())[-1])
    names = tuple(case["names"])
    counts = torch.tensor(COUNTS) if len(names) == len(COUNTS) else torch.ones(len(names))
    info = replace(build_info(cfg), class_names=names, class_counts=counts)
    described = class_descriptors(cfg.descriptors, [Path()], names) if cfg.prompt == "descriptor" else None
    return cfg, build_method(cfg, build_model(cfg, names, descriptors=described), info)


def compare(folder: Path, index: int, case: Case, checkout: Path) -> Case:
    """The row of a case."""
    found = row(case["kind"], case["name"], case["backbone"], note=case["note"])
    given = load_file(folder / "inputs.safetensors")
    for prec in case["prec"]:
        theirs = load_file(folder / f"{index}.{prec}.safetensors")
        images, labels = given[case["backbone"]].to(getattr(torch, prec)), given["labels"]
        cfg, method = build(folder, case, prec, checkout)
        if case["kind"] == "init":
            found["value"] = compare_init(method, theirs, images, labels)
            continue
        errors = compare_training(
            cfg, method, ForeignCheckpoint(folder / f"{index}.{prec}" / FILE), theirs, images, labels
        )
        changes = errors.pop("changes")
        found |= errors if prec == "float32" else {"float64": max(changes, *errors.values())}
    return found


def compare_training(
    cfg: Any, method: Method, start: ForeignCheckpoint, theirs: Tensors, images: Tensor, labels: Tensor
) -> dict[str, float]:
    """From the original's own checkpoint: the first forward and backward, and three steps."""
    model, precision = method.model, PRECISIONS[cfg.prec]
    chosen: ChosenSplits = ([name for name in TUNERS if cfg[name]], cfg.partial)
    lift.load(start, model, *chosen)
    model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    before = values(model, chosen)
    with torch.no_grad():
        method.eval()
        errors = {"features": error(model.features(images[-1]), theirs["features"])}
        errors["logits"] = error(method.predict(images[-1]), theirs["logits"])
    optimizer = build_optimizer(method.param_groups(), Plan.of(cfg, BATCH))
    method.train()
    for step, (batch, targets) in enumerate(zip(images[:3], labels[:3], strict=True)):
        outcome = method({"image": batch, "label": targets, "weight": torch.ones(len(batch), dtype=batch.dtype)})
        loss = outcome.loss_sum / outcome.weight
        loss.backward()
        if step == 0:
            errors["loss"] = error(loss, theirs["losses"][0])
            wanted = part(theirs, "gradient.")
            same = sum(each.numel() for each in wanted.values()) == model.counts()["trainable"]
            errors["gradients"] = largest(gradients(method, chosen), wanted, FLOOR) if same else math.inf
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = method.eval().predict(images[-1])
    after = (error(loss, theirs["losses"][-1]), error(logits, theirs["after_logits"]))
    ours, original = values(model, chosen), part(theirs, "after.")
    errors["after_3_steps"] = max(*after, largest(ours, original))
    errors["changes"] = largest(
        *({name: each - before[name] for name, each in side.items()} for side in (ours, original))
    )
    return errors


def values(model: ClassificationModel, chosen: ChosenSplits) -> Tensors:
    """What trains, and running statistics, under the original's names."""
    return {name: place.read().clone() for name, place in lift.layout(model, *chosen).items()}


def gradients(method: Method, chosen: ChosenSplits) -> Tensors:
    """Under the original's names: gradients stand in for the values while those are read."""
    trains = [(each, each.data, each.grad) for each in method.parameters() if each.requires_grad]
    for each, _, gradient in trains:
        assert gradient is not None
        each.data = gradient
    found = values(method.model, chosen)
    for each, value, _ in trains:
        each.data = value
    return found


@torch.no_grad()
def compare_init(method: Method, theirs: Tensors, images: Tensor, labels: Tensor) -> float:
    """The head's first weight; of zero-shot the logits."""
    model = method.model.eval()
    with model.encoder.untuned():
        features = model.features(images[:3].flatten(0, 1))
        context = HeadContext(
            labels=labels[:3].flatten(),
            num_classes=len(COUNTS),
            dim=model.encoder.feature_dim,
            seed=0,
            device=torch.device("cpu"),
            features=lambda _: [(features, torch.arange(len(features)))],
            reduce=lambda tensor: tensor,
        )
        method.prepare(context)
    if "logits" in theirs:
        return error(method.predict(images[-1]), theirs["logits"])
    return error(model.head.get_parameter("weight"), theirs["weight"])


def surroundings(folder: Path, facts: dict[str, Any]) -> list[Case]:
    """Metrics, learning rates, and sizes that follow from the number of classes."""
    given = load_file(folder / "inputs.safetensors")
    groups = dict(zip(("many", "med", "few"), map(torch.tensor, GROUPS), strict=True))
    found = metrics.evaluate(given["metric_logits"], given["metric_labels"], groups)
    rows = [row("metrics", name, value=gap(found[name], each)) for name, each in facts["metrics"].items()]
    small: Case = {"backbone": "CLIP-ViT-small", "options": {}, "names": NAMES}
    for epochs, rates in facts["lr"].items():
        cfg, method = build(folder, small)
        plan = replace(Plan.of(cfg, BATCH), epochs=int(epochs))
        optimizer = build_optimizer(method.param_groups(), plan)
        ours = [set_lr(optimizer, plan, epoch) for epoch in range(plan.epochs)]
        rows.append(row("schedule", f"learning rate, {epochs} epochs", value=max(map(gap, ours, rates))))
    gaps: dict[tuple[str, str], float] = {}
    for case, size in zip(sizes(), facts["sizes"], strict=True):
        _, method = build(folder, {**case, "names": [f"class {k}" for k in range(case["classes"])]})
        key = (*case["options"], case["backbone"])
        gaps[key] = max(gaps.get(key, 0.0), gap(method.model.counts()["tuner"], size))
    note = f"parameters for {', '.join(map(str, sorted({case['classes'] for case in sizes()})))} classes"
    return rows + [row("size", *key, note=note, value=each) for key, each in gaps.items()]


# --- figures ---------------------------------------------------------------------------------------------------------


def row(kind: str, name: str, backbone: str = "", note: str = "", value: float | None = None) -> Case:
    figures = dict.fromkeys(("features", "logits", "loss", "gradients", "after_3_steps", "float64"))
    return {"kind": kind, "name": name, "backbone": backbone, **figures, "value": value, "note": note}


def part(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}


def error(ours: Tensor, theirs: Tensor, floor: float = 0.0) -> float:
    """|ours − theirs| / |theirs| in the L2 norm, or / floor where that is larger; infinite for another shape."""
    if ours.shape != theirs.shape:
        return math.inf
    ours, theirs = ours.detach().double(), theirs.double()
    distance, norm = float((ours - theirs).norm()), max(floor, float(theirs.norm()))
    return distance / norm if norm else math.inf if distance else 0.0


def largest(ours: Tensors, theirs: Tensors, floor: float = 0.0) -> float:
    """Largest error over tensors of the same names; `floor` as a share of the largest norm."""
    norm = max(float(each.double().norm()) for each in theirs.values())
    return max(error(ours[name], each, floor * norm) if name in ours else math.inf for name, each in theirs.items())


def gap(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs) if theirs else math.inf if ours else 0.0
