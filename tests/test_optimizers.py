"""Optimizers: AdamW against its formula, what decays, warm-up by steps, and states that any of torch's resumes from."""

import json
from collections.abc import Callable
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from test_schedules import rates_of
from tiers import slow_except
from torch import Tensor
from trajectories import killed_after, trained
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.trainers.config_checks import check
from tailtune.trainers.optimizers_and_schedules import OPTIMIZERS, Plan, build_optimizer, learning_rate, set_lr
from tailtune.trainers.run import run
from tailtune.trainers.storage.optimizer_state import optimizer_state, restore_optimizer

Config = Callable[..., CfgNode]
ADAMW = ("optimizer", "adamw")


def plan_of(config: Config, *pairs: object) -> Plan:
    return Plan.of(config("fake_lt", "tiny_clip", *pairs), 1)


def parameters() -> list[torch.nn.Parameter]:
    """A matrix, a bias and a scalar."""
    draws = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=draws)) for shape in ((4, 3), (4,), ())]


def stepped(optimizer: torch.optim.Optimizer, first: int, steps: int) -> None:
    """Steps with gradients that depend on the number of the step."""
    for step in range(first, first + steps):
        draws = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=draws)
        optimizer.step()


# --- what it computes ------------------------------------------------------------------------------------------------


def test_adamw_is_its_formula(config: Config) -> None:
    """w ← w − lr (λ w + m̂ / (√v̂ + ε)), m and v running means of g and g²; the bias decays not."""
    options = ("lr", 0.1, "weight_decay", 0.2, "adam_betas", "[0.8,0.9]", "adam_eps", 0.01)
    weights = parameters()[:2]
    wanted = [weight.detach().double().clone() for weight in weights]
    optimizer = build_optimizer([{"name": "head", "params": weights}], plan_of(config, *ADAMW, *options))
    stepped(optimizer, 0, 3)
    for weight, decay in zip(wanted, (0.2, 0.0), strict=True):
        m, v = torch.zeros_like(weight), torch.zeros_like(weight)
        for step in range(3):
            draws = torch.Generator().manual_seed(step)
            gradients = [torch.randn(each.shape, generator=draws) for each in wanted]
            g = next(each for each in gradients if each.shape == weight.shape).double()
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g.square()
            update = (m / (1 - 0.8 ** (step + 1))) / ((v / (1 - 0.9 ** (step + 1))).sqrt() + 0.01)
            weight -= 0.1 * (decay * weight + update)
    assert all(torch.allclose(each.double(), own, atol=1e-6) for each, own in zip(weights, wanted, strict=True))


RULES = {
    ("sgd", "none"): [(3, 0.01)],
    ("sgd", "all"): [(3, 0.01)],
    ("sgd", "matrices"): [(1, 0.01), (2, 0.0)],
    ("adamw", "none"): [(1, 0.01), (2, 0.0)],
    ("adamw", "matrices"): [(1, 0.01), (2, 0.0)],
    ("adamw", "all"): [(3, 0.01)],
}
"""Optimizer and rule → parameters and weight decay of each group that comes of one group."""


@pytest.mark.parametrize(("optimizer", "rule"), RULES)
def test_what_decays(optimizer: str, rule: str, config: Config) -> None:
    words = ("optimizer", optimizer, "decay_rule", rule, "weight_decay", 0.01, "lr", 1.0, "lr_factors", "{head: 0.1}")
    plan = plan_of(config, *words)
    groups = [{"name": name, "params": parameters()} for name in ("tuner", "head")]
    made = build_optimizer(groups, plan)
    found = [(len(group["params"]), group["weight_decay"]) for group in made.param_groups]
    assert found == 2 * RULES[optimizer, rule]
    set_lr(made, plan, 0)
    assert {(group["name"], group["lr"]) for group in made.param_groups} == {("tuner", 1.0), ("head", 0.1)}


def test_a_group_of_one_kind_stays_one_group(config: Config) -> None:
    matrix, bias, _ = parameters()
    groups = [{"name": "tuner", "params": [matrix]}, {"name": "head", "params": [bias]}]
    found = build_optimizer(groups, plan_of(config, *ADAMW)).param_groups
    assert [(group["name"], group["weight_decay"]) for group in found] == [("tuner", 5e-4), ("head", 0.0)]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warm_up_by_steps_multiplies_the_schedule(schedule: str, config: Config) -> None:
    """lr · min(1, s/S) · schedule(e), for step s from 1 and ten steps an epoch: 25 steps end in the third epoch."""
    plan = plan_of(config, "warmup_steps", 25, "num_epochs", 5, "lr", 0.4, "schedule", schedule)
    for step in range(1, 51):
        epoch = (step - 1) // 10
        factor = 0.5 * (1 + cos(pi * epoch / 5)) if schedule == "cosine" else 1.0
        assert learning_rate(plan, epoch, step) == pytest.approx(0.4 * min(1.0, step / 25) * factor, rel=1e-12)


# --- what is refused -------------------------------------------------------------------------------------------------

REFUSED = {
    ("optimizer", "adam"): "did you mean 'adamw'",
    (*ADAMW, "adam_betas", "[0.9,1]"): "both must be below 1",
    (*ADAMW, "prec", "fp16"): "choose prec amp or bf16",
    ("warmup_steps", 3, "warmup_epochs", 1): "give one of them",
}


