"""What the embedded model has to show on long-tailed digits: orders, not exact values.

By default one seed of the demo itself; `make test-slow` adds the mean over three seeds, the loss without adjustment and
fine-tuning of the whole network.
"""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from tailtune.configs import load_configs
from tailtune.trainers.option_schema import declared
from tailtune.trainers.run import run

pytestmark = pytest.mark.xdist_group("demo")  # its runs are shared
SEEDS = [pytest.param((0,), id="one seed"), pytest.param((0, 1, 2), id="three seeds", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=SEEDS)
def result(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[dict[str, Any]]]:
    """`result("tiny_clip_peft", "loss_type", "CE")` → test metrics of each seed; a command runs once."""
    folder = tmp_path_factory.mktemp("demo")
    known: dict[tuple[str, ...], list[dict[str, Any]]] = {}

    def one(model: str, seed: int, pairs: tuple[str, ...]) -> dict[str, Any]:
        place = str(folder / "_".join((model, str(seed), *pairs)))
        (cfg,) = load_configs("digits_lt", model, [*pairs, "seed", str(seed), "output_dir", place], declared())
        found: Path = run(cfg)
        AcceleratorState._reset_state()
        return json.loads((found / "metrics.json").read_text())["test"]

    def many(model: str, *pairs: str) -> list[dict[str, Any]]:
        seeds = (
            request.param[:1] if model == "zstiny_clip" else request.param
        )  # zero-shot has nothing that a seed could change
        if (model, *pairs) not in known:
            known[(model, *pairs)] = [one(model, seed, pairs) for seed in seeds]
        return known[(model, *pairs)]

    return many


def average(runs: list[dict[str, Any]], metric: str) -> float:
    return mean(each[metric] for each in runs)


def test_zero_shot_knows_the_digits(result: Callable[..., list[dict[str, Any]]]) -> None:
    assert average(result("zstiny_clip"), "accuracy") >= 75


def test_fine_tuning_beats_zero_shot(result: Callable[..., list[dict[str, Any]]]) -> None:
    tuned, zero_shot = result("tiny_clip_peft"), result("zstiny_clip")
    assert average(tuned, "accuracy") >= average(zero_shot, "accuracy") + 5


@pytest.mark.slow
def test_heavy_fine_tuning_hurts_the_tail(result: Callable[..., list[dict[str, Any]]]) -> None:
    assert average(result("tiny_clip_peft"), "few_acc") >= average(result("tiny_clip_ft"), "few_acc") + 3


@pytest.mark.slow
def test_logit_adjustment_helps_the_tail(result: Callable[..., list[dict[str, Any]]]) -> None:
    adjusted, plain = result("tiny_clip_peft"), result("tiny_clip_peft", "loss_type", "CE")
    assert average(adjusted, "few_acc") > average(plain, "few_acc")
