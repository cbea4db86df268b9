"""RIDE, its distillation and SADE: the numbers of the specification's fixtures, a plain formulation, any number of
experts, how a batch is cut."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import loss_with
from torch import Tensor, nn

from tailtune.trainers.losses import LOSSES, effective_weights
from tailtune.trainers.methods import Earlier, Method
from tailtune.trainers.methods.base import Objective
from tailtune.trainers.methods.distill import Distill
from tailtune.trainers.methods.ride import Ride
from tailtune.trainers.methods.sade import Sade, reversed_prior

COUNTS = torch.tensor([int(500 * 0.01 ** (k / 9)) for k in range(10)])
LABELS = torch.tensor([0, 3, 7, 9])
DRW = 160  # the original's `reweight_epoch 160`, whose first epoch is 1
BEFORE, AFTER = DRW - 1, DRW


def wave(experts: int = 3, views: int = 4) -> Tensor:
    """Fixture F: 3 sin(0.7 b + 0.13 c (e + 1)), all from 1 on, [B, E, C]."""
    b, e, c = torch.meshgrid(*(torch.arange(1, n + 1).double() for n in (views, experts, 10)), indexing="ij")
    return 3 * torch.sin(0.7 * b + 0.13 * c * (e + 1))


def batch(weights: list[float] | None = None) -> dict[str, Any]:
    given = torch.ones(4) if weights is None else torch.tensor(weights)
    return {"image": torch.zeros(4, 3, 8, 8), "label": LABELS, "weight": given.double()}


def cut(whole: dict[str, Any], part: slice) -> dict[str, Any]:
    return {name: each[part] for name, each in whole.items()}


def make(kind: type[Method], loss: str = "LDAM", experts: int = 3, epoch: int = BEFORE, **options: Any) -> Any:
    """A method around no model: what it makes of logits. A wrapper's inner method is RIDE."""
    model = nn.Module()
    model.num_experts = experts  # type: ignore[assignment]
    objective = Objective(COUNTS, loss_with(loss, scale=30.0), drw_epoch=DRW)
    inner = {"diversity": options.pop("diversity", -0.45), "reweight_factor": 0.05} if kind is Distill else {}
    around = [make(Ride, loss, experts, **inner)] if kind is Distill else []
    method = kind(model, objective, kind.Options(**options), *around)  # type: ignore[call-arg, arg-type]
    method.on_epoch(epoch, 200)
    return method


def taught(**options: Any) -> Any:
    """With a teacher whose logits are those of the fixture."""
    method = make(Distill, **options)
    b, c = torch.meshgrid(torch.arange(1, 5).double(), torch.arange(1, 11).double(), indexing="ij")
    teacher = SimpleNamespace(predict=lambda images: (2 * torch.cos(0.5 * b + 0.21 * c))[: len(images)])
    method.after(Earlier(True, dict, lambda: teacher))  # type: ignore[arg-type, return-value]
    return method


def value(method: Any, logits: Tensor, given: dict[str, Any] | None = None) -> Tensor:
    loss_sum, weight = method.loss(logits, given or batch())
    return loss_sum / weight


MADE: dict[str, Callable[[], Any]] = {
    "ride": lambda: make(Ride),
    "together": lambda: make(Ride, diversity=0.0),
    "sade": lambda: make(Sade, "CE"),
    "distill": taught,
}


# --- fixtures of the specification -----------------------------------------------------------------------------------


def test_margins_weights_and_temperatures() -> None:
    """Fixtures 1 to 3. With equal logits CE is log(1 + (C − 1) exp(s m))."""
    labels = torch.arange(10)
    given, ldam = make(Ride).prior, loss_with("LDAM", scale=30.0)
    each = [ldam(torch.zeros(1, 10).double(), labels[k : k + 1], torch.ones(1), given)[0] for k in range(10)]
    margins = (torch.stack(each).expm1() / 9).log() / 30
    wanted = [0.158114, 0.179802, 0.204409, 0.232470, 0.264343, 0.301139, 0.341413, 0.393756, 0.444570, 0.5]
    assert margins.tolist() == pytest.approx(wanted, rel=1e-5)
    wanted = [0.040353, 0.066810, 0.110933, 0.184915, 0.308491, 0.518890, 0.856654, 1.514860, 2.461033, 3.937062]
    assert effective_weights(COUNTS.double()).tolist() == pytest.approx(wanted, rel=2e-5)
    temperatures = make(Ride, reweight_factor=0.05).temperatures
    wanted = [1, 0.929434, 0.887305, 0.862028, 0.846932, 0.837804, 0.832538, 0.829027, 0.827271, 0.826218]
    assert temperatures.tolist() == pytest.approx(wanted, rel=1e-6)
    assert float(temperatures.mean()) == pytest.approx(0.867856, rel=1e-6)


