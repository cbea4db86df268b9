"""What parity_experts.py compares: configs of the originals and of ours that mean the same, and the inputs."""

import re
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]

STEPS = 3
SIZES = {"resnet32": (8, 32), "resnet10": (4, 224)}  # images a step and their side; (2, 224) for larger networks
LARGE = (2, 224)
VIEWS, VIEW_BATCHES, VIEW_BATCH, VIEW_CLASSES = 5, 3, 8, 100
"""Epochs, batches an epoch and images a batch of the test-time aggregation."""
CLASSES = {"cifar100_ir100": 100, "imagenet_lt": 1000, "places_lt": 365, "inat2018": 8142}
REDUCED = {"arch;args;reduce_dimension": 1, "arch;args;num_experts": 3}
"""What the READMEs' commands add: --reduce_dimension 1 --num_experts 3."""
NO_DROPOUT = "dropout set to 0 on both sides"
TEACHER = "the original leaves its teacher in training mode: compared after it was put into evaluation mode"
FACTOR = "diversity factor"
SHARED: Case = {"method": "batchformer", "batchformer.inner": "classify", "batchformer.mode": "mean"}
SHARED |= {
    "batchformer.dropout": 0,
    "loss_type": "BS",
    "lr_factors": "{mixer: 0.1}",
    "lr": 0.05,
    "weight_decay": 5e-4,
    "nesterov": False,
    "schedule": "cosine",
}
SHARED |= {"lr_steps": "none", "warmup_epochs": 0, "num_epochs": 90, "batch_size": 128}
"""BatchFormer's config/ImageNet_LT/balanced_softmax_resnet10.yaml --add_bt 1."""

SADE_TIME = {  # script → our data config, whose adapt_* values are compared with the script's own
    "test_training_cifar": ("cifar100_ir100", "resnet32_sade", "test_time_cifar100_ir100_sade.json"),
    "test_training_imagenet": ("imagenet_lt", "resnext50_sade", "test_time_imagenet_lt_resnext50_sade.json"),
    "test_training_places": ("places_lt", "resnet152_sade", "test_time_places_lt_resnet152_sade.json"),
    "test_training_inat": ("inat2018", "resnet50_sade", "test_time_iNaturalist_resnet50_sade.json"),
}


def cases() -> list[Case]:
    """Every network, method and loss of the three repositories."""
    return [*_ride_cifar(), *_ride_large(), *_sade(), *_batchformer()]


def _ride_cifar() -> list[Case]:
    ride, cifar = "config_imbalance_cifar100_ride.json", "cifar100_ir100"
    found = []
    for epoch, when in ((160, "before reweighting"), (161, "reweighted")):
        for factor in (-0.45, -0.2, 0.0):
            theirs = {"loss;args;additional_diversity_factor": factor}
            name = f"RIDE, {FACTOR} {factor}, {when}"
            found.append(_case("ride", name, ride, cifar, "resnet32_ride", theirs, {"ride.diversity": factor}, epoch))
        ldam = ("config_imbalance_cifar100_ldam_drw.json", cifar, "resnet32_ldam_drw")
        found.append(_case("ride", f"LDAM-DRW, {when}", *ldam, readme={}, epoch=epoch))
        distill = ("config_imbalance_cifar100_distill_ride.json", cifar, "resnet32_ride_distill")
        times = {"distill.times_experts": True}
        found.append(_case("ride", f"RIDE + distillation × E, {when}", *distill, ours=times, epoch=epoch, note=TEACHER))
    teacher = ("config_imbalance_cifar100_ride_teacher.json", cifar, "resnet32_ride_teacher")
    found.append(_case("ride", "RIDE, 6 experts", *teacher, readme={}))
    found.append(
        _case("ride", "expert assignment", "config_imbalance_cifar100_ride_ea.json", cifar, "resnet32_ride_ea")
    )
    return found


def _ride_large() -> list[Case]:
    found = []
    for net in ("resnet10", "resnet50", "resnext50"):
        given = (f"config_imagenet_lt_{net}_ride.json", "imagenet_lt", f"{net}_ride")
        found.append(_case("ride", "RIDE, reweighted", *given, epoch=81))
    ea = ("config_imagenet_lt_resnet10_ride_ea.json", "imagenet_lt", "resnet10_ride_ea")
    found.append(_case("ride", "expert assignment", *ea))
    distill = ("config_imagenet_lt_resnet10_distill_ride.json", "imagenet_lt", "resnet10_ride_distill")
    found.append(_case("ride", "RIDE + distillation × E", *distill, ours={"distill.times_experts": True}, note=TEACHER))
    return found


