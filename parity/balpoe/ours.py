"""Our side of the comparison with BalPoE and LGLA: through our configs and builders."""

import torch
from torch import Tensor

from tailtune.datasets.images.random_steps import RandAugment
from tailtune.parity.balpoe.cases import SAMPLES, SEEDS
from tailtune.parity.balpoe.original import changed
from tailtune.parity.errors import error
from tailtune.parity.experts.ours import build, row
from tailtune.parity.job import Case, Job
from tailtune.parity.subject import Row


def compare_strengths(case: Case, job: Job) -> list[Row]:
    """Largest difference of any expert's strength τ, read off its adjustment of a class."""
    differences = []
    for spacing, of_numbers in job.fact("strengths", case).items():
        for strengths in of_numbers:
            options = {"method": "balpoe", "num_experts": len(strengths), "balpoe.spacing": spacing}
            options |= {"balpoe.tau_min": -1, "balpoe.tau_max": 3}
            _, method = build(case, options)
            adjustments = method.get_buffer("adjustments")[:, 0]
            _, plain = build(case, {"method": "balpoe", "num_experts": 1, "balpoe.taus": "[1]"})
            found: Tensor = adjustments / plain.get_buffer("adjustments")[0, 0]
            differences += [abs(tau - wanted) for tau, wanted in zip(found.tolist(), strengths, strict=True)]
    return [row(case, value=max(differences))]


def compare_loss(case: Case, job: Job) -> list[Row]:
    """LGLA's loss of logits, and its gradient."""
    original, data = job.tensors(case), case["data"]
    _, method = build(case, case["our_options"])
    logits = job.inputs[f"logits.{data}"][:, : case["experts"]].clone().requires_grad_()
    weights = torch.ones(SAMPLES, dtype=torch.float64)
    loss_sum, weight = method.loss(logits, {"label": job.inputs[f"labels.{SAMPLES}.{data}"], "weight": weights})
    (loss_sum / weight).backward()
    assert logits.grad is not None
    loss_error = error(loss_sum / weight, original["loss"])
    return [row(case, loss=loss_error, gradients=error(logits.grad, original["gradient"]))]


def compare_pictures(case: Case, job: Job) -> list[Row]:
    """The share of the pictures that are not the same after RandAugment with the same random seeds."""
    original, policy = job.tensors(case)["pictures"], RandAugment().policy
    different = [
        (changed(policy, job.inputs["pictures"], seed) != original[seed]).flatten(1).any(1) for seed in range(SEEDS)
    ]
    return [row(case, value=sum(int(each.sum()) for each in different) / original.flatten(0, 1).shape[0])]
