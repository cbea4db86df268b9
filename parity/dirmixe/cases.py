"""What parity_dirmixe.py compares: configs of the original and of ours that mean the same, and the inputs."""

from pathlib import Path

import torch
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs import load_configs
from tailtune.datasets import build_info
from tailtune.models import resolve
from tailtune.parity.experts.cases import STEPS, Case
from tailtune.trainers.options import declared

CONFIGS = {  # data → config of theirs, ours, images a step and side
    "cifar10_ir100": ("cifar10.json", "resnet32_dirmixe", 8, 32),
    "cifar100_ir100": ("cifar100.json", "resnet32_dirmixe", 8, 32),
    "imagenet_lt": ("imagenet.json", "resnext50_dirmixe", 2, 224),
    "inat2018": ("inaturalist.json", "resnet50_dirmixe", 2, 224),
}
FINAL = {"cifar10_ir100": 161, "cifar100_ir100": 161, "imagenet_lt": 145, "inat2018": 81}
"""The first epoch with semi-variance, from 1 on."""
RUNS = (200, 180, 100)
SAMPLES = 16
SETS = {"inat2018": ("label_field", "id")}  # as the published lists, whose names of species are in another file
INAT = {"loss;args;dataset_type": "ImageNet"}


def config_of(data: str, *words: object) -> CfgNode:
    return resolve(load_configs(data, CONFIGS[data][1], [str(each) for each in words], declared())[-1])


def case(data: str, name: str, **more: object) -> Case:
    config, model, batch, side = CONFIGS[data]
    found = {"repository": "dirmixe", "name": name, "config": f"train/{config}", "data": data, "model": model}
    found |= {"theirs": INAT if data == "inat2018" else {}, "ours": {}, "note": "", "images": f"images.{batch}.{side}"}
    return found | {"labels": f"labels.{batch}.{data}", "file": f"{data}.{name}.safetensors".replace(" ", "_")} | more


def settings(cfg: CfgNode) -> Case:
    """Our options as arguments of their loss."""
    own = cfg.dirmixe
    return {"lambda_var": own.variance, "power": own.power, "trials": own.draws, "alpha_sum": own.concentration}


def job(checkout: Path, only: str) -> Case:
    """What both sides do, by kind."""
    cfgs = {data: config_of(data) for data in CONFIGS}
    counts = {data: build_info(cfg).class_counts.tolist() for data, cfg in cfgs.items()}
    phased = [(data, when) for data in CONFIGS for when in ("warm", "final")]
    epochs = {"warm": dict.fromkeys(CONFIGS, 1), "final": FINAL}
    cifar = [data for data in CONFIGS if data.startswith("cifar")]
    asked: Case = {"counts": counts, "phases": RUNS}
    asked["pool"] = [
        case(
            data, "pool", counts=counts[data], chooses=True, per_epoch=per_epoch, epochs=3, theirs=settings(cfgs[data])
        )
        for data, per_epoch in zip(cifar, (97, 85), strict=True)
    ]
    large = {"counts": list(range(1000, 0, -1)), "chooses": False, "per_epoch": 4, "epochs": 3}
    large["theirs"] = settings(cfgs["imagenet_lt"]) | {"dataset_type": "ImageNet"}
    asked["pool"].append(case("imagenet_lt", "pool of classes without ties", **large))
    asked["losses"] = [
        case(data, f"loss of logits, {when}", counts=counts[data], epoch=161 if when == "final" else 1)
        | {"theirs": settings(cfgs[data]), "logits": f"logits.{data}", "labels": f"labels.{SAMPLES}.{data}"}
        for data, when in phased
    ]
    asked["cases"] = [case(data, f"DirMixE, {when}", epoch=epochs[when][data]) for data, when in phased]
    asked["rates"] = [case(data, "") for data in CONFIGS]
    asked["sets"] = [_sets(data, checkout) for data in CONFIGS]
    for kind in ("pool", "losses", "cases", "rates", "sets"):
        asked[kind] = [each for each in asked[kind] if only in f"{kind} {each['name']} {each['data']}"]
    return asked


def _sets(data: str, checkout: Path) -> Case:
    cfg = config_of(data, *SETS.get(data, ()))
    counts = build_info(cfg).class_counts.tolist()
    kind = {"cifar10_ir100": "CIFAR10Data", "cifar100_ir100": "CIFAR100Data"}
    kind |= {"imagenet_lt": "ImageNetData", "inat2018": "iNaturalist"}
    script = "cifar" if data.startswith("cifar") else "imagenet" if data == "imagenet_lt" else "inat"
    lists = {"imagenet_lt": "ImageNet_LT/ImageNet_LT_uniform.txt", "inat2018": "iNaturalist18/iNaturalist18_val.txt"}
    more = {"script": f"test_training_{script}_dirmixe", "loader": f"DirichletImbalance{kind[data]}Loader"}
    path = str(checkout / "data_txt" / lists[data]) if data in lists else ""
    return case(data, "Dirichlet test sets", ratio=1 / cfg.dirichlet_ratio, list=path, counts=counts, **more)


def inputs(counts: dict[str, list[int]]) -> dict[str, Tensor]:
    """Images and labels of the networks, logits and labels of the losses."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for data, (_, _, batch, side) in CONFIGS.items():
        classes, shape = len(counts[data]), (STEPS + 1, batch, 3, side, side)
        found[f"images.{batch}.{side}"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        found[f"labels.{batch}.{data}"] = torch.randint(0, classes, shape[:2], generator=generator)
        found[f"labels.{SAMPLES}.{data}"] = torch.randint(0, classes, (SAMPLES,), generator=generator)
        found[f"logits.{data}"] = 5 * torch.randn(SAMPLES, 3, classes, generator=generator, dtype=torch.float64)
    return found
