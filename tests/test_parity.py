"""docs/parity.json, the figures of `benchmarks/parity_lift.py` beside the original LIFT, covers all of our tables."""

import json
from pathlib import Path
from typing import Any

import pytest

from models.head_init import HEAD_INITS
from models.heads import HEADS
from models.prompts import PROMPTS
from models.tuners import TUNERS
from trainers.losses import LOSSES

PARITY = json.loads((Path(__file__).parent.parent / "docs" / "parity.json").read_text())
CASES: list[dict[str, Any]] = PARITY["cases"]
FIGURES = ("features", "logits", "loss", "gradients", "after_3_steps")
TOLERANCES = {**dict.fromkeys((*FIGURES, "value"), 1e-4), "float64": 1e-5}
NOT_OF_LIFT: dict[str, set[str]] = {"tuner": set(), "head": set(), "loss": set()}
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
