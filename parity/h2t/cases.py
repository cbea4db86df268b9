"""What parity_h2t.py compares: configs of the original and of ours that mean the same, and the inputs."""

import re
from typing import Any

import torch
from torch import Tensor

from tailtune.configs import load_configs
from tailtune.datasets import build_info
from tailtune.models import resolve
from tailtune.parity.experts.cases import STEPS, Case
from tailtune.trainers.options import declared

RATIOS = {"cifar100_ir100": "001", "cifar100_ir50": "002", "cifar100_ir200": "0005"}
"""Data → as their configs write it."""
MODELS = {1: "resnet32_mixup", 2: "resnet32_h2t"}
SHARES = (0.0, 0.25, 0.3, 1.0)
WIDTHS = (64, 48, 10, 100)
TAILS = [f"{name}_ir{ratio}" for name in ("cifar10", "cifar100") for ratio in (10, 50, 100, 200)]
BATCH, SAMPLES, TESTED, CLASSES = 8, 16, 2000, {"cifar10_ir100": 10, "cifar100_ir100": 100}
NEVER, REWEIGHTED = -1, 160
LOSSES: dict[str, Case] = {
    "CE": {"theirs": {"type": "CrossEntropyLoss"}, "ours": {}},
    "CE, reweighted": {"theirs": {"type": "CrossEntropyLoss", "reweight_CE": True}, "ours": {"drw_epoch": 0}},
    "LDAM": {"theirs": {"type": "LDAMLoss"}, "ours": {"loss_type": "LDAM", "scale": 30}},
    "LDAM, reweighted": {
        "theirs": {"type": "LDAMLoss", "LDAM.reweight_epoch": REWEIGHTED},
        "ours": {"loss_type": "LDAM", "scale": 30, "drw_epoch": 0},
    },
    "label-aware smoothing": {
        "theirs": {"type": "LabelAwareSmoothing", "smooth_head": 0.4, "smooth_tail": 0.1},
        "ours": {"loss_type": "LAS", "smooth_head": 0.4, "smooth_tail": 0.1},
    },
}
"""Of one classifier: what is set below `loss` of their config, and what in ours."""
RIDE = {"method": "ride", "num_experts": 3, "loss_type": "LDAM", "scale": 30, "ride.reweight_factor": 0.05}
RESLT = {"method": "reslt", "num_experts": 3, "reslt.beta": 0.99}
GROUPS = {"cifar10_ir100": {"reslt.medium_from": 0.2, "reslt.few_from": 0.4}, "cifar100_ir100": {}}


def config_of(data: str, model: str, ours: Case | None = None) -> Any:
    words = [str(each) for pair in (ours or {}).items() for each in pair]
    return resolve(load_configs(data, model, words, declared())[-1])


def case(name: str, data: str, model: str, **more: object) -> Case:
    found = {"repository": "h2t", "name": name, "data": data, "model": model, "theirs": {}, "ours": {}, "note": ""}
    found["file"] = re.sub(r"\W+", "_", f"{data} {name}") + ".safetensors"
    return found | more


def job(only: str) -> Case:
    """What both sides do, by kind."""
    kinds: dict[str, list[Case]] = {"stages": _stages(), "losses": _losses(), "rates": _rates()}
    kinds["masks"] = [
        case(f"channels of {width}, experts: {experts}", "", "", width=width, experts=experts)
        for width in WIDTHS
        for experts in (1, 3)
    ]
    kinds["figures"] = [case("test figures", "cifar100_ir100", "", **_config("cifar100_ir100", 2))]
    kinds["tails"] = [
        case("long tail", data, "", factor=config_of(data, "resnet32_mixup").imb_factor) for data in TAILS
    ]
    asked: Case = {
        kind: [each for each in cases if only in f"{kind} {each['name']} {each['data']}"]
        for kind, cases in kinds.items()
    }
    counts = {data: build_info(config_of(data, "resnet32_mixup")).class_counts.tolist() for data in (*RATIOS, *CLASSES)}
    return asked | {"counts": counts, "epochs": STEPS, "reweighted": REWEIGHTED}


def _config(data: str, stage: int) -> Case:
    kind = "ce_mixup" if stage == 1 else "ce_H2T"
    return {"stage": stage, "config": f"config/cifar100/cifar100_imb{RATIOS[data]}_stage{stage}_{kind}.yaml"}


def _stages() -> list[Case]:
    """The second stage of every share, with and without batch norms that shift; both of every config as it is."""
    found = [case(f"stage {stage}", data, MODELS[stage], **_config(data, stage)) for data in RATIOS for stage in MODELS]
    for share in SHARES:
        for shift in (True, False):
            name = f"stage 2, share {share:g}, batch norms {'shift' if shift else 'are held'}"
            ours: Case = {"h2t.ratio": share, "h2t.shift_bn": shift} | ({} if share else {"pair_sampler": "none"})
            more = {"theirs": {"H2T": share, "shift_bn": shift}, "ours": ours, **_config("cifar100_ir100", 2)}
            found.append(case(name, "cifar100_ir100", MODELS[2], **more))
    return found


def _rates() -> list[Case]:
    return [case("", data, MODELS[stage], **_config(data, stage)) for data in RATIOS for stage in MODELS]


def _losses() -> list[Case]:
    found = []
    for data in CLASSES:
        rows = {name: {**each, "experts": 1} for name, each in LOSSES.items()}
        for factor in (-0.45, -0.2, 0.0):
            for epoch in (NEVER, REWEIGHTED):
                theirs = {"type": "RIDELoss", "RIDE.additional_diversity_factor": factor}
                theirs |= {"RIDE.reweight": epoch != NEVER, "RIDE.reweight_epoch": epoch}
                ours = RIDE | {"ride.diversity": factor} | ({} if epoch == NEVER else {"drw_epoch": 0})
                name = f"RIDE, diversity factor {factor}{'' if epoch == NEVER else ', reweighted'}"
                rows[name] = {"theirs": theirs, "ours": ours, "experts": 3}
        rows["ResLT"] = {"theirs": {"type": "ResLoss"}, "ours": RESLT | GROUPS[data], "experts": 3}
        found += [case(f"loss of logits, {name}", data, "resnet32_ce", **each) for name, each in rows.items()]
    return found


def inputs() -> dict[str, Tensor]:
    """Images of the networks and those beside them, logits and labels of the losses, logits of a test in fp32."""
    draws = torch.Generator().manual_seed(0)
    shape, found = (STEPS + 1, BATCH, 3, 32, 32), {}
    for name in ("images", "partners"):
        found[name] = torch.randn(shape, generator=draws, dtype=torch.float64)
    found["labels"] = torch.randint(0, 100, shape[:2], generator=draws)
    for data, count in CLASSES.items():
        found[f"logits.{data}"] = 5 * torch.randn(SAMPLES, 3, count, generator=draws, dtype=torch.float64)
        found[f"labels.{data}"] = torch.randint(0, count, (SAMPLES,), generator=draws)
    found["test.labels"] = torch.randint(0, 100, (TESTED,), generator=draws)
    found["test.logits"] = torch.randn(TESTED, 100, generator=draws)
    found["test.logits"][torch.arange(TESTED), found["test.labels"]] += 3 * torch.rand(TESTED, generator=draws)
    return found
