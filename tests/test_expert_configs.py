"""The model configs of the expert systems: published recipes, sizes and costs, chains (experts.md §1.6, §3.1)."""

import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import slow_except
from yacs.config import CfgNode

from tailtune.benchmarks.shipped import PAIRS
from tailtune.configs import load_configs, names, values_of
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model, resolve
from tailtune.trainers.config_checks import check
from tailtune.trainers.dry_run import dry_run
from tailtune.trainers.methods import Earlier, Method, build_method
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer, set_lr
from tailtune.trainers.option_schema import declared
from tailtune.trainers.run import run
from tailtune.trainers.storage.checkpoint import trained_state

Config = Callable[..., CfgNode]
KINDS = ("_ride", "_sade", "_dirmixe", "_batchformer", "_ce", "_ldam_drw", "_bs", "_crt", "_lws", "_tau_norm")
KINDS += ("_balpoe", "_lgla", "_mixup", "_dr", "_h2t", "_mislas", "_gcl", "_reslt")
EXPERTS = [pair for pair in PAIRS if any(kind in pair[1] for kind in KINDS)]
EXPERTS += [("cifar10_ir100", model) for _, model in EXPERTS if model.startswith("resnet32")]
EXPERTS += [("imagenet_lt", f"clip_vit_b16_{kind}") for kind in ("ride", "sade", "dirmixe", "balpoe", "batchformer")]

