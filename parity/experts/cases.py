"""What is compared with RIDE, SADE and BatchFormer: their configs, ours that mean the same, and the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tailtune.configs import load_configs
from tailtune.datasets.build_data import build_info
from tailtune.models import resolve
from tailtune.parity.job import Case, Tensors
from tailtune.trainers.option_schema import declared

STEPS = 3
SIZES = {"resnet32": (8, 32), "resnet10": (4, 224)}
"""Network → images a step, and pixels of their sides."""
LARGE = (2, 224)
"""The same for all other networks."""
VIEWS, VIEW_BATCHES, VIEW_BATCH, VIEW_CLASSES = 5, 3, 8, 100
"""Epochs, batches an epoch and images a batch of the test-time aggregation."""
CLASSES = {"cifar100_ir100": 100, "imagenet_lt": 1000, "places_lt": 365, "inat2018": 8142}
REDUCED = {"arch;args;reduce_dimension": 1, "arch;args;num_experts": 3}
"""Changes of the original's config: the READMEs' commands add --reduce_dimension 1 --num_experts 3."""
NO_DROPOUT = "dropout set to 0 on both sides"
TEACHER = "the original leaves its teacher in training mode: compared after it was put into evaluation mode"
FACTOR = "diversity factor"
SHARED: Case = {
    "method": "batchformer",
    "batchformer.inner": "classify",
    "batchformer.mode": "mean",
    "batchformer.dropout": 0,
    "loss_type": "BS",
    "lr_factors": "{mixer: 0.1}",
    "lr": 0.05,
    "weight_decay": 5e-4,
    "nesterov": False,
    "schedule": "cosine",
    "lr_steps": "none",
    "warmup_epochs": 0,
    "num_epochs": 90,
    "batch_size": 128,
}
"""Our options for BatchFormer's config/ImageNet_LT/balanced_softmax_resnet10.yaml --add_bt 1."""

AGGREGATION = {
    "test_training_cifar": ("cifar100_ir100", "resnet32_sade", "test_time_cifar100_ir100_sade.json"),
    "test_training_imagenet": ("imagenet_lt", "resnext50_sade", "test_time_imagenet_lt_resnext50_sade.json"),
    "test_training_places": ("places_lt", "resnet152_sade", "test_time_places_lt_resnet152_sade.json"),
    "test_training_inat": ("inat2018", "resnet50_sade", "test_time_iNaturalist_resnet50_sade.json"),
}
"""SADE's script → our data and model config, whose options `adapt_…` are compared with the script's, and its config."""


def ask(_: Mapping[str, Path]) -> tuple[dict[str, list[Case]], Case]:
    """All cases by kind, and the class counts of each data set."""
    scripts = [
        {"repository": "sade", "name": f"{script}.py", "script": script, "data": data, "model": model, "config": config}
        for script, (data, model, config) in AGGREGATION.items()
    ]
    cases = {"networks": networks(), "rates": schedules(), "scripts": scripts}
    names = sorted({case["data"] for kind in ("networks", "rates") for case in cases[kind]})
    return cases, {"counts": {name: _class_counts(name) for name in names}}


def _class_counts(data: str) -> list[int]:
    cfg = resolve(load_configs(data, "tiny_clip", [], declared())[-1])
    counts: list[int] = build_info(cfg).class_counts.long().tolist()
    return counts


def networks() -> list[Case]:
    """Every network, method and loss of the three repositories."""
    return [*_ride_cifar(), *_ride_large(), *_sade(), *_batchformer()]


def _ride_cifar() -> list[Case]:
    ride, cifar = "config_imbalance_cifar100_ride.json", "cifar100_ir100"
    cases = []
    for epoch, when in ((160, "before reweighting"), (161, "reweighted")):
        for factor in (-0.45, -0.2, 0.0):
            change = {"loss;args;additional_diversity_factor": factor}
            options, name = {"ride.diversity": factor}, f"RIDE, {FACTOR} {factor}, {when}"
            cases.append(_case("ride", name, ride, cifar, "resnet32_ride", change, options, epoch))
        configs = ("config_imbalance_cifar100_ldam_drw.json", cifar, "resnet32_ldam_drw")
        cases.append(_case("ride", f"LDAM-DRW, {when}", *configs, readme={}, epoch=epoch))
        configs = ("config_imbalance_cifar100_distill_ride.json", cifar, "resnet32_ride_distill")
        name, times = f"RIDE + distillation × E, {when}", {"distill.times_experts": True}
        cases.append(_case("ride", name, *configs, our_options=times, epoch=epoch, note=TEACHER))
    configs = ("config_imbalance_cifar100_ride_teacher.json", cifar, "resnet32_ride_teacher")
    cases.append(_case("ride", "RIDE, 6 experts", *configs, readme={}))
    configs = ("config_imbalance_cifar100_ride_ea.json", cifar, "resnet32_ride_ea")
    return [*cases, _case("ride", "expert assignment", *configs)]


def _ride_large() -> list[Case]:
    cases = []
    for network in ("resnet10", "resnet50", "resnext50"):
        configs = (f"config_imagenet_lt_{network}_ride.json", "imagenet_lt", f"{network}_ride")
        cases.append(_case("ride", "RIDE, reweighted", *configs, epoch=81))
    configs = ("config_imagenet_lt_resnet10_ride_ea.json", "imagenet_lt", "resnet10_ride_ea")
    cases.append(_case("ride", "expert assignment", *configs))
    configs = ("config_imagenet_lt_resnet10_distill_ride.json", "imagenet_lt", "resnet10_ride_distill")
    times = {"distill.times_experts": True}
    return [*cases, _case("ride", "RIDE + distillation × E", *configs, our_options=times, note=TEACHER)]


