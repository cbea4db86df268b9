"""docs/parity.json, the figures of `parity/lift/compare.py` beside the original LIFT, covers all of our tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from tailtune.models.backbones.prompts import PROMPTS
from tailtune.models.heads.classifiers import HEADS
from tailtune.models.heads.head_init import HEAD_INITS
from tailtune.models.tuners.table import TUNERS
from tailtune.trainers.losses import LOSSES

PARITY = json.loads((Path(__file__).parent.parent / "docs" / "parity.json").read_text())
CASES: list[dict[str, Any]] = PARITY["cases"]
FIGURES = ("features", "logits", "loss", "gradients", "after_3_steps")
TOLERANCES = {**dict.fromkeys((*FIGURES, "value"), 1e-4), "float64": 1e-5}
NOT_OF_LIFT: dict[str, set[str]] = {"tuner": set(), "head": set(), "loss": {"LAS", "GCL"}}
"""Entries of ours that the original has not."""
DRAWN = {"1_shot", "10_shot", "100_shot"}
"""`class_mean` of images that each side draws with its own random generator."""


def names(kind: str) -> set[str]:
    """Every part of a case's name: `lora + ssf_attn, partial 1` is of lora and of ssf_attn."""
    return {part for case in CASES if case["kind"] == kind for part in case["name"].split(",")[0].split(" + ")}


@pytest.mark.parametrize("kind, table", [("tuner", TUNERS), ("head", HEADS), ("loss", LOSSES)])
def test_every_entry_that_lift_has_is_compared(kind: str, table: dict[str, Any]) -> None:
    assert set(table) - NOT_OF_LIFT[kind] <= names(kind)
    alone = {case["name"] for case in CASES if case["kind"] == kind}
    assert set(table) - NOT_OF_LIFT[kind] <= alone, "each on its own, not only in combination"


def test_every_head_init_and_prompt_is_compared() -> None:
    assert set(HEAD_INITS) - DRAWN <= names("init") and "zero_shot" in names("init")
    prompts = {case["name"].split(", ")[1] for case in CASES if case["name"].startswith("text_feat, ")}
    assert set(PROMPTS) <= prompts


def test_metrics_schedule_and_sizes_are_compared() -> None:
    assert {"accuracy", "mean_acc", "many_acc", "med_acc", "few_acc", "hmean_acc", "gmean_acc"} <= names("metrics")
    assert {"worst_case_acc", "macro_f1", "ece"} <= names("metrics") and names("schedule")
    assert {"adaptformer", "mask"} <= names("size")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{case['backbone']}-{case['name']}")
def test_every_error_is_below_the_tolerance(case: dict[str, Any]) -> None:
    wanted = (*FIGURES, "float64") if case["kind"] in ("tuner", "head", "loss") else ("value",)
    for name in wanted:
        assert 0 <= case[name] <= TOLERANCES[name], name
    assert all(case[name] is None for name in (*FIGURES, "float64", "value") if name not in wanted)


def test_it_says_how_to_check_it_again() -> None:
    assert PARITY["tolerance"] == TOLERANCES
    assert PARITY["original"]["repository"].endswith("shijxcs/LIFT") and len(PARITY["original"]["commit"]) == 40
    assert PARITY["ours"] and PARITY["packages"]["torch"] and PARITY["hardware"] and PARITY["procedure"]


# --- experts: parity/experts/compare.py beside RIDE, SADE and BatchFormer ----------------------------------------

EXPERTS = PARITY["experts"]
ROWS: list[dict[str, Any]] = EXPERTS["cases"]
TRAINED = ("logits", "loss", "gradients", "after_3_steps", "rates")
METHODS = {
    "ride": {"RIDE", "LDAM-DRW", "RIDE + distillation × E", "expert assignment"},
    "sade": {"SADE"},
    "batchformer": {"BatchFormer", "RIDE + distillation × 1"},
    "balanced": {"BatchFormer"},
}
"""Original → what of it is compared, the first words of a case's name."""


@pytest.mark.parametrize("case", ROWS, ids=lambda case: f"{case['repository']}-{case['data']}-{case['name']}")
def test_experts_agree_in_fp64(case: dict[str, Any]) -> None:
    if case["name"].startswith("test_training"):
        wanted = {"value"}
    elif case["name"].startswith("learning rates"):
        wanted = {"rates"}
    else:
        wanted = {*TRAINED, *(["value"] if case["name"] == "expert assignment" else [])}
    assert all(0 <= case[name] <= 1e-8 for name in wanted)
    assert all(case[name] is None for name in (*TRAINED, "value") if name not in wanted)


def test_all_methods_of_experts_are_compared() -> None:
    for repository, methods in METHODS.items():
        own = {case["name"].split(",")[0] for case in ROWS if case["repository"] == repository}
        assert methods <= own
    names = {case["name"] for case in ROWS}
    for factor in (-0.45, -0.2, 0.0):
        assert {f"RIDE, diversity factor {factor}, {when}" for when in ("before reweighting", "reweighted")} <= names
    assert {f"BatchFormer, add_bt {mode}" for mode in (1, 33)} <= names
    assert {f"test_training_{data}.py" for data in ("cifar", "imagenet", "places", "inat")} <= names
    networks = {case["model"].split("_")[0] for case in ROWS if case["logits"] is not None}
    assert {"resnet32", "resnet10", "resnet50"} <= networks
    rates = {case["model"] for case in ROWS if case["name"].startswith("learning rates")}
    assert len(rates) >= 16 and "resnet152_sade" in rates


