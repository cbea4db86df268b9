"""What is compared with H2T: configs of theirs and of ours that mean the same, and the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tailtune.configs import CfgNode, load_configs
from tailtune.datasets.build_data import build_info
from tailtune.models import resolve
from tailtune.parity.experts.cases import STEPS
from tailtune.parity.job import Case, Tensors
from tailtune.trainers.option_schema import declared

RATIOS = {"cifar100_ir100": "001", "cifar100_ir50": "002", "cifar100_ir200": "0005"}
"""Our data config → the imbalance in the names of their configs."""
MODELS = {1: "resnet32_mixup", 2: "resnet32_h2t"}
"""Stage → our model config."""
SHARES = (0.0, 0.25, 0.3, 1.0)
"""Shares of the channels that are overwritten, in stage 2."""
WIDTHS = (64, 48, 10, 100)
"""Numbers of channels."""
TAILS = [f"{name}_ir{ratio}" for name in ("cifar10", "cifar100") for ratio in (10, 50, 100, 200)]
BATCH, SAMPLES, TESTED = 8, 16, 2000
"""Images of a step, of a loss of logits, and of the test figures."""
CLASSES = {"cifar10_ir100": 10, "cifar100_ir100": 100}
"""The data of the losses → their number of classes."""
NEVER, REWEIGHTED = -1, 160
LOSSES: dict[str, Case] = {
    "CE": {"change": {"type": "CrossEntropyLoss"}, "our_options": {}},
    "CE, reweighted": {"change": {"type": "CrossEntropyLoss", "reweight_CE": True}, "our_options": {"drw_epoch": 0}},
    "LDAM": {"change": {"type": "LDAMLoss"}, "our_options": {"loss_type": "LDAM", "scale": 30}},
    "LDAM, reweighted": {
        "change": {"type": "LDAMLoss", "LDAM.reweight_epoch": REWEIGHTED},
        "our_options": {"loss_type": "LDAM", "scale": 30, "drw_epoch": 0},
    },
    "label-aware smoothing": {
        "change": {"type": "LabelAwareSmoothing", "smooth_head": 0.4, "smooth_tail": 0.1},
        "our_options": {"loss_type": "LAS", "smooth_head": 0.4, "smooth_tail": 0.1},
    },
}
"""Losses of one classifier: changes below `loss` of their config, and our options."""
RIDE = {"method": "ride", "num_experts": 3, "loss_type": "LDAM", "scale": 30, "ride.reweight_factor": 0.05}
RESLT = {"method": "reslt", "num_experts": 3, "reslt.beta": 0.99}
RESLT_GROUPS = {"cifar10_ir100": {"reslt.medium_from": 0.2, "reslt.few_from": 0.4}, "cifar100_ir100": {}}


def config_of(data: str, model: str) -> CfgNode:
    """Our config of a data set and a model."""
    return resolve(load_configs(data, model, [], declared())[-1])


def ask(_: Mapping[str, Path]) -> tuple[dict[str, list[Case]], Case]:
    """All cases by kind, and the settings that they share."""
    cases: dict[str, list[Case]] = {
        "stages": _stages(),
        "masks": [
            _case(f"channels of {width}, experts: {experts}", "", "", width=width, experts=experts)
            for width in WIDTHS
            for experts in (1, 3)
        ],
        "losses": _losses(),
        "rates": [_case("", data, MODELS[stage], **_config(data, stage)) for data in RATIOS for stage in MODELS],
        "figures": [_case("test figures", "cifar100_ir100", "", **_config("cifar100_ir100", 2))],
        "tails": [_case("long tail", data, "", factor=config_of(data, "resnet32_mixup").imb_factor) for data in TAILS],
    }
    counts = {
        data: build_info(config_of(data, "resnet32_mixup")).class_counts.tolist() for data in {**RATIOS, **CLASSES}
    }
    return cases, {"counts": counts, "epochs": STEPS, "reweighted": REWEIGHTED}


def _case(name: str, data: str, model: str, **more: object) -> Case:
    case: Case = {"repository": "h2t", "name": name, "data": data, "model": model, "change": {}, "our_options": {}}
    return case | more


def _config(data: str, stage: int) -> Case:
    method = "ce_mixup" if stage == 1 else "ce_H2T"
    return {"stage": stage, "config": f"config/cifar100/cifar100_imb{RATIOS[data]}_stage{stage}_{method}.yaml"}


def _stages() -> list[Case]:
    """Both stages of every config; of the second also every share, with batch norms that shift or are held."""
    cases = [
        _case(f"stage {stage}", data, MODELS[stage], **_config(data, stage)) for data in RATIOS for stage in MODELS
    ]
    for share in SHARES:
        for shift in (True, False):
            name = f"stage 2, share {share:g}, batch norms {'shift' if shift else 'are held'}"
            options: Case = {"h2t.ratio": share, "h2t.shift_bn": shift} | ({} if share else {"pair_sampler": "none"})
            sides = {"change": {"H2T": share, "shift_bn": shift}, "our_options": options}
            cases.append(_case(name, "cifar100_ir100", MODELS[2], **sides, **_config("cifar100_ir100", 2)))
    return cases


def _losses() -> list[Case]:
    cases = []
    for data in CLASSES:
        rows = {name: {**sides, "experts": 1} for name, sides in LOSSES.items()}
        for factor in (-0.45, -0.2, 0.0):
            for epoch in (NEVER, REWEIGHTED):
                change = {"type": "RIDELoss", "RIDE.additional_diversity_factor": factor}
                change |= {"RIDE.reweight": epoch != NEVER, "RIDE.reweight_epoch": epoch}
                options = RIDE | {"ride.diversity": factor} | ({} if epoch == NEVER else {"drw_epoch": 0})
                name = f"RIDE, diversity factor {factor}{'' if epoch == NEVER else ', reweighted'}"
                rows[name] = {"change": change, "our_options": options, "experts": 3}
        rows["ResLT"] = {"change": {"type": "ResLoss"}, "our_options": RESLT | RESLT_GROUPS[data], "experts": 3}
        cases += [_case(f"loss of logits, {name}", data, "resnet32_ce", **sides) for name, sides in rows.items()]
    return cases


def inputs(_: Mapping[str, Any]) -> Tensors:
    """The inputs of both sides, from one seed.

    Images and second images [4, B, 3, 32, 32] and labels [4, B] of the networks; logits [S, 3, C] and labels [S] of the
    losses; logits [N, 100] in fp32 and labels [N] of a test.
    """
    draws = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    shape = (STEPS + 1, BATCH, 3, 32, 32)
    for name in ("images", "partners"):
        tensors[name] = torch.randn(shape, generator=draws, dtype=torch.float64)
    tensors["labels"] = torch.randint(0, 100, shape[:2], generator=draws)
    for data, classes in CLASSES.items():
        tensors[f"logits.{data}"] = 5 * torch.randn(SAMPLES, 3, classes, generator=draws, dtype=torch.float64)
        tensors[f"labels.{data}"] = torch.randint(0, classes, (SAMPLES,), generator=draws)
    labels = tensors["test.labels"] = torch.randint(0, 100, (TESTED,), generator=draws)
    tensors["test.logits"] = torch.randn(TESTED, 100, generator=draws)
    tensors["test.logits"][torch.arange(TESTED), labels] += 3 * torch.rand(TESTED, generator=draws)
    return tensors
