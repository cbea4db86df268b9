"""What is compared with DirMixE: configs of theirs and of ours that mean the same, and the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from yacs.config import CfgNode

from tailtune.configs import load_configs
from tailtune.datasets.build_data import build_info
from tailtune.models import resolve
from tailtune.parity.experts.cases import STEPS
from tailtune.parity.job import Case, Tensors
from tailtune.trainers.option_schema import declared

CONFIGS = {
    "cifar10_ir100": ("cifar10.json", "resnet32_dirmixe", 8, 32),
    "cifar100_ir100": ("cifar100.json", "resnet32_dirmixe", 8, 32),
    "imagenet_lt": ("imagenet.json", "resnext50_dirmixe", 2, 224),
    "inat2018": ("inaturalist.json", "resnet50_dirmixe", 2, 224),
}
"""Our data config → the original's config, our model config, images a step, and pixels of their sides."""
FINAL = {"cifar10_ir100": 161, "cifar100_ir100": 161, "imagenet_lt": 145, "inat2018": 81}
"""The first epoch with semi-variance, counted from 1."""
RUNS = (200, 180, 100)
"""Lengths of the runs whose epochs with semi-variance are compared."""
SAMPLES = 16
"""Images of a loss of logits."""
OPTIONS_OF_LISTS = {"inat2018": ("label_field", "id")}
"""Options under which our list has the published one's classes; species' names would be in another file."""
INAT = {"loss;args;dataset_type": "ImageNet"}
"""Change of the original's config for iNaturalist."""


def config_of(data: str, *words: object) -> CfgNode:
    """Our config of a data set, with further options."""
    return resolve(load_configs(data, CONFIGS[data][1], [str(word) for word in words], declared())[-1])


def ask(checkouts: Mapping[str, Path]) -> tuple[dict[str, list[Case]], Case]:
    """All cases by kind, and the class counts of each data set."""
    configs = {data: config_of(data) for data in CONFIGS}
    counts = {data: build_info(cfg).class_counts.tolist() for data, cfg in configs.items()}
    phases = [(data, phase) for data in CONFIGS for phase in ("warm", "final")]
    first_epochs = {"warm": dict.fromkeys(CONFIGS, 1), "final": FINAL}
    cases: dict[str, list[Case]] = {
        "phases": [_case("cifar100_ir100", "epochs with semi-variance", counts=counts["cifar100_ir100"], runs=RUNS)],
        "pools": _pools(counts, configs),
        "losses": [
            _case(data, f"loss of logits, {phase}", counts=counts[data], epoch=161 if phase == "final" else 1)
            | {"arguments": loss_arguments(configs[data]), "labels": f"labels.{SAMPLES}.{data}"}
            for data, phase in phases
        ],
        "sets": [_test_sets(data, checkouts["dirmixe"]) for data in CONFIGS],
        "rates": [_case(data, "") for data in CONFIGS],
        "networks": [_case(data, f"DirMixE, {phase}", epoch=first_epochs[phase][data]) for data, phase in phases],
    }
    return cases, {"counts": counts}


def _case(data: str, name: str, **more: object) -> Case:
    config, model, batch, side = CONFIGS[data]
    case: Case = {"repository": "dirmixe", "name": name, "config": f"train/{config}", "data": data, "model": model}
    case |= {"change": INAT if data == "inat2018" else {}, "our_options": {}}
    return case | {"images": f"images.{batch}.{side}", "labels": f"labels.{batch}.{data}"} | more


def loss_arguments(cfg: CfgNode) -> Case:
    """Our options as arguments of the original's loss."""
    options = cfg.dirmixe
    return {
        "lambda_var": options.variance,
        "power": options.power,
        "trials": options.draws,
        "alpha_sum": options.concentration,
    }


def _pools(counts: Mapping[str, list[int]], configs: Mapping[str, CfgNode]) -> list[Case]:
    """Pools of test priors; before that of CIFAR the data set chooses its images with the same random numbers."""
    of_cifar = [
        _case(data, "pool", counts=counts[data], chooses=True, per_epoch=per_epoch, epochs=3)
        | {"arguments": loss_arguments(configs[data])}
        for data, per_epoch in (("cifar10_ir100", 97), ("cifar100_ir100", 85))
    ]
    large = {"counts": list(range(1000, 0, -1)), "chooses": False, "per_epoch": 4, "epochs": 3}
    large["arguments"] = loss_arguments(configs["imagenet_lt"]) | {"dataset_type": "ImageNet"}
    return [*of_cifar, _case("imagenet_lt", "pool of classes without ties", **large)]


def _test_sets(data: str, checkout: Path) -> Case:
    cfg = config_of(data, *OPTIONS_OF_LISTS.get(data, ()))
    classes = {"cifar10_ir100": "CIFAR10Data", "cifar100_ir100": "CIFAR100Data"}
    classes |= {"imagenet_lt": "ImageNetData", "inat2018": "iNaturalist"}
    script = "cifar" if data.startswith("cifar") else "imagenet" if data == "imagenet_lt" else "inat"
    lists = {"imagenet_lt": "ImageNet_LT/ImageNet_LT_uniform.txt", "inat2018": "iNaturalist18/iNaturalist18_val.txt"}
    return _case(
        data,
        "Dirichlet test sets",
        script=f"test_training_{script}_dirmixe",
        loader=f"DirichletImbalance{classes[data]}Loader",
        list=str(checkout / "data_txt" / lists[data]) if data in lists else "",
        ratio=1 / cfg.dirichlet_ratio,
        counts=build_info(cfg).class_counts.tolist(),
    )


def inputs(settings: Mapping[str, Any]) -> Tensors:
    """Images [4, B, 3, H, W] and labels [4, B] of the networks, logits [S, 3, C] and labels [S] of the losses."""
    draws = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for data, (_, _, batch, side) in CONFIGS.items():
        classes, shape = len(settings["counts"][data]), (STEPS + 1, batch, 3, side, side)
        tensors[f"images.{batch}.{side}"] = torch.randn(shape, generator=draws, dtype=torch.float64)
        tensors[f"labels.{batch}.{data}"] = torch.randint(0, classes, shape[:2], generator=draws)
        tensors[f"labels.{SAMPLES}.{data}"] = torch.randint(0, classes, (SAMPLES,), generator=draws)
        tensors[f"logits.{data}"] = 5 * torch.randn(SAMPLES, 3, classes, generator=draws, dtype=torch.float64)
    return tensors