def _sade() -> list[Case]:
    """Without the ResNet-152 for Places: its blocks are those of the others, and it takes 12 GB in fp64."""
    configs = (
        ("config_cifar100_ir100_sade.json", "cifar100_ir100", "resnet32_sade"),
        ("config_imagenet_lt_resnext50_sade.json", "imagenet_lt", "resnext50_sade"),
        ("config_iNaturalist_resnet50_sade.json", "inat2018", "resnet50_sade"),
    )
    return [_case("sade", "SADE", *names, readme={}) for names in configs]


def _batchformer() -> list[Case]:
    cases = []
    for add, mode in ((1, "replace"), (33, "sum")):
        change, options = {"arch;args;add_bt": add}, {"batchformer.mode": mode, "batchformer.dropout": 0}
        for configs in (
            ("config_imbalance_cifar100_ride.json", "cifar100_ir100", "resnet32_ride_batchformer"),
            ("config_imagenet_lt_resnet10_ride.json", "imagenet_lt", "resnet10_ride_batchformer"),
        ):
            name = f"BatchFormer, add_bt {add}"
            cases.append(_case("batchformer", name, *configs, change, options, note=NO_DROPOUT))
    configs = ("config_imagenet_lt_resnet10_distill_ride.json", "imagenet_lt", "resnet10_ride_distill")
    cases.append(_case("batchformer", "RIDE + distillation × 1", *configs, note=TEACHER))
    configs = ("", "imagenet_lt", "resnet10_ce")
    note = f"{NO_DROPOUT}; the original adds three means, here weighted by a third to be the mean of 2B"
    return [*cases, _case("balanced", "BatchFormer, shared classifier", *configs, our_options=SHARED, note=note)]


def schedules() -> list[Case]:
    """One case for each config of the originals: its learning rates."""
    cases = {(case["repository"], case["config"]): case for case in networks() if case["config"]}
    more = []
    for config in ("imagenet_lt_resnet50", "imagenet_lt_resnext50", "iNaturalist_resnet50"):
        network, data = config.split("_")[-1], "inat2018" if config.startswith("iNat") else "imagenet_lt"
        for end in ("", "_distill", "_ea"):
            name = f"config_{config}_ride_ea.json" if end == "_ea" else f"config_{config}{end}_ride.json"
            more.append(_case("ride", "", name, data, f"{network}_ride{end}"))
        more.append(_case("batchformer", "", f"config_{config}_ride.json", data, f"{network}_ride_batchformer"))
    more.append(_case("sade", "", "config_places_lt_resnet152_sade.json", "places_lt", "resnet152_sade"))
    for ratio in (10, 50):
        config = f"config_cifar100_ir{ratio}_sade.json"
        more.append(_case("sade", "", config, "cifar100_ir100", "resnet32_sade") | {"data": f"cifar100_ir{ratio}"})
    return list((cases | {(case["repository"], case["config"]): case for case in more}).values())


def _case(
    repository: str,
    name: str,
    config: str,
    data: str,
    model: str,
    change: Case | None = None,
    our_options: Case | None = None,
    epoch: int = 1,
    readme: Case = REDUCED,
    note: str = "",
) -> Case:
    """A case of a network.

    Args:
        repository: original that it is of.
        name: what is compared.
        config: file of the original's config; empty for the general BatchFormer.
        data: our data config.
        model: our model config.
        change: path in the original's config → new value.
        our_options: options beside our configs.
        epoch: the original's epoch, counted from 1.
        readme: further changes, those of the README's command.
        note: what a reader of the row has to know.
    """
    network = model.split("_")[0]
    batch, side = SIZES.get(network, LARGE)
    return {
        "repository": repository,
        "name": name,
        "config": config,
        "data": data,
        "model": model,
        "change": {**readme, **(change or {})},
        "our_options": our_options or {},
        "epoch": epoch,
        "note": note,
        "images": f"images.{batch}.{side}",
        "labels": f"labels.{batch}.{CLASSES[data]}",
    }


def inputs(_: Mapping[str, Any]) -> Tensors:
    """Images [4, B, 3, H, W], labels [4, B], and for the aggregation logits and images of two views.

    The logits are [epochs, batches, B, 3, C], the images [epochs, batches, B, 3, 32, 32].
    """
    draws = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for batch, side in (*SIZES.values(), LARGE):
        shape = (STEPS + 1, batch, 3, side, side)
        tensors[f"images.{batch}.{side}"] = torch.randn(shape, generator=draws, dtype=torch.float64)
        for classes in CLASSES.values():
            tensors[f"labels.{batch}.{classes}"] = torch.randint(0, classes, (STEPS + 1, batch), generator=draws)
    shape = (VIEWS, VIEW_BATCHES, VIEW_BATCH, 3, VIEW_CLASSES)
    first = 3 * torch.randn(shape, generator=draws, dtype=torch.float64)
    spread = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).view(3, 1)  # the first expert is the most stable
    tensors["view1"] = first
    tensors["view2"] = first + spread * torch.randn(shape, generator=draws, dtype=torch.float64)
    crops = (VIEWS, VIEW_BATCHES, VIEW_BATCH, 3, 32, 32)
    for name in ("crop1", "crop2"):
        tensors[name] = torch.randn(crops, generator=draws, dtype=torch.float64)
    return tensors