STEPS = {"schedule": "multistep", "nesterov": True, "momentum": 0.9, "prec": "fp32", "pretrained": None}
CIFAR = STEPS | {"num_epochs": 200, "batch_size": 128, "lr": 0.1, "lr_steps": [160, 180], "augment": "cifar"}
LARGE = STEPS | {"num_epochs": 100, "lr_steps": [60, 80], "lr_gamma": 0.1, "warmup_epochs": 5, "weight_decay": 2e-4}
RIDE = {"loss_type": "LDAM", "num_experts": 3, "reduce_dimension": True, "scale": 30, "classifier": "CosineClassifier"}
RIDE_C = CIFAR | RIDE | {"lr_gamma": 0.01, "drw_epoch": 160, "ride.diversity": -0.45, "ride.reweight_factor": 0.05}
RIDE_I = LARGE | RIDE | {"drw_epoch": 80, "ride.diversity": -0.2, "ride.reweight_factor": 0.02, "augment": "imagenet"}
RIDE_I |= {"batch_size": 256, "lr": 0.1}
RIDE_N = RIDE_I | {"batch_size": 512, "lr": 0.2, "ride.reweight_factor": 0.015, "augment": "inat"}
EA = {"num_epochs": 5, "batch_size": 512, "lr": 0.01, "weight_decay": 5e-4, "schedule": "cosine", "nesterov": True}
EA |= {"method": "ride_ea", "sampler": "balanced", "ride_ea.pos_weight": 100}
SADE = {"method": "sade", "loss_type": "CE", "num_experts": 3, "scale": 30, "nesterov": True, "adapt": "sade"}
SADE |= {"test_dists": ["all"]}
DIRMIXE = SADE | {"method": "dirmixe", "dirmixe.power": 1.3, "dirmixe.concentration": 1e4, "reduce_dimension": True}
DIRMIXE |= {"dirmixe.warm": 0.8, "dirmixe.draws": 60, "dirmixe.variance": 1, "lr_gamma": 0.1}
DIRMIXE_C = DIRMIXE | CIFAR | {"warmup_epochs": 5}
BALPOE = {"method": "mixup", "mixup.inner": "balpoe", "loss_type": "CE", "num_experts": 3, "scale": 30}
BALPOE |= {"reduce_dimension": False, "adapt": None, "test_dists": ["all"], "balpoe.taus": None, "nesterov": True}
BALPOE_C = STEPS | BALPOE | {"num_epochs": 200, "batch_size": 128, "lr": 0.1, "lr_steps": [160, 180], "lr_gamma": 0.1}
BALPOE_C |= {"warmup_epochs": 5, "weight_decay": 5e-4, "balpoe.tau_min": 0, "balpoe.tau_max": 2, "augment": "cifar"}
BALPOE_I = BALPOE | {"num_epochs": 180, "batch_size": 64, "lr": 0.025, "weight_decay": 5e-4, "schedule": "cosine"}
BALPOE_I |= {"mixup.alpha": 0.3, "balpoe.tau_min": 0, "balpoe.tau_max": 2.5, "augment": "imagenet", "warmup_epochs": 0}
BALPOE_N = BALPOE_I | {"mixup.alpha": 0.2, "balpoe.tau_min": -1, "balpoe.tau_max": 3, "batch_size": 512, "lr": 0.2}
BALPOE_N |= {"num_epochs": 100, "weight_decay": 2e-4, "augment": "inat"}
LONG_C = {"num_epochs": 400, "lr_steps": [320, 360], "warmup_epochs": 10}
LONG = {"num_epochs": 400, "augment": "imagenet_randaug"}
LGLA = {"method": "lgla", "loss_type": "CE", "num_experts": 3, "scale": 30, "reduce_dimension": False, "nesterov": True}
LGLA_C = LGLA | {"num_epochs": 400, "lr_steps": [320, 360], "warmup_epochs": 5, "batch_size": 128, "lr": 0.1}
LGLA_C |= {"weight_decay": 2e-4, "augment": "cifar_auto_cutout", "lgla.tau": 2.5}
LGLA_I = LGLA | {"num_epochs": 180, "batch_size": 64, "lr": 0.025, "weight_decay": 5e-4, "schedule": "cosine"}
H2T = {"method": "h2t", "h2t.ratio": 0.25, "h2t.shift_bn": True, "sampler": "balanced", "pair_sampler": "shuffle"}
H2T |= {"num_epochs": 10, "lr": 0.02, "batch_size": 128, "momentum": 0.9, "nesterov": False, "schedule": "cosine"}
RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("cifar100_ir100", "resnet32_ride"): RIDE_C | {"method": "ride", "warmup_epochs": 5, "weight_decay": 5e-4},
    ("cifar100_ir100", "resnet32_ride_teacher"): RIDE_C | {"method": "ride", "num_experts": 6, "warmup_epochs": 5},
    ("cifar100_ir100", "resnet32_ride_distill"): RIDE_C
    | {"method": "distill", "distill.temperature": 1.5, "distill.weight": 1, "warmup_epochs": 20},
    ("cifar100_ir100", "resnet32_ldam_drw"): CIFAR
    | {"loss_type": "LDAM", "drw_epoch": 160, "num_experts": 1, "reduce_dimension": False, "scale": 30}
    | {"weight_decay": 2e-4, "nesterov": False, "lr_gamma": 0.01, "warmup_epochs": 5},
    ("cifar100_ir100", "resnet32_ride_ea"): EA | {"ride_ea.top_choices": 30},
    ("imagenet_lt", "resnet10_ride"): RIDE_I,
    ("imagenet_lt", "resnet50_ride_teacher"): RIDE_I | {"num_experts": 6},
    ("imagenet_lt", "resnet50_ride_distill"): RIDE_I | {"method": "distill"},
    ("imagenet_lt", "resnext50_ride"): RIDE_I,
    ("imagenet_lt", "resnet10_ride_ea"): EA | {"ride_ea.top_choices": 30, "augment": "imagenet"},
    ("imagenet_lt", "resnext50_ride_ea"): EA | {"ride_ea.top_choices": 50, "augment": "imagenet"},
    ("inat2018", "resnet50_ride_ea"): EA | {"ride_ea.top_choices": 50, "augment": "inat"},
    ("inat2018", "resnet50_ride"): RIDE_N,
    ("inat2018", "resnet50_ride_distill"): RIDE_N | {"distill.temperature": 1.5},
    ("imagenet_lt", "resnet10_ride_batchformer"): RIDE_I
    | {"method": "batchformer", "batchformer.inner": "ride", "batch_size": 512, "num_epochs": 120},
    ("imagenet_lt", "resnet50_ride_batchformer"): RIDE_I | {"batch_size": 400, "micro_batch_size": 100},
    ("imagenet_lt", "resnext50_ride_batchformer"): RIDE_I | {"batchformer.mode": "replace"},
    ("inat2018", "resnet50_ride_batchformer"): RIDE_N | {"batch_size": 128},
    **{
        (f"cifar100_ir{ratio}", "resnet32_sade"): CIFAR
        | SADE
        | {"sade.inverse_strength": 2, "lr_gamma": 0.1, "warmup_epochs": 5, "weight_decay": 5e-4}
        | {"reduce_dimension": True, "adapt_lr": 0.1, "adapt_weight_decay": 5e-4, "adapt_entropy": 0}
        for ratio in (10, 50, 100)
    },
    ("imagenet_lt", "resnext50_sade"): SADE
    | {"sade.inverse_strength": 2, "batch_size": 64, "lr": 0.025, "weight_decay": 5e-4, "num_epochs": 180}
    | {"schedule": "cosine", "warmup_epochs": 0, "reduce_dimension": True, "augment": "imagenet", "adapt_lr": 0.025},
    ("places_lt", "resnet152_sade"): SADE
    | {"sade.inverse_strength": 1, "batch_size": 128, "lr": 0.01, "lr_factors": {"tuner": 0.1}, "weight_decay": 4e-4}
    | {"num_epochs": 30, "schedule": "multistep", "lr_steps": [10, 20], "lr_gamma": 0.1, "warmup_epochs": 0}
    | {"reduce_dimension": False, "expert_split": None, "augment": "imagenet", "adapt_lr": 0.01},
    ("inat2018", "resnet50_sade"): LARGE
    | SADE
    | {"sade.inverse_strength": 1, "batch_size": 512, "lr": 0.2, "augment": "inat", "adapt_lr": 0.2},
    ("cifar100_ir10", "resnet32_balpoe"): BALPOE_C | {"mixup.alpha": 0.4},
    ("cifar10_ir50", "resnet32_balpoe"): BALPOE_C | {"mixup.alpha": 0.8},
    ("cifar100_ir100", "resnet32_balpoe_long"): BALPOE_C | LONG_C | {"mixup.alpha": 0.4, "augment": "cifar_auto"},
    ("cifar10_ir100", "resnet32_balpoe_long"): BALPOE_C | LONG_C | {"mixup.alpha": 0.8, "augment": "cifar_crop"},
    ("imagenet_lt", "resnet50_balpoe"): BALPOE_I,
    ("imagenet_lt", "resnext50_balpoe"): BALPOE_I,
    ("imagenet_lt", "resnet50_balpoe_long"): BALPOE_I | LONG,
    ("imagenet_lt", "resnext50_balpoe_long"): BALPOE_I | LONG,
    ("inat2018", "resnet50_balpoe"): BALPOE_N,
    ("inat2018", "resnet50_balpoe_long"): BALPOE_N | LONG | {"augment": "inat_randaug"},
    ("cifar100_ir50", "resnet32_lgla"): LGLA_C,
    ("cifar10_ir100", "resnet32_lgla"): LGLA_C | {"lgla.tau": 3},
    ("imagenet_lt", "resnet50_lgla"): LGLA_I | {"lgla.tau": 2.8, "augment": "imagenet_randaug"},
    ("imagenet_lt", "resnext50_lgla"): LGLA_I | {"lgla.tau": 3, "augment": "imagenet_randaug"},
    ("inat2018", "resnet50_lgla"): LGLA_I
    | {"lgla.tau": 3, "num_epochs": 400, "batch_size": 512, "lr": 0.2, "weight_decay": 2e-4}
    | {"augment": "inat_randaug"},
    ("places_lt", "resnet152_lgla"): LGLA
    | {"lgla.tau": 2.4, "num_epochs": 30, "batch_size": 128, "lr": 0.01, "lr_factors": None, "weight_decay": 4e-4}
    | {"schedule": "multistep", "lr_steps": [10, 20], "lr_gamma": 0.1, "warmup_epochs": 0, "expert_split": None}
    | {"augment": "imagenet_blur", "momentum": 0.9},
    ("cifar10_ir100", "resnet32_dirmixe"): DIRMIXE_C | {"dirmixe.variance": 15, "weight_decay": 5e-4},
    ("cifar100_ir100", "resnet32_dirmixe"): DIRMIXE_C | {"dirmixe.variance": 5, "weight_decay": 1e-3},
    ("cifar100_ir100", "resnet32_mixup"): CIFAR
    | {"method": "mixup", "mixup.alpha": 1, "loss_type": "CE", "classifier": "LinearClassifier", "weight_decay": 2e-4}
    | {"warmup_epochs": 5, "nesterov": False, "augment": "cifar_crop"},
    ("cifar100_ir50", "resnet32_h2t"): H2T | {"weight_decay": 2e-4},
    ("cifar100_ir100", "resnet32_h2t"): H2T | {"weight_decay": 5e-4},
    ("cifar100_ir200", "resnet32_h2t"): H2T | {"weight_decay": 2e-4},
    ("imagenet_lt", "resnext50_dirmixe"): DIRMIXE
    | {"dirmixe.power": 1.6, "batch_size": 64, "lr": 0.025, "weight_decay": 7e-4, "num_epochs": 180}
    | {"schedule": "cosine", "warmup_epochs": 0, "augment": "imagenet", "adapt_lr": 0.025},
    ("inat2018", "resnet50_dirmixe"): LARGE
    | DIRMIXE
    | {"dirmixe.concentration": 1e5, "batch_size": 512, "lr": 0.2, "augment": "inat", "adapt_lr": 0.2},
}
"""The table of recipes: (data, model) → options."""

