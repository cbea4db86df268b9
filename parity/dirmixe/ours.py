"""Our side of parity_dirmixe.py: through our configs and builders, compared with what the original left in files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.datasets import build_info
from tailtune.datasets.test_distributions.build import build_shifts
from tailtune.parity.dirmixe.cases import RUNS, SAMPLES, SETS, case, config_of
from tailtune.parity.experts.cases import Case
from tailtune.parity.experts.ours import row, use_draws
from tailtune.parity.lift.ours import error
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods.base import Objective
from tailtune.trainers.methods.dirmixe import DirMixE


def alone(each: Case, pool: str = "fresh") -> DirMixE:
    """The method of a config around no model."""
    model: Any = nn.Module()
    model.num_experts = 3
    objective = Objective(torch.tensor(each["counts"]), LOSSES["CE"])
    cfg = config_of(each["data"], "dirmixe.pool", pool)
    return DirMixE(model, objective, DirMixE.Options(**cfg.dirmixe))


def compare_pool(each: Case, theirs: dict[str, Tensor]) -> Case:
    method = alone(each, "recycled_cifar" if each["chooses"] else "recycled")
    assert theirs["counts"].tolist() == each["counts"]
    method.recycled_draws = method.make_recycled_draws(each["per_epoch"])
    gaps = []
    for epoch in range(each["epochs"]):
        method.epoch = epoch
        for step in range(each["per_epoch"]):
            method.before_step(1 + step + epoch * each["per_epoch"])
            experts, priors = method.drawn(torch.device("cpu"))
            here = slice(step * len(experts), (step + 1) * len(experts))
            gaps.append(float((experts - theirs[f"experts.{epoch}"][here]).abs().max()))
            gaps.append(float((priors - theirs[f"priors.{epoch}"][here]).abs().max()))
    return row(each) | {"value": max(gaps)}


def compare_loss(each: Case, theirs: dict[str, Tensor], given: dict[str, Tensor]) -> Case:
    method = alone(each)
    method.final = each["epoch"] > 1
    use_draws(method, theirs["experts"], theirs["priors"])
    method.before_step(1)
    logits = given[each["logits"]].clone().requires_grad_()
    loss_sum, weight = method.loss(logits, {"label": given[each["labels"]], "weight": torch.ones(SAMPLES).double()})
    (loss_sum / weight).backward()
    assert logits.grad is not None
    return row(each) | {
        "loss": error(loss_sum / weight, theirs["loss"]),
        "gradients": error(logits.grad, theirs["gradient"]),
    }


def compare_phases(theirs: dict[str, list[int]]) -> Case:
    each = case("cifar100_ir100", "epochs with semi-variance", counts=[2, 1])
    method, different = alone(each), 0
    for epochs in RUNS:
        for epoch in range(epochs):
            method.on_epoch(epoch, epochs)
            different += method.final != (epoch + 1 in theirs[str(epochs)])
    return row(each) | {"value": float(different)}


def compare_sets(each: Case, theirs: dict[str, Tensor]) -> Case:
    """Both sides' images, as positions in the list that the original reads."""
    words = ("lists", Path(each["list"]).parent) if each["list"] else ()
    cfg = config_of(each["data"], "test_dists", "dirichlet", *words, *SETS.get(each["data"], ()))
    info, place = build_info(cfg), {}
    if each["list"]:
        lines, own = (path.read_text().splitlines() for path in (Path(each["list"]), Path(cfg.lists) / cfg.test_list))
        place = {line.split()[0]: index for index, line in enumerate(lines)}
        labels = torch.tensor([int(line.split()[1]) for line in own])
        there = torch.tensor([place[line.split()[0]] for line in own])
    else:
        labels = torch.arange(10000) % info.num_classes
        there = torch.arange(10000)
    different = []
    for trial, shift in enumerate(build_shifts(cfg, info, labels)):
        assert shift.learn is not None
        for name, positions in (("learn", shift.learn), ("evaluate", shift.positions)):
            chosen = there[positions].sort().values
            different.append(not torch.equal(chosen, theirs[f"{name}.{trial}"].sort().values))
    assert len(different) == 18
    return row(each) | {"value": sum(different) / len(different)}