def _sade() -> list[Case]:
    chosen = (
        ("config_cifar100_ir100_sade.json", "cifar100_ir100", "resnet32_sade"),
        ("config_imagenet_lt_resnext50_sade.json", "imagenet_lt", "resnext50_sade"),
        ("config_iNaturalist_resnet50_sade.json", "inat2018", "resnet50_sade"),
    )  # not Places' ResNet-152: more of the same blocks, and 12 GB in float64
    return [_case("sade", "SADE", *each, readme={}) for each in chosen]


def _batchformer() -> list[Case]:
    found = []
    for add, mode in ((1, "replace"), (33, "sum")):
        theirs, ours = {"arch;args;add_bt": add}, {"batchformer.mode": mode, "batchformer.dropout": 0}
        for config, data, model in (
            ("config_imbalance_cifar100_ride.json", "cifar100_ir100", "resnet32_ride_batchformer"),
            ("config_imagenet_lt_resnet10_ride.json", "imagenet_lt", "resnet10_ride_batchformer"),
        ):
            found.append(
                _case("batchformer", f"BatchFormer, add_bt {add}", config, data, model, theirs, ours, note=NO_DROPOUT)
            )
    distill = ("config_imagenet_lt_resnet10_distill_ride.json", "imagenet_lt", "resnet10_ride_distill")
    found.append(_case("batchformer", "RIDE + distillation × 1", *distill, note=TEACHER))
    note = f"{NO_DROPOUT}; the original adds three means, here weighted by a third to be the mean of 2B"
    shared = ("BatchFormer, shared classifier", "", "imagenet_lt", "resnet10_ce")
    return [*found, _case("balanced", *shared, ours=SHARED, note=note)]


def traces() -> list[Case]:
    """One case for each config of the originals: its learning rates."""
    found = {(case["repository"], case["config"]): case for case in cases() if case["config"]}
    more = []
    for given in ("imagenet_lt_resnet50", "imagenet_lt_resnext50", "iNaturalist_resnet50"):
        net, data = given.split("_")[-1], "inat2018" if given.startswith("iNat") else "imagenet_lt"
        for end in ("", "_distill", "_ea"):
            name = f"config_{given}_ride_ea.json" if end == "_ea" else f"config_{given}{end}_ride.json"
            more.append(_case("ride", "", name, data, f"{net}_ride{end}"))
        more.append(_case("batchformer", "", f"config_{given}_ride.json", data, f"{net}_ride_batchformer"))
    more.append(_case("sade", "", "config_places_lt_resnet152_sade.json", "places_lt", "resnet152_sade"))
    for ratio in (10, 50):
        config = f"config_cifar100_ir{ratio}_sade.json"
        more.append(_case("sade", "", config, "cifar100_ir100", "resnet32_sade") | {"data": f"cifar100_ir{ratio}"})
    return list((found | {(case["repository"], case["config"]): case for case in more}).values())


def _case(
    repository: str,
    name: str,
    config: str,
    data: str,
    model: str,
    theirs: Case | None = None,
    ours: Case | None = None,
    epoch: int = 1,
    readme: Case = REDUCED,
    note: str = "",
) -> Case:
    """`epoch` is the original's, from 1 on; `theirs`: path in its config → value."""
    net = model.split("_")[0]
    batch, side = SIZES.get(net, LARGE)
    case = {"repository": repository, "name": name, "config": config, "data": data, "model": model, "epoch": epoch}
    case |= {"theirs": {**readme, **(theirs or {})}, "ours": ours or {}, "classes": CLASSES[data], "note": note}
    case["file"] = re.sub(r"\W+", "_", f"{repository} {data} {model} {name}") + ".safetensors"
    return case | {"images": f"images.{batch}.{side}", "labels": f"labels.{batch}.{CLASSES[data]}"}


def inputs() -> dict[str, Tensor]:
    """Images [4, B, 3, H, W], labels [4, B], and logits of two views of each image [epochs, batches, B, 3, C]."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for batch, side in (*SIZES.values(), LARGE):
        shape = (STEPS + 1, batch, 3, side, side)
        found[f"images.{batch}.{side}"] = torch.randn(shape, generator=generator, dtype=torch.float64)
        for count in CLASSES.values():
            labels = torch.randint(0, count, (STEPS + 1, batch), generator=generator)
            found[f"labels.{batch}.{count}"] = labels
    shape = (VIEWS, VIEW_BATCHES, VIEW_BATCH, 3, VIEW_CLASSES)
    first = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    spread = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64).view(3, 1)  # the first expert is the most stable
    found["view1"] = first
    found["view2"] = first + spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    shape = (VIEWS, VIEW_BATCHES, VIEW_BATCH, 3, 32, 32)
    for name in ("crop1", "crop2"):
        found[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return found