COSTS = {
    ("imagenet_lt", "resnext50_ride"): (42_889_024, 6_050_113_536),
    ("imagenet_lt", "resnext50_sade"): (42_889_024, 6_050_113_536),
    ("cifar100_ir100", "resnet32_sade"): (783_856, 100_358_208),
    ("inat2018", "resnet50_sade"): (76_587_584, 5_803_342_848),
    ("places_lt", "resnet152_sade"): (171_543_616, 29_162_928_128),
    ("cifar10_ir100", "resnet32_dirmixe"): (770_896, 100_345_248),
    ("cifar100_ir100", "resnet32_dirmixe"): (783_856, 100_358_208),
    ("imagenet_lt", "resnext50_dirmixe"): (42_889_024, 6_050_113_536),
    ("inat2018", "resnet50_dirmixe"): (76_587_584, 5_803_342_848),
    ("cifar100_ir100", "resnet32_balpoe"): (1_362_064, 158_534_400),
    ("imagenet_lt", "resnet50_balpoe"): (73_778_240, 8_640_430_080),
    ("imagenet_lt", "resnext50_balpoe"): (72_258_880, 9_016_147_968),
    ("inat2018", "resnet50_balpoe"): (117_658_688, 8_684_310_528),
    ("imagenet_lt", "resnet10_ride_teacher"): (18_489_920, 1_817_470_976),
    ("cifar100_ir100", "resnet32_ldam_drw"): (469_904, 68_868_352),
}
"""Parameters and multiply-adds of an image."""