@pytest.mark.parametrize("pairs", REFUSED, ids=lambda pairs: " ".join(map(str, pairs)))
def test_what_would_do_nothing_is_refused(pairs: tuple[object, ...], config: Config) -> None:
    """Before any image or weight is read."""
    with pytest.raises(UserError) as caught:
        check(config("fake_lt", "tiny_clip", *pairs))
    assert REFUSED[pairs] in str(caught.value) and "\n" not in str(caught.value)


# --- states ----------------------------------------------------------------------------------------------------------

OF_TORCH: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda groups: torch.optim.SGD(groups, 0.1, momentum=0.9, nesterov=True),
    "SGD without momentum": lambda groups: torch.optim.SGD(groups, 0.1),
    "Adam": lambda groups: torch.optim.Adam(groups, 0.1, amsgrad=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, 0.1),
    "NAdam": lambda groups: torch.optim.NAdam(groups, 0.1),
    "RAdam": lambda groups: torch.optim.RAdam(groups, 0.1),
    "Adamax": lambda groups: torch.optim.Adamax(groups, 0.1),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, 0.1),
    "Adadelta": lambda groups: torch.optim.Adadelta(groups, 0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, 0.1, momentum=0.9, centered=True),
    "ASGD": lambda groups: torch.optim.ASGD(groups, 0.1),
    "Rprop": lambda groups: torch.optim.Rprop(groups, 0.1),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, 0.1),
}


def two_groups() -> list[dict[str, Any]]:
    first, second, third = parameters()
    return [{"name": "tuner", "params": [first], "lr": 0.3}, {"name": "head", "params": [second, third]}]


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("name", OF_TORCH)
def test_any_optimizer_goes_on_bitwise(name: str) -> None:
    whole, first, second = (OF_TORCH[name](two_groups()) for _ in range(3))
    stepped(whole, 0, 5)
    stepped(first, 0, 3)
    tensors, values = optimizer_state(first)
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    for parameter, stored in zip(
        (each for group in second.param_groups for each in group["params"]), weights_of(first), strict=True
    ):
        parameter.data.copy_(stored)
    kept = {key: tensor.clone() for key, tensor in tensors.items()}
    restore_optimizer(second, kept | {"method.x": torch.ones(1)}, json.loads(json.dumps(values)))
    stepped(second, 3, 2)
    assert all(map(torch.equal, weights_of(whole), weights_of(second)))


def test_a_state_of_an_earlier_version_has_momentum_alone() -> None:
    """`momentum.<group>.<parameter>`, and nothing in facts.json."""
    whole, first, second = (OF_TORCH["SGD"](two_groups()) for _ in range(3))
    stepped(whole, 0, 5)
    stepped(first, 0, 3)
    places = [(g, p) for g, group in enumerate(first.param_groups) for p in range(len(group["params"]))]
    old = {
        f"momentum.{g}.{p}": first.state[first.param_groups[g]["params"][p]]["momentum_buffer"].clone()
        for g, p in places
    }
    for parameter, stored in zip(
        (each for group in second.param_groups for each in group["params"]), weights_of(first), strict=True
    ):
        parameter.data.copy_(stored)
    restore_optimizer(second, old, None)
    stepped(second, 3, 2)
    assert all(map(torch.equal, weights_of(whole), weights_of(second)))


QUICK = ("pretrained", "none", "num_epochs", 2, "batch_size", 8, "print_freq", 2, "max_test_images", 8)
QUICK += ("num_workers", 0, "save_every", 1, "subset_cap", 4)


def run_in(folder: Path, killed: int | None, config: Config, *words: object) -> Path:
    cfg = config("fake_lt", "tiny_clip_peft", *QUICK, *words, "output_dir", str(folder))
    if killed is not None:
        with killed_after(killed):
            run(cfg)
        AcceleratorState._reset_state(reset_partial_state=True)
    run(cfg)
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def same_weights(one: Path, other: Path) -> bool:
    first, second = map(trained, (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", slow_except(["adamw"], OPTIMIZERS))
def test_a_killed_run_resumes_bitwise(name: str, config: Config, tmp_path: Path) -> None:
    """Killed within the warm-up, whose learning rates are those of each step also where several are shown at once."""
    words = ("optimizer", name, "lr", 0.01, "warmup_steps", 8)
    whole, again = (run_in(tmp_path / str(killed), killed, config, *words) for killed in (None, 5))
    assert same_weights(whole, again)
    rates = [0.01 * min(1.0, step / 8) * (1.0 if step <= 5 else 0.5) for step in range(1, 11)]
    assert rates_of(whole) == rates_of(again) == pytest.approx(rates, rel=1e-5)


def test_a_run_of_an_earlier_version_resumes_bitwise(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def old_state(optimizer: Any) -> tuple[dict[str, Tensor], None]:
        return {
            f"momentum.{g}.{p}": optimizer.state[parameter]["momentum_buffer"]
            for g, group in enumerate(optimizer.param_groups)
            for p, parameter in enumerate(group["params"])
        }, None

    whole = run_in(tmp_path / "whole", None, config, "lr", 0.1)
    with monkeypatch.context() as patched:
        patched.setattr("tailtune.trainers.training_state.optimizer_state", old_state)
        cfg = config("fake_lt", "tiny_clip_peft", *QUICK, "lr", 0.1, "output_dir", str(tmp_path / "old"))
        with killed_after(7):
            run(cfg)
        AcceleratorState._reset_state(reset_partial_state=True)
    assert same_weights(whole, run_in(tmp_path / "old", None, config, "lr", 0.1))