RIDE = [
    (-0.45, 0.05, 36.128799, 47.373020),
    (-0.2, 0.05, 36.355366, 47.599056),
    (-0.2, 0.02, 36.355366, 47.598927),
    (0.0, 0.05, 35.641354, 46.251060),
]


@pytest.mark.parametrize(("diversity", "factor", "before", "after"), RIDE)
def test_ride(diversity: float, factor: float, before: float, after: float) -> None:
    """Fixtures 4 and 5: the last epoch before `drw_epoch` and the first with it."""
    method = make(Ride, diversity=diversity, reweight_factor=factor)
    for epoch, wanted in ((0, before), (BEFORE, before), (AFTER, after), (199, after)):
        method.on_epoch(epoch, 200)
        assert float(value(method, wave())) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("times", "before", "after"), [(True, 109.332962, 143.065613), (False, 36.444317, 47.688538)], ids=["RIDE", "fork"]
)
def test_distillation(times: bool, before: float, after: float) -> None:
    """Fixture 6: the original multiplies by the number of experts, BatchFormer's fork does not."""
    method = taught(temperature=1.5, times_experts=times)
    for epoch, wanted in ((BEFORE, before), (AFTER, after)):
        method.on_epoch(epoch, 200)
        assert float(value(method, wave())) == pytest.approx(wanted, rel=1e-6)


def test_losses_of_one_classifier() -> None:
    """Fixture 7, on the first expert's logits; CE also on the mean's."""
    first, mean = wave()[:, :1], wave().mean(1, keepdim=True)
    wanted = {"CE": 3.274413, "CB": 3.827867, "Focal": 2.971361, "LDAM": 12.837309}
    for name, number in wanted.items():
        assert float(value(make(Method, name), first)) == pytest.approx(number, rel=1e-5)
    assert float(value(make(Method, epoch=AFTER), first)) == pytest.approx(17.611423, rel=1e-6)
    assert float(value(make(Method, "CE"), mean)) == pytest.approx(2.438888, rel=1e-6)


@pytest.mark.parametrize(("strength", "last", "total"), [(1.0, 5.545732, 13.094761), (2.0, 7.893214, 15.442242)])
def test_sade(strength: float, last: float, total: float) -> None:
    """Fixture 8: the three terms, and their sum."""
    method = make(Sade, "CE", inverse_strength=strength)
    adjusted = wave() + method.adjustments
    terms = [float(F.cross_entropy(adjusted[:, e], LABELS)) for e in range(3)]
    assert terms == pytest.approx([3.274413, 4.274615, last], rel=1e-6)
    assert float(value(method, wave())) == pytest.approx(total, rel=1e-6)


def test_reversed_prior() -> None:
    """Fixture 8; equal counts get the frequencies of their ranks, the earlier label as the rarer class."""
    found = reversed_prior(torch.tensor([5, 50, 20, 100]) / 175)
    assert found.tolist() == pytest.approx([0.571429, 0.114286, 0.285714, 0.028571], abs=1e-6)
    assert reversed_prior(torch.tensor([0.4, 0.1, 0.1, 0.4])).tolist() == pytest.approx([0.1, 0.4, 0.4, 0.1])
    assert reversed_prior(torch.tensor([0.2, 0.2, 0.5, 0.1])).tolist() == pytest.approx([0.2, 0.2, 0.1, 0.5])


# --- a plain formulation ---------------------------------------------------------------------------------------------


def plain_ride(logits: Tensor, epoch: int, diversity: float, factor: float) -> Tensor:
    """The specification's §2.1 with the means of PyTorch."""
    n = COUNTS.double()
    margins = 0.5 * n**-0.25 / (n**-0.25).max()
    omega = 10 * n / n.sum() * factor + 1 - factor
    late = epoch >= DRW
    tau = omega / omega.max() if late else torch.ones(10).double()
    weight = 1e-4 / (1 - 0.9999**n)
    weight = 10 * weight / weight.sum() if late else None
    total, mean = torch.zeros(()).double(), logits.mean(1)
    for own in logits.unbind(1):
        base = mean if diversity == 0 else own
        total += F.cross_entropy(base - 30 * margins[LABELS, None] * F.one_hot(LABELS, 10), LABELS, weight)
        target = (mean.detach() / tau).softmax(1)
        kl = F.kl_div((own / tau).log_softmax(1), target, reduction="batchmean")
        total += diversity * tau.mean() ** 2 * kl
    return total