RATES = {
    "resnet32_ride_distill": {0: 0.005, 4: 0.025, 19: 0.1, 159: 0.1, 160: 0.001, 180: 1e-5},
    "resnet32_ride": {0: 0.02, 4: 0.1, 160: 0.001, 180: 1e-5},
    "resnet32_sade": {160: 0.01, 180: 0.001},
    "resnet32_dirmixe": {0: 0.02, 4: 0.1, 159: 0.1, 160: 0.01, 180: 0.001},
    "resnet32_mixup": {0: 0.02, 4: 0.1, 159: 0.1, 160: 0.01, 179: 0.01, 180: 0.001},
    "resnet32_h2t": {0: 0.02, 1: 0.0195106, 2: 0.0180902, 5: 0.01, 7: 0.00412215, 8: 0.00190983, 9: 0.000489435},
}


ON_CIFAR = [pair for pair in EXPERTS if pair[0] == "cifar100_ir100"]
"""The smallest data for which every method has a config."""


def outlined(cfg: CfgNode) -> Method:
    cfg = resolve(cfg)
    info = build_info(cfg)
    with torch.device("meta"):
        return build_method(cfg, build_model(cfg, info.class_names), info)


@pytest.mark.parametrize(("data", "model"), slow_except(ON_CIFAR, EXPERTS))
def test_a_config_is_accepted(data: str, model: str) -> None:
    """Every stage of it: `--dry-run` refuses nothing, and a later stage finds in the earlier one what it needs."""
    stages = load_configs(data, model, [], declared())
    check(stages[-1])
    for earlier, later in pairwise(map(outlined, stages)):
        later.after(Earlier(True, partial(trained_state, earlier), lambda: outlined(stages[0])))


