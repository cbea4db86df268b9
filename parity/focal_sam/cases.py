"""What is compared with Focal-SAM: steps of the published CIFAR settings, and the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tailtune.configs import CfgNode, load_configs
from tailtune.datasets.build_data import build_info
from tailtune.models import resolve
from tailtune.parity.job import Case, Tensors
from tailtune.trainers.option_schema import declared

DATA = ("cifar10_ir100", "cifar100_ir100")
MODEL = "resnet32_focal_sam"
STEPS, IMAGES = 3, 8
"""Number of steps, and of images in each."""


def config_of(case: Case) -> CfgNode:
    """Our config of a case."""
    words = [str(word) for pair in case["our_options"].items() for word in pair]
    return resolve(load_configs(case["data"], case["model"], words, declared())[-1])


def ask(checkouts: Mapping[str, Path]) -> tuple[dict[str, list[Case]], dict[str, Any]]:
    """All cases, and the class counts of each data set."""
    cases, counts = [], {}
    for data in DATA:
        for name, options in (
            ("Focal-SAM", {}),
            ("Focal-SAM, 1 - c below 0", {"sam_gamma": 2.0, "sam_lambda": 1.1}),
            ("SAM", {"sam": "sam", "sam_gamma": 1.0, "sam_lambda": 0.5}),
        ):
            case: Case = {"repository": "focal_sam", "name": name, "data": data, "model": MODEL}
            cfg = config_of(case | {"our_options": options})
            given = {"mode": cfg.sam, "rho": cfg.sam_rho, "gamma": cfg.sam_gamma, "strength": cfg.sam_lambda}
            of_optimizer = {"lr": cfg.lr, "momentum": cfg.momentum, "weight_decay": cfg.weight_decay}
            cases.append(case | {"our_options": options, "given": given, "optimizer": of_optimizer})
            counts[data] = build_info(cfg).class_counts.tolist()
    return {"steps": cases}, {"counts": counts}


def inputs(settings: Mapping[str, Any]) -> Tensors:
    """Normalised images [3, 8, 3, 32, 32] and labels [3, 8] of each data set."""
    draws = torch.Generator().manual_seed(0)
    tensors: Tensors = {"images": torch.randn(STEPS, IMAGES, 3, 32, 32, generator=draws, dtype=torch.float64)}
    for data, counts in settings["counts"].items():
        tensors[f"labels.{data}"] = torch.randint(0, len(counts), (STEPS, IMAGES), generator=draws)
    return tensors
