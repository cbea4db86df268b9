"""Learning rates over the epochs and of parameter groups, Nesterov's momentum, and samplers."""

from collections.abc import Callable
from math import cos, pi
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from trajectories import killed_after, trained
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.trainers.config_checks import check
from tailtune.trainers.optimizers_and_schedules import SCHEDULES, Plan, build_optimizer, check_factors, set_lr
from tailtune.trainers.run import run

Config = Callable[..., CfgNode]
RIDE = ("schedule", "multistep", "num_epochs", 200, "lr", 0.1, "lr_steps", "[160,180]", "lr_gamma", 0.01)
TRACES = {
    "RIDE CIFAR distill": (
        (*RIDE, "warmup_epochs", 20),
        {0: 0.005, 4: 0.025, 19: 0.1, 159: 0.1, 160: 0.001, 179: 0.001, 180: 1e-5, 199: 1e-5},
    ),
    "RIDE CIFAR": ((*RIDE, "warmup_epochs", 5), {0: 0.02, 4: 0.1, 5: 0.1, 160: 0.001}),
    "SADE CIFAR": ((*RIDE, "warmup_epochs", 5, "lr_gamma", 0.1), {0: 0.02, 160: 0.01, 180: 0.001}),
    "SADE ImageNet-LT": (
        ("num_epochs", 180, "lr", 0.025),
        {0: 0.025, 90: 0.0125, 179: 0.0125 * (1 + cos(pi * 179 / 180))},
    ),
    "BatchFormer, cosine after a warm-up": (
        ("num_epochs", 100, "lr", 0.1, "warmup_epochs", 5),
        {0: 0.02, 3: 0.08, 4: 0.1, 5: 0.05 * (1 + cos(pi / 96)), 99: 0.05 * (1 + cos(pi * 95 / 96))},
    ),
    "constant": (("schedule", "constant", "num_epochs", 9, "lr", 0.1, "warmup_epochs", 2), {0: 0.05, 1: 0.1, 8: 0.1}),
    "a warm-up longer than the run": (("num_epochs", 2, "lr", 0.1, "warmup_epochs", 3), {0: 0.1 / 3, 1: 0.2 / 3}),
}
"""Options and the learning rate of some epochs: experts.md §3.1 and check 16."""


def weights(count: int = 1) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(1)) for _ in range(count)]


def groups(*names: str) -> list[dict[str, object]]:
    return [{"name": name, "params": weights()} for name in names]


@pytest.mark.parametrize("name", TRACES)
def test_learning_rates(name: str, config: Config) -> None:
    pairs, expected = TRACES[name]
    plan = Plan.of(config("fake_lt", "tiny_clip", *pairs), 1)
    optimizer = build_optimizer(groups("head"), plan)
    found = {epoch: set_lr(optimizer, plan, epoch) for epoch in expected}
    assert found == pytest.approx(expected, rel=1e-12)
    assert optimizer.param_groups[0]["lr"] == found[max(found)]


@pytest.mark.parametrize("epochs", [1, 5, 10])
def test_the_default_is_lifts_cosine(epochs: int, config: Config) -> None:
    plan = Plan.of(config("fake_lt", "tiny_clip", "num_epochs", epochs, "lr", 0.3), 1)
    optimizer = build_optimizer(groups("head"), plan)
    for epoch in range(epochs):
        assert set_lr(optimizer, plan, epoch) == 0.3 * (0.5 * (1 + cos(pi * epoch / epochs)))


def test_groups_have_learning_rates_of_their_own(config: Config) -> None:
    """SADE on Places-LT: 0.01 for the classifiers, 0.001 for the rest."""
    plan = Plan.of(config("fake_lt", "tiny_clip", "lr", 0.01, "num_epochs", 4, "lr_factors", "{tuner: 0.1}"), 1)
    optimizer = build_optimizer(groups("tuner", "head"), plan)
    assert set_lr(optimizer, plan, 0) == 0.01
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.01])
    assert set_lr(optimizer, plan, 2) == pytest.approx(0.005)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0005, 0.005])