@pytest.mark.parametrize(("data", "model"), RECIPES, ids=map("-".join, RECIPES))
def test_recipes_are_the_published_ones(data: str, model: str, config: Config) -> None:
    values = values_of(config(data, model))
    assert {key: values[key] for key in RECIPES[data, model]} == RECIPES[data, model]


@pytest.mark.parametrize(("data", "model"), slow_except([pair for pair in COSTS if pair in ON_CIFAR], COSTS))
def test_sizes_and_costs(data: str, model: str, config: Config) -> None:
    result, _ = dry_run(config(data, model))
    parameters, products = COSTS[data, model]
    assert result["params"]["total"] == parameters and result["gflops_per_image"] == 2 * products / 1e9


@pytest.mark.parametrize("model", RATES)
def test_learning_rates(model: str, config: Config) -> None:
    plan = Plan.of(config("cifar100_ir100", model), 1)
    optimizer = build_optimizer([{"name": "head", "params": [torch.nn.Parameter(torch.zeros(1))]}], plan)
    assert {epoch: set_lr(optimizer, plan, epoch) for epoch in RATES[model]} == pytest.approx(RATES[model], rel=1e-5)


def test_every_row_of_the_table_is_there() -> None:
    rows = {"resnet32": "ce ldam_drw bs ride ride_teacher ride_distill ride_ea ride_batchformer"}
    rows["resnet32"] += " sade dirmixe crt lws tau_norm"
    rows["resnet32"] += " balpoe balpoe_long lgla"
    rows["resnet32"] += " mixup dr h2t mislas mislas_h2t gcl gcl_h2t ride_h2t reslt reslt_h2t"
    rows["resnet10"] = "ce ride ride_teacher ride_distill ride_ea ride_batchformer"
    rows["resnet50"] = rows["resnext50"] = rows["resnet10"] + " sade dirmixe crt lws tau_norm mixup h2t"
    rows["resnet50"] += " balpoe balpoe_long lgla"
    rows["resnext50"] += " balpoe balpoe_long lgla"
    rows |= {"resnet152": "ce sade mixup h2t lgla", "clip_vit_b16": "ride sade dirmixe balpoe batchformer h2t"}
    rows["tiny_clip"] = rows["clip_vit_b16"]
    expected = {f"{net}_{kind}" for net, kinds in rows.items() for kind in kinds.split()}
    assert expected <= names("model").keys()
    assert expected == {model for _, model in EXPERTS}


def test_inaturalist_has_statistics_of_its_own() -> None:
    """A network from scratch sees pixels normalised by its data's statistics, one from ImageNet by ImageNet's."""
    for data, model, mean in (("inat2018", "resnet50_sade", 0.380), ("places_lt", "resnet152_sade", 0.406)):
        cfg = load_configs(data, model, [], declared())[-1]
        assert check(cfg).mean.flatten()[2].item() == pytest.approx(mean)


@pytest.mark.parametrize("kind", ["ride", "sade", "dirmixe", "balpoe", "batchformer"])
def test_experts_on_clip_train_on_the_digits(kind: str, config: Config, tmp_path: Path) -> None:
    """Two steps: every option of the small config is used, test distributions and adaptation included."""
    words = ("max_steps", 2, "max_test_images", 40, "output_dir", str(tmp_path / "run"))
    found = json.loads((run(config("digits_lt", f"tiny_clip_{kind}", *words)) / "metrics.json").read_text())
    assert found["test"]["accuracy"] > 30 and found["train"]["steps"] == 2
    assert [each["ece"] > 0 for each in found["test"]["experts"]] == [True] * 3
    assert {"forward50", "uniform", "backward50"} <= found["distributions"].keys()
    predictors = [each["predictors"] for each in found["distributions"].values()]
    assert all(("sade" in each) == (kind in ("sade", "dirmixe")) for each in predictors)