def test_the_experts_part_says_how_to_check_it_again() -> None:
    assert {len(each["commit"]) for each in EXPERTS["originals"].values()} == {40}
    assert EXPERTS["tolerance"] == 1e-8 and EXPERTS["patches"] and EXPERTS["procedure"] and EXPERTS["ours"]


# --- DirMixE: parity/dirmixe/compare.py ---------------------------------------------------------------------------

DIRMIXE = PARITY["dirmixe"]
DATA = ("cifar10_ir100", "cifar100_ir100", "imagenet_lt", "inat2018")
COMPARED: dict[str, set[str]] = {
    "pool": {"value"},
    "pool of classes without ties": {"value"},
    "epochs with semi-variance": {"value"},
    "Dirichlet test sets": {"value"},
    **{f"loss of logits, {when}": {"loss", "gradients"} for when in ("warm", "final")},
    **{f"DirMixE, {when}": set(TRAINED) for when in ("warm", "final")},
}
"""Name of a case → its figures; of learning rates `rates`."""


@pytest.mark.parametrize("case", DIRMIXE["cases"], ids=lambda case: f"{case['data']}-{case['name']}")
def test_dirmixe_agrees(case: dict[str, Any]) -> None:
    wanted = COMPARED.get(case["name"], {"rates"})
    assert all(0 <= case[name] <= 1e-8 for name in wanted)
    assert all(case[name] is None for name in (*TRAINED, "value") if name not in wanted)
    assert "value" not in wanted or case["value"] == 0, "what is drawn is the same, not only near"


def test_all_of_dirmixe_is_compared() -> None:
    found = {(case["data"], case["name"]) for case in DIRMIXE["cases"]}
    everywhere = [name for name in COMPARED if name.startswith(("Dirichlet", "loss", "DirMixE"))]
    assert {(data, name) for data in DATA for name in everywhere} <= found
    assert {("cifar10_ir100", "pool"), ("cifar100_ir100", "pool")} <= found
    assert {name for _, name in found} - set(COMPARED) == {f"learning rates of {n} epochs" for n in (200, 180, 100)}
    assert len(DIRMIXE["originals"]["dirmixe"]["commit"]) == 40 and DIRMIXE["tolerance"] == 1e-8
    assert DIRMIXE["patches"] and DIRMIXE["procedure"] and DIRMIXE["ours"]


# --- H2T: parity/h2t/compare.py -----------------------------------------------------------------------------------

H2T = PARITY["h2t"]
STAGES = {"stage 1", "stage 2"} | {
    f"stage 2, share {share}, batch norms {mode}" for share in (0, 0.25, 0.3, 1) for mode in ("shift", "are held")
}
OF_LOGITS = {"CE", "CE, reweighted", "LDAM", "LDAM, reweighted", "label-aware smoothing", "ResLT"} | {
    f"RIDE, diversity factor {factor}{end}" for factor in (-0.45, -0.2, 0.0) for end in ("", ", reweighted")
}
TAILS = {f"{name}_ir{ratio}" for name in ("cifar10", "cifar100") for ratio in (10, 50, 100, 200)}
EXACT = ("channels", "images of the long tail")
"""Beginnings of names: what is chosen is the same, not only near."""


@pytest.mark.parametrize("case", H2T["cases"], ids=lambda case: f"{case['data']}-{case['name']}")
def test_h2t_agrees(case: dict[str, Any]) -> None:
    wanted = {"value"}
    if case["name"].startswith("stage"):
        wanted = {*TRAINED, "value"}
    elif case["name"].startswith("loss of logits"):
        wanted = {"loss", "gradients"}
    elif case["name"].startswith("learning rates"):
        wanted = {"rates", "value"}
    assert all(0 <= case[name] <= 1e-9 for name in wanted)
    assert all(case[name] is None for name in (*TRAINED, "value") if name not in wanted)
    assert not case["name"].startswith(EXACT) or case["value"] == 0


def test_all_of_h2t_is_compared() -> None:
    found = {(case["data"], case["name"]) for case in H2T["cases"]}
    assert {("cifar100_ir100", name) for name in STAGES} <= found
    of_logits = {
        (data, f"loss of logits, {name}") for data in ("cifar10_ir100", "cifar100_ir100") for name in OF_LOGITS
    }
    assert of_logits <= found
    configs = {
        (f"cifar100_ir{ratio}", model) for ratio in (50, 100, 200) for model in ("resnet32_mixup", "resnet32_h2t")
    }
    rates = {(case["data"], case["model"]) for case in H2T["cases"] if case["name"].startswith("learning rates")}
    assert rates == configs <= {(case["data"], case["model"]) for case in H2T["cases"] if case["name"] in STAGES}
    tails = ("images of the long tail", "pair_sampler reverse", "pair_sampler shuffle")
    assert {(data, name) for data in TAILS for name in tails} <= found
    assert {"test figures", "channels of 64, experts: 1", "channels of 48, experts: 3"} <= {name for _, name in found}
    assert len(H2T["originals"]["h2t"]["commit"]) == 40 and H2T["tolerance"] == 1e-9
    assert H2T["patches"] and H2T["procedure"] and H2T["ours"]
