"""Losses: LIFT's fixture (lift.md §13.3), and that sums do not depend on how a batch is cut."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainers.losses import LOSSES, Prior, cross_entropy, log_prior, logit_adjusted

COUNTS = torch.tensor([500, 200, 50, 20, 5])
FIXTURE = {"CE": 4.525486, "LA": 5.184051}


def fixture() -> tuple[Tensor, Tensor]:
    """z[i, c] = 5·sin(1 + i + 2c), y_i = 3i mod 5, eight samples of five classes."""
    i, c = torch.arange(8.0).view(-1, 1), torch.arange(5.0)
    return 5 * torch.sin(1 + i + 2 * c), 3 * torch.arange(8) % 5


def prior(tau: float = 1.0, counts: Tensor = COUNTS) -> Prior:
    return Prior(log_prior(counts), counts, tau)


def mean(name: str, logits: Tensor, labels: Tensor, given: Prior) -> Tensor:
    loss_sum, weight = LOSSES[name](logits, labels, torch.ones(len(labels)), given)
    return loss_sum / weight


@pytest.mark.parametrize("name", FIXTURE)
def test_values_are_those_of_the_original(name: str) -> None:
    assert float(mean(name, *fixture(), prior())) == pytest.approx(FIXTURE[name], abs=1e-5)


def test_without_strength_or_tail_logit_adjustment_is_cross_entropy() -> None:
    plain = mean("CE", *fixture(), prior())
    assert torch.equal(mean("LA", *fixture(), prior(tau=0.0)), plain)
    uniform = mean("LA", *fixture(), prior(counts=torch.full((5,), 7)))
    assert float(uniform) == pytest.approx(float(plain), rel=1e-6)


def test_adjustment_is_the_log_prior_times_tau() -> None:
    logits, labels = fixture()
    adjusted = logits + 0.7 * (COUNTS / COUNTS.sum()).log()
    assert float(mean("LA", logits, labels, prior(0.7))) == pytest.approx(float(F.cross_entropy(adjusted, labels)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cut", [[8], [1] * 8, [3, 5], [7, 1], [2, 3, 3]])
def test_sums_add_up_over_any_cut_of_the_batch(name: str, cut: list[int]) -> None:
    logits, labels = (each.double() if each.is_floating_point() else each for each in fixture())
    weights = torch.tensor([1, 0.5, 0, 2, 1, 1, 0.25, 1], dtype=torch.float64)
    whole = LOSSES[name](logits, labels, weights, prior())
    parts = zip(logits.split(cut), labels.split(cut), weights.split(cut), strict=True)
    sums = [torch.stack(LOSSES[name](*part, prior())) for part in parts]
    assert torch.allclose(torch.stack(sums).sum(0), torch.stack(whole), rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 1e30])
def test_a_left_out_sample_contributes_nothing(name: str, value: float) -> None:
    """Neither to the loss nor to any gradient but its own, which is zero, whatever its logits are."""
    logits, labels = fixture()
    weights = torch.ones(8)
    weights[3] = 0.0
    kept = weights > 0
    broken = logits.clone()
    broken[3] = value
    broken.requires_grad_(True)
    loss_sum, weight = LOSSES[name](broken, labels, weights, prior())
    assert (loss_sum.detach(), weight) == LOSSES[name](logits, labels, weights, prior())
    without = LOSSES[name](logits[kept], labels[kept], weights[kept], prior())
    assert torch.allclose(torch.stack(without), torch.stack([loss_sum, weight]), rtol=1e-6)
    loss_sum.backward()
    assert broken.grad is not None and not broken.grad[3].any() and broken.grad[kept].isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_an_empty_share_counts_nothing(name: str) -> None:
    """A rank without samples of its own does a step of weight zero."""
    logits, labels = fixture()
    logits.requires_grad_(True)
    loss_sum, weight = LOSSES[name](logits, labels, torch.zeros(8), prior())
    loss_sum.backward()
    assert float(loss_sum.detach()) == float(weight) == 0.0 and not logits.grad.any()


def test_gradients_are_those_of_torchs_mean() -> None:
    logits, labels = fixture()
    ours, theirs = logits.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    loss_sum, weight = cross_entropy(ours, labels, torch.ones(8), prior())
    (loss_sum / weight).backward()
    F.cross_entropy(theirs, labels).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)
    ours.grad = theirs.grad = None
    loss_sum, weight = logit_adjusted(ours, labels, torch.ones(8), prior(1.5))
    (loss_sum / weight).backward()
    F.cross_entropy(theirs + 1.5 * log_prior(COUNTS), labels).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_weights_are_torchs_class_weights() -> None:
    """Σ w_i ℓ_i / Σ w_i, the weighted mean that torch makes of class weights."""
    logits, labels = fixture()
    of_class = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1])
    loss_sum, weight = cross_entropy(logits, labels, of_class[labels], prior())
    assert float(loss_sum / weight) == pytest.approx(float(F.cross_entropy(logits, labels, of_class)), rel=1e-6)
