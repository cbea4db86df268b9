"""Our side of the comparison with DirMixE: through our configs and builders."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.datasets.build_data import build_info
from tailtune.datasets.test_distributions.build import build_distributions
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.models import build_model
from tailtune.parity.dirmixe.cases import OPTIONS_OF_LISTS, SAMPLES, config_of
from tailtune.parity.errors import error
from tailtune.parity.experts.ours import row, use_draws
from tailtune.parity.job import Case, Job
from tailtune.parity.subject import Row
from tailtune.trainers.methods import build_method
from tailtune.trainers.methods.dirmixe import DirMixE


def method_of(case: Case, pool: str = "fresh") -> DirMixE:
    """The method of a case, by the same builders as in a run.

    Args:
        case: its `data` names our config, its `counts` are the class counts.
        pool: the option `dirmixe.pool`.
    """
    cfg = config_of(case["data"], "pretrained", "none", "dirmixe.pool", pool)
    info = replace(build_info(cfg), class_counts=torch.tensor(case["counts"]))
    method = build_method(cfg, build_model(cfg, info.class_names), info)
    assert isinstance(method, DirMixE)
    return method


def compare_pool(case: Case, job: Job) -> list[Row]:
    """Largest difference of any draw of the pool's epochs."""
    original = job.tensors(case)
    assert original["counts"].tolist() == case["counts"]
    method = method_of(case, "recycled_cifar" if case["chooses"] else "recycled")
    method.before_training(case["epochs"] * case["per_epoch"], case["per_epoch"])
    differences = []
    for epoch in range(case["epochs"]):
        method.epoch = epoch
        for step in range(case["per_epoch"]):
            method.before_step(1 + step + epoch * case["per_epoch"])
            experts, priors = method.drawn(torch.device("cpu"))
            of_step = slice(step * len(experts), (step + 1) * len(experts))
            differences.append(float((experts - original[f"experts.{epoch}"][of_step]).abs().max()))
            differences.append(float((priors - original[f"priors.{epoch}"][of_step]).abs().max()))
    return [row(case, value=max(differences))]


def compare_loss(case: Case, job: Job) -> list[Row]:
    """The loss of random logits and its gradient."""
    original = job.tensors(case)
    method = method_of(case)
    method.final = case["epoch"] > 1
    use_draws(method, original["experts"], original["priors"])
    method.before_step(1)
    logits = job.inputs[f"logits.{case['data']}"].clone().requires_grad_()
    batch = {"label": job.inputs[case["labels"]], "weight": torch.ones(SAMPLES).double()}
    loss_sum, weight = method.loss(logits, batch)
    (loss_sum / weight).backward()
    assert logits.grad is not None
    loss_error = error(loss_sum / weight, original["loss"])
    return [row(case, loss=loss_error, gradients=error(logits.grad, original["gradient"]))]


def compare_phases(case: Case, job: Job) -> list[Row]:
    """How many epochs have a semi-variance on one side only."""
    original = job.fact("phases", case)
    method, different = method_of(case), 0
    for epochs in case["runs"]:
        for epoch in range(epochs):
            method.on_epoch(epoch, epochs)
            different += method.final != (epoch + 1 in original[str(epochs)])
    return [row(case, value=float(different))]


def compare_sets(case: Case, job: Job) -> list[Row]:
    """The share of the test sets that do not have the same images."""
    original = job.tensors(case)
    words = ("lists", Path(case["list"]).parent) if case["list"] else ()
    cfg = config_of(case["data"], "test_dists", "dirichlet", *words, *OPTIONS_OF_LISTS.get(case["data"], ()))
    info = build_info(cfg)
    labels, positions = _images_of_lists(case, cfg) if case["list"] else _images_of_cifar(info.num_classes)
    different = []
    for trial, shift in enumerate(build_distributions(DistributionSettings.of(cfg), info, labels)):
        assert shift.learn_positions is not None
        for name, chosen in (("learn", shift.learn_positions), ("evaluate", shift.positions)):
            images = positions[chosen].sort().values
            different.append(not torch.equal(images, original[f"{name}.{trial}"].sort().values))
    assert len(different) == 18
    return [row(case, value=sum(different) / len(different))]


def _images_of_cifar(classes: int) -> tuple[Tensor, Tensor]:
    """Labels and positions of CIFAR's test images on the original's side [N]."""
    return torch.arange(10000) % classes, torch.arange(10000)


def _images_of_lists(case: Case, cfg: CfgNode) -> tuple[Tensor, Tensor]:
    """Labels of our test list, and the positions of its images in the original's list [N]."""
    original, ours = (path.read_text().splitlines() for path in (Path(case["list"]), Path(cfg.lists) / cfg.test_list))
    position = {line.split()[0]: index for index, line in enumerate(original)}
    labels = torch.tensor([int(line.split()[1]) for line in ours])
    return labels, torch.tensor([position[line.split()[0]] for line in ours])
