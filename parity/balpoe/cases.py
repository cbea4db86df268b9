"""What is compared with BalPoE and LGLA: configs of theirs and of ours that mean the same, and the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tailtune.configs import load_configs
from tailtune.datasets.build_data import build_info
from tailtune.models import resolve
from tailtune.parity.experts.cases import STEPS
from tailtune.parity.job import Case, Tensors
from tailtune.trainers.option_schema import declared

SIZES = {"resnet32": (8, 32), "resnet50": (2, 224), "resnext50": (2, 224)}
"""Network → images a step, and pixels of their sides."""
CONFIGS = {
    **{
        f"{data}_ir{ratio}": (f"config_{data}_ir{ratio}_bs-experts.json", "resnet32_balpoe")
        for data in ("cifar10", "cifar100")
        for ratio in (10, 50, 100)
    },
    "imagenet_lt": ("config_imagenet_lt_resnext50_bs-experts.json", "resnext50_balpoe"),
    "inat2018": ("config_iNaturalist_resnet50_bs-experts.json", "resnet50_balpoe"),
}
"""Our data config → BalPoE's config, and our model config."""
IMAGENET_R50 = ("config_imagenet_lt_resnet50_bs-experts.json", "resnet50_balpoe")
LGLA = {
    "cifar10_ir100": ("config_cifar10_ir100_lgla.json", "resnet32_lgla"),
    "cifar100_ir100": ("config_cifar100_ir100_lgla.json", "resnet32_lgla"),
    "imagenet_lt": ("config_imagenet_lt_resnext50_lgla.json", "resnext50_lgla"),
    "inat2018": ("config_iNaturalist_resnet50_lgla.json", "resnet50_lgla"),
}
"""The same for LGLA."""
SAMPLES, SCALE = 64, 30.0
"""Images of a loss of logits, and what LGLA divides logits by."""
SEVEN = {"arch;args;num_experts": 7, "loss;args;tau_list": [k / 3 for k in range(7)]}
PICTURES, SEEDS = 12, 25
"""Pictures, and random seeds for each of them."""


def ask(_: Mapping[str, Path]) -> tuple[dict[str, list[Case]], Case]:
    """All cases by kind, and the class counts of each data set."""
    cifar = "cifar100_ir100"
    networks = [
        _balpoe(cifar, "BalPoE, mixup"),
        _balpoe(cifar, "BalPoE", change={"combiner;mode": "default"}, our_options={"method": "balpoe"}),
        _balpoe(cifar, "BalPoE, mixup, 7 experts", change=SEVEN, our_options={"num_experts": 7}),
        _balpoe("cifar10_ir100", "BalPoE, mixup"),
        _balpoe("imagenet_lt", "BalPoE, mixup"),
    ]
    losses = [_loss(data, experts) for data, experts in (*((data, 3) for data in LGLA), (cifar, 4), (cifar, 5))]
    rates = [_balpoe(data, "", length=length) for data in CONFIGS for length in ("standard", "long")]
    rates += [_case("balpoe", "imagenet_lt", IMAGENET_R50, "", length=length) for length in ("standard", "long")]
    rates.append(_case("lgla", "imagenet_lt", LGLA["imagenet_lt"], ""))
    cases = {
        "strengths": [_balpoe(cifar, "evenly spaced strengths", most=7)],
        "pictures": [_balpoe("imagenet_lt", "RandAugment")],
        "rates": rates,
        "losses": losses,
        "networks": networks,
    }
    return cases, {"counts": {data: _class_counts(data) for data in CONFIGS}}


def _balpoe(data: str, name: str, length: str = "standard", **more: object) -> Case:
    return _case("balpoe", data, CONFIGS[data], name, length, **more)


def _case(
    repository: str, data: str, configs: tuple[str, str], name: str, length: str = "standard", **more: object
) -> Case:
    """A case.

    Args:
        repository: original that it is of.
        data: our data config.
        configs: the original's config and our model config.
        name: what is compared.
        length: of BalPoE's training: `standard`, or `long`, for which our model config has an end of this name.
        more: further entries.
    """
    config, model = configs
    batch, side = SIZES[model.split("_")[0]]
    case: Case = {"repository": repository, "name": name, "data": data, "epoch": 1, "change": {}, "our_options": {}}
    case["config"] = f"mixup/{length}_training/{config}" if repository == "balpoe" else config
    case["model"] = f"{model}_long" if length == "long" else model
    return case | {"images": f"images.{batch}.{side}", "labels": f"labels.{batch}.{data}"} | more


def _loss(data: str, experts: int) -> Case:
    config, model = LGLA[data]
    cfg = resolve(load_configs(data, model, [], declared())[-1])
    case = _case("lgla", data, (config, model), f"loss of logits, {experts} experts", experts=experts)
    return case | {"tau": cfg.lgla.tau, "our_options": {"num_experts": experts}}


def _class_counts(data: str) -> list[int]:
    cfg = resolve(load_configs(data, "tiny_clip", [], declared())[-1])
    counts: list[int] = build_info(cfg).class_counts.long().tolist()
    return counts


def inputs(settings: Mapping[str, Any]) -> Tensors:
    """Images [4, B, 3, H, W], labels [4, B], pictures uint8 [N, 3, H, W]; logits [S, 5, C] and labels [S] of losses."""
    draws = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for batch, side in sorted(set(SIZES.values())):
        shape = (STEPS + 1, batch, 3, side, side)
        tensors[f"images.{batch}.{side}"] = torch.randn(shape, generator=draws, dtype=torch.float64)
        for data, counts in settings["counts"].items():
            labels = torch.randint(0, len(counts), shape[:2], generator=draws)
            tensors[f"labels.{batch}.{data}"] = labels
    for data in LGLA:
        counts = torch.tensor(settings["counts"][data]).double()
        tensors[f"labels.{SAMPLES}.{data}"] = torch.multinomial(counts, SAMPLES, replacement=True, generator=draws)
        cosines = torch.rand(SAMPLES, 5, len(counts), generator=draws, dtype=torch.float64) - 0.5
        tensors[f"logits.{data}"] = SCALE * cosines
    coarse = torch.randint(0, 256, (PICTURES, 3, 9, 7), generator=draws, dtype=torch.uint8)
    tensors["pictures"] = coarse.repeat_interleave(8, 2).repeat_interleave(9, 3)
    return tensors