@pytest.mark.parametrize("epoch", [BEFORE, AFTER])
@pytest.mark.parametrize("experts", [1, 2, 3, 5])
@pytest.mark.parametrize("diversity", [-0.45, 0.0, 0.3])
def test_ride_and_its_gradient_are_the_plain_formulation(diversity: float, experts: int, epoch: int) -> None:
    logits = wave(experts).requires_grad_()
    wanted = plain_ride(logits, epoch, diversity, 0.05)
    found = value(make(Ride, experts=experts, epoch=epoch, diversity=diversity, reweight_factor=0.05), logits)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (found, wanted)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-13)
    if experts == 1:
        assert torch.allclose(found, value(make(Method, epoch=epoch), logits), rtol=1e-12, atol=0)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "GCL"])  # whose noise is another for each expert
def test_every_loss_is_of_every_expert(loss: str) -> None:
    """Any loss and number of experts: of like ones E times the one loss, with no divergence between them."""
    alike = wave(1).expand(-1, 5, -1)
    for epoch in (BEFORE, AFTER):
        one = value(make(Method, loss, epoch=epoch), wave(1))
        assert torch.allclose(value(make(Ride, loss, experts=5, epoch=epoch), alike), 5 * one)
    if not LOSSES[loss].adjusts:
        plain = make(Sade, loss, inverse_strength=0.0, experts=1)
        assert torch.equal(value(plain, wave(1)), value(make(Method, loss), wave(1)))


def test_sade_places_any_number_of_experts() -> None:
    """Two are the ends, five have the three in their midst; the others stand half-way."""
    three, five = (make(Sade, "CE", experts=n).adjustments for n in (3, 5))
    assert torch.allclose(five[::2], three) and torch.allclose(make(Sade, "CE", experts=2).adjustments, three[::2])
    assert torch.allclose(five[1], three[1] / 2) and torch.allclose(five[3], (three[1] + three[2]) / 2)
    assert make(Sade, "CE", experts=1).adjustments.abs().max() == 0
    prior = COUNTS.double() / COUNTS.sum()
    assert torch.allclose(three[2], (prior + 1e-9).log() - 2 * (reversed_prior(prior) + 1e-9).log(), atol=1e-15)


# --- how a batch is cut, and samples that are left out ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["ride", "sade", "distill"])
def test_micro_batches_add_up(name: str) -> None:
    """Exactly, where the loss weighs samples as the divergence does; else it is the mean of the parts' divergences."""
    method = MADE[name]()
    whole, parts = batch([1, 0.5, 2, 1]), (slice(0, 1), slice(1, 4))
    if name == "distill":
        shown = method.teacher[0].predict(whole["image"])
        whole["image"] = torch.arange(4)
        method.teacher = (SimpleNamespace(predict=lambda rows: shown[rows]),)
    for epoch in (BEFORE, AFTER):
        method.on_epoch(epoch, 200)
        found = [torch.stack(method.loss(wave()[part], cut(whole, part))) for part in parts]
        wanted, total = torch.stack(method.loss(wave(), whole)), sum(found)
        exact = name == "sade" or epoch == BEFORE
        assert torch.allclose(total[1], wanted[1]) and torch.allclose(total, wanted) == exact
        assert torch.allclose(total, wanted, rtol=0.05)


@pytest.mark.parametrize("name", ["ride", "together", "distill", "sade"])
@pytest.mark.parametrize("epoch", [BEFORE, AFTER])
def test_a_left_out_sample_does_not_matter(name: str, epoch: int) -> None:
    """Its logits may be anything; nobody may be there at all."""
    method = MADE[name]()
    method.on_epoch(epoch, 200)
    broken = wave()
    broken[3] = float("nan")
    broken.requires_grad_()
    found = value(method, broken, batch([1, 1, 1, 0]))
    assert torch.allclose(found, value(method, wave()[:3], cut(batch(), slice(3))))
    (gradient,) = torch.autograd.grad(found, broken)
    assert gradient.isfinite().all() and gradient[:3].abs().min() > 0 and gradient[3].abs().max() == 0
    nobody = wave().requires_grad_()
    loss_sum, weight = method.loss(nobody, batch([0, 0, 0, 0]))
    assert loss_sum == 0 and weight == 0
    assert torch.autograd.grad(loss_sum, nobody)[0].abs().max() == 0