def test_nesterov(config: Config) -> None:
    """v ← μ v + g; w ← w − lr (g + μ v), torch's form of it; two steps with gradient one."""
    plan = Plan.of(config("fake_lt", "tiny_clip", "lr", 0.1, "weight_decay", 0, "nesterov", True), 1)
    (weight,) = weights()
    optimizer = build_optimizer([{"name": "head", "params": [weight]}], plan)
    for _ in range(2):
        weight.grad = torch.ones(1)
        optimizer.step()
    assert weight.item() == pytest.approx(1 - 0.1 * (1 + 0.9 * 1) - 0.1 * (1 + 0.9 * 1.9))


REFUSED = {
    ("schedule", "multistep"): "needs lr_steps",
    ("schedule", "multistpe", "lr_steps", 3): "did you mean 'multistep'",
    ("nesterov", True, "momentum", 0): "momentum above 0",
    ("sampler", "balance"): "did you mean 'balanced'",
    ("lr_factors", "{tuner: 0.1}"): "unknown parameter group in lr_factors 'tuner'; choices: head",
}


@pytest.mark.parametrize("pairs", REFUSED, ids=lambda pairs: " ".join(map(str, pairs)))
def test_what_would_do_nothing_is_refused(pairs: tuple[object, ...], config: Config) -> None:
    """Before any image or weight is read."""
    with pytest.raises(UserError, match=REFUSED[pairs].replace("[", r"\[")) as caught:
        check(config("fake_lt", "tiny_clip", *pairs))
    assert "\n" not in str(caught.value)


def test_factors_of_groups_that_there_are(config: Config) -> None:
    plan = Plan.of(config("fake_lt", "tiny_clip", "lr_factors", "{mixer: 0.1}"), 1)
    check_factors(groups("tuner", "head", "mixer"), plan)
    with pytest.raises(UserError, match="'mixer'.*choices: head, tuner"):
        build_optimizer(groups("tuner", "head"), plan)


def test_every_schedule_has_a_trace() -> None:
    assert {
        dict(zip(pairs[::2], pairs[1::2], strict=True)).get("schedule", "cosine") for pairs, _ in TRACES.values()
    } == (SCHEDULES.keys())


STEPPED = ("pretrained", "none", "num_epochs", 4, "batch_size", 16, "lr", 0.2, "print_freq", 1, "nesterov", True)
STEPPED += ("schedule", "multistep", "lr_steps", "[2,3]", "warmup_epochs", 2, "lr_factors", "{tuner: 0.5}")
STEPPED += ("sampler", "balanced", "max_test_images", 8, "subset_cap", 4)


def test_a_resumed_run_has_the_right_learning_rate(config: Config, tmp_path: Path) -> None:
    """Killed in the third epoch, after warm-up and first step, it ends as if it had not been, bit for bit."""
    folders = []
    for killed in (None, 8):
        folders.append(tmp_path / str(killed))
        words = (*STEPPED, "save_every", 1, "output_dir", str(folders[-1]))
        cfg = config("fake_lt", "tiny_clip_peft", *words)
        if killed:
            with killed_after(killed):
                run(cfg)
            AcceleratorState._reset_state(reset_partial_state=True)
        run(cfg)
        AcceleratorState._reset_state(reset_partial_state=True)
    rates, again = map(rates_of, folders)
    assert rates == again == pytest.approx([lr for lr in (0.1, 0.2, 0.02, 0.002) for _ in range(3)])
    whole, resumed = map(trained, folders)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def rates_of(folder: Path) -> list[float]:
    """The learning rate of every step, as TensorBoard shows it."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    by_step = {each.step: each.value for each in events.Scalars("train/lr")}
    return [by_step[step] for step in sorted(by_step)]
