"""Our side of the comparison with LIFT+: its command lines, our builders, and the importer of its checkpoints."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tailtune.configs import CfgNode, load_configs
from tailtune.datasets.build_data import build_data
from tailtune.datasets.images.fixed_crops import five_crop
from tailtune.models import BACKBONES, resolve
from tailtune.models.backbones.timm_backbone import TimmBackbone
from tailtune.parity.errors import number_error
from tailtune.parity.job import Case, Job
from tailtune.parity.lift import ours as lift
from tailtune.parity.lift.ours import FIGURES, row
from tailtune.parity.lift_plus.cases import COUNTS, NAMES, OPEN_CLIP, SIDES, TIMM, TIMM_RESNET
from tailtune.parity.subject import Row
from tailtune.parity.trained import PREC, built, exact_scale, register_clips
from tailtune.trainers.foreign_checkpoints import lift_plus
from tailtune.trainers.methods import Method
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer, set_lr
from tailtune.trainers.option_schema import declared

__all__ = ["FIGURES", "compare_network", "compare_pictures", "compare_schedule", "compare_size"]


def config_of(case: Case, **more: object) -> CfgNode:
    """Our config of a command line of LIFT+, with further options."""
    options = {**case["our_options"], **more}
    words = [str(word) for pair in options.items() for word in pair]
    return resolve(load_configs("fake_lt", case["config"], words, declared())[-1])


def build(job: Job, case: Case, prec: str, names: tuple[str, ...] = NAMES) -> tuple[CfgNode, Method]:
    """Config and method of a case, by the same builders as in a run."""
    register_clips(job.folder, OPEN_CLIP)
    BACKBONES["IN21K-ViT-small"], BACKBONES["IN1K-RN-small"] = TimmBackbone(TIMM), TimmBackbone(TIMM_RESNET)
    file = job.folder / f"{case['backbone']}.safetensors"
    options = {"backbone": case["backbone"], "pretrained": file, "resolution": SIDES[case["backbone"]]}
    options |= {"prec": PREC[prec], "num_epochs": 1}
    if case["kind"] == "text" and prec == "float64":
        options |= exact_scale(file)
    cfg = config_of(case, **options)
    return cfg, built(cfg, names, torch.tensor(COUNTS) if names is NAMES else torch.ones(len(names)))


compare_network = partial(lift.compare_network, build=build, importer=lift_plus, one_vector=True)


def compare_size(case: Case, job: Job) -> list[Row]:
    """Numbers of parameters that train with a tuner whose size follows from the numbers of classes and blocks."""
    errors = []
    for classes, size in zip(case["classes"], job.fact("size", case), strict=True):
        _, method = build(job, case, "float32", tuple(f"class {number}" for number in range(classes)))
        errors.append(number_error(method.model.counts()["trainable"], size))
    note = f"parameters for {', '.join(map(str, case['classes']))} classes"
    return [row("size", case["name"], case["backbone"], note, value=max(errors))]


def compare_schedule(case: Case, job: Job) -> list[Row]:
    """Learning rates of all epochs of a schedule."""
    cfg, rates = config_of(case), []
    plan = Plan.of(cfg, cfg.batch_size)
    optimizer = build_optimizer([{"name": "head", "params": [torch.nn.Parameter(torch.zeros(1))]}], plan)
    for epoch in range(plan.epochs):
        set_lr(optimizer, plan, epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    errors = [number_error(*pair) for pair in zip(rates, job.fact("schedule", case), strict=True)]
    return [row("schedule", case["name"], case["backbone"], value=max(errors))]


def compare_pictures(case: Case, job: Job) -> list[Row]:
    """The share of the pictures that differ in any pixel, after the same transform with the same random seeds."""
    original, change = job.tensors(case), changed(case)
    different = 0
    for name, wanted in original.items():
        epoch, number, seed = map(int, name.split("."))
        torch.manual_seed(seed)
        found = change(Image.fromarray(np.array(job.inputs[f"picture.{number}"])), epoch)
        different += not torch.equal(found, wanted)
    return [row("pictures", case["name"], case["backbone"], value=different / len(original))]


def changed(case: Case) -> Callable[[Image.Image, int], Tensor]:
    """Our transform of training, of the test, or of the head's initialisation.

    Returns:
        (picture, epoch) → uint8 [3, R, R], or [5, 3, R, R] of five crops.
    """
    cfg = config_of(case, image_backend="pil", pretrained="none")
    data = build_data(cfg)
    view: Any = {"train": data.train, "test": data.test, "init": data.train_unaugmented}[case["split"]]
    transform = view.transform
    if case["split"] == "train" and cfg.augment == "mda":
        return lambda picture, epoch: transform(picture, epoch)
    if case["split"] == "test" and cfg.tte:
        return lambda picture, _: five_crop(transform(picture)[None], cfg.resolution)[:, 0]
    return lambda picture, _: transform(picture)
