"""BalPoE and LGLA: the numbers of the specification's fixtures, what the experts assume, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import loss_with
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.models.heads.classifiers import CosineClassifier
from tailtune.trainers.config_checks import outline
from tailtune.trainers.evaluation.metrics import calibration, calibration_error
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import Method
from tailtune.trainers.methods.balpoe import BalPoE
from tailtune.trainers.methods.base import Objective
from tailtune.trainers.methods.lgla import LGLA, groups
from tailtune.trainers.methods.sade import Sade

Config = Callable[..., CfgNode]
COUNTS = torch.tensor([500, 200, 50, 20, 5])
LABELS = 3 * torch.arange(8) % 5
PARTNERS = torch.tensor([3, 0, 1, 2, 7, 4, 5, 6])


def wave(experts: int = 3) -> Tensor:
    """5 sin(1 + i + 2c + 0.7e), [8, E, 5]."""
    i, e, c = torch.meshgrid(*(torch.arange(n).double() for n in (8, experts, 5)), indexing="ij")
    return 5 * torch.sin(1 + i + 2 * c + 0.7 * e)


def batch(labels: Tensor = LABELS, weight: Tensor | None = None) -> dict[str, Any]:
    return {"label": labels, "weight": torch.ones(len(labels)).double() if weight is None else weight}


def make(
    kind: type[Method] = BalPoE, experts: int = 3, loss: str = "CE", counts: Tensor = COUNTS, **options: Any
) -> Any:
    """A method around no model: what it makes of logits."""
    model = nn.Module()
    model.num_experts = experts  # type: ignore[assignment]
    model.head = CosineClassifier(4, len(counts), 30.0)
    return kind(model, Objective(counts, loss_with(loss, scale=30.0)), kind.Options(**options))  # type: ignore[arg-type]


def value(method: Method, logits: Tensor, given: dict[str, Any] | None = None) -> float:
    loss_sum, weight = method.loss(logits, given or batch())
    return float(loss_sum / weight)


def taus(method: Any) -> list[float]:
    """τ of each expert, from its adjustment of the rarest class."""
    return (method.adjustments[:, -1] / (COUNTS[-1] / COUNTS.sum()).double().log()).tolist()


# --- BalPoE ----------------------------------------------------------------------------------------------------------

FIXTURES = [
    ([0, 1, 2], 4.662959, [4.525486, 4.463336, 5.000055]),
    ([0, 1.25, 2.5], 4.962029, [4.525486, 4.746393, 5.614207]),
    ([-1, 1, 3], 5.449606, [5.580639, 4.463336, 6.304846]),
    ([1], 5.184051, [5.184051]),
]


@pytest.mark.parametrize(("strengths", "total", "of_experts"), FIXTURES)
def test_balpoe(strengths: list[float], total: float, of_experts: list[float]) -> None:
    """Fixtures 35 and 36: the mean of the experts' losses, and each of them."""
    method, logits = make(experts=len(strengths), taus=strengths), wave(len(strengths))
    assert value(method, logits) == pytest.approx(total, abs=1e-6)
    alone = [value(make(experts=1, taus=[tau]), logits[:, e : e + 1]) for e, tau in enumerate(strengths)]
    assert alone == pytest.approx(of_experts, abs=1e-6)


def test_one_expert_is_balanced_softmax() -> None:
    assert value(make(experts=1), wave(1)) == pytest.approx(value(make(Method, 1, "BS"), wave(1)), rel=1e-6)


def test_two_experts_are_those_of_sade() -> None:
    """SADE adds the losses, BalPoE takes their mean."""
    ours, theirs = make(experts=2, tau_max=1.0), make(Sade, 2, inverse_strength=0.0)
    theirs.adjustments = make(Sade, 3).adjustments[:2]
    assert 2 * value(ours, wave(2)) == pytest.approx(value(theirs, wave(2)), rel=1e-12)


def test_balpoe_on_mixed_labels() -> None:
    """Fixture 37, with λ = 0.3; `mixup` adds the two losses."""
    method = make(taus=[0, 1, 2])
    found = 0.3 * value(method, wave()) + 0.7 * value(method, wave(), batch(LABELS[PARTNERS]))
    assert found == pytest.approx(4.355076, abs=1e-6)


def test_evenly_spaced_strengths() -> None:
    """Fixture 38."""
    for experts, wanted in ((7, [k / 3 for k in range(7)]), (4, [0, 2 / 3, 4 / 3, 2]), (1, [1])):
        assert taus(make(experts=experts)) == pytest.approx(wanted, rel=1e-6)
    assert taus(make(spacing="uniform")) == pytest.approx([1 / 3, 1, 5 / 3], rel=1e-6)
    assert taus(make(tau_min=-1.0, tau_max=3.0)) == pytest.approx([-1, 1, 3], rel=1e-6)


def test_what_the_experts_assume() -> None:
    """Fixture 39: the mean of the experts is right for π^(1 − mean τ)."""
    rows = make(taus=[0, 1.25, 2.5]).assumed_prior()
    assert torch.allclose(rows[0].exp(), COUNTS.double() / COUNTS.sum(), rtol=1e-6)
    wanted = [0.105999, 0.133287, 0.188496, 0.237021, 0.335198]
    assert rows.mean(0).softmax(0).tolist() == pytest.approx(wanted, abs=1e-6)
    assert make().assumed_prior().mean(0).softmax(0).tolist() == pytest.approx([0.2] * 5, abs=1e-6)


def test_calibration() -> None:
    """Fixture 40; our errors are in percent. In its SCE, a class that is neither label nor prediction is a hit."""
    a, b = torch.meshgrid(torch.arange(40), torch.arange(5), indexing="ij")
    probabilities, labels = (3 * torch.sin(1 + a + 2 * b.double())).softmax(1), 7 * torch.arange(40) % 5
    confidence, classes = probabilities.max(1)
    hits = classes == labels
    found = calibration(confidence, hits)
    assert hits.double().mean() == pytest.approx(0.225)
    assert (found["ece"], found["mce"]) == pytest.approx((39.6732, 94.9302), abs=1e-4)
    bins = zip(found["counts"], found["accuracy"], found["confidence"], strict=True)
    overconfidence = sum(n / 40 * c / 100 * max(c - a, 0) / 100 for n, a, c in bins if n)
    assert overconfidence == pytest.approx(0.265150, abs=1e-6)
    alike = (F.one_hot(classes, 5) == F.one_hot(labels, 5)).T.contiguous()
    of_classes = [calibration_error(*each, bins=15) for each in zip(probabilities.T.contiguous(), alike, strict=True)]
    assert sum(of_classes) / 5 == pytest.approx(0.636769, abs=1e-6)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.adjusts])
def test_a_loss_that_adjusts_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"loss_type {name} adjusts by the prior, and so does method balpoe itself"):
        make(loss=name)


def test_a_list_of_another_length_is_refused(config: Config) -> None:
    words = ("method", "balpoe", "num_experts", 3, "loss_type", "CE", "balpoe.taus", "[0, 1]")
    with pytest.raises(UserError, match=r"balpoe\.taus has 2 numbers, and num_experts is 3"):
        outline(config("fake_lt", "tiny_clip", "pretrained", "none", *words))
    with pytest.raises(UserError, match=r"balpoe\.taus.*numbers such as \[0, 1\.25, 2\.5\]"):
        config("fake_lt", "tiny_clip", "balpoe.taus", "[]")


# --- LGLA ------------------------------------------------------------------------------------------------------------

FEW = torch.tensor([60, 50, 40, 30, 20])


def plain_lgla(logits: Tensor, labels: Tensor, counts: Tensor, of_class: Tensor, tau: float) -> Tensor:
    """The specification's §5.2 with the means of PyTorch."""
    log_prior, total = (counts.double() / counts.sum()).log(), torch.zeros(()).double()
    experts = logits.shape[1]
    for e in range(experts):
        bias = torch.where(of_class == e, log_prior, log_prior.max()) if e < experts - 1 else tau * log_prior
        angle = (logits[:, e].gather(1, labels[:, None])[:, 0].detach() / 30).acos()
        weight = torch.ones_like(angle)
        for group in of_class[labels].unique():
            inside = of_class[labels] == group
            weight[inside] += (angle[inside] - angle[inside].mean()).clamp(min=0)
        total += (weight * F.cross_entropy(logits[:, e] + bias, labels, reduction="none")).mean()
    return total


def test_lgla() -> None:
    """Fixture 41."""
    assert groups(FEW, 2).tolist() == [0, 1, 1, 1, 1]
    assert value(make(LGLA, counts=FEW, tau=2.5), wave()) == pytest.approx(13.294206, abs=1e-6)


@pytest.mark.parametrize("experts", [1, 2, 3, 4])
def test_lgla_and_its_gradient_are_the_plain_formulation(experts: int) -> None:
    logits = wave(experts).requires_grad_()
    loss_sum, weight = make(LGLA, experts, counts=FEW, tau=2.0).loss(logits, batch())
    wanted = plain_lgla(logits, LABELS, FEW, groups(FEW, max(experts - 1, 1)), 2.0)
    assert torch.allclose(loss_sum / weight, wanted, rtol=1e-7, atol=0)
    gradients = [torch.autograd.grad(each, logits)[0] for each in (loss_sum / weight, wanted)]
    assert torch.allclose(*gradients, rtol=0, atol=1e-8)


def test_groups_have_about_equally_many_images() -> None:
    """Of CIFAR-100-LT 14 and 86 classes, as in the original; equal counts are together, few classes make few groups."""
    cifar = torch.tensor([int(500 * 0.01 ** (k / 99)) for k in range(100)])
    assert groups(cifar, 2).bincount().tolist() == [14, 86]
    assert groups(torch.tensor([5, 50, 20, 10]), 1).tolist() == [0, 0, 0, 0]
    assert groups(torch.tensor([10, 10, 10, 10]), 2).tolist() == [1, 1, 1, 1], "the last count of the rarer group"
    assert groups(torch.tensor([1000, 1, 1]), 3).tolist() == [1, 1, 1], "one class has more than a third"


def test_what_the_experts_of_lgla_assume() -> None:
    """Of an expert with a group: equal frequencies in it."""
    rows = make(LGLA, counts=FEW, tau=2.0).assumed_prior().exp()
    wanted = torch.tensor([[1, 50 / 60, 40 / 60, 30 / 60, 20 / 60], [1, 1, 1, 1, 1], 1 / FEW])
    assert torch.allclose(rows, wanted.double() / wanted.double().sum(1, keepdim=True), atol=1e-6)


def test_a_left_out_sample_is_in_no_mean() -> None:
    method, broken = make(LGLA, counts=FEW), wave()
    broken[3] = float("nan")
    broken.requires_grad_()
    weight = torch.ones(8).double()
    weight[3] = 0
    loss_sum, total = method.loss(broken, batch(weight=weight))
    rest = [k for k in range(8) if k != 3]
    assert float((loss_sum / total).detach()) == pytest.approx(
        value(method, wave()[rest], batch(LABELS[rest])), rel=1e-12
    )
    assert torch.autograd.grad(loss_sum, broken)[0].isfinite().all()
    loss_sum, total = method.loss(wave(), batch(weight=torch.zeros(8).double()))
    assert loss_sum == 0 and total == 0


def test_refusals_of_lgla(config: Config) -> None:
    words = ("pretrained", "none", "method", "lgla", "num_experts", 3)
    with pytest.raises(UserError, match="method lgla adjusts the logits itself: use loss_type CE"):
        outline(config("fake_lt", "tiny_clip", *words))
    with pytest.raises(UserError, match="method lgla weights samples by their angles: use classifier CosineClassifier"):
        outline(config("fake_lt", "tiny_clip", *words, "loss_type", "CE", "classifier", "LinearClassifier"))
    with pytest.raises(UserError, match="scale 0: .* set it above 0"):
        outline(config("fake_lt", "tiny_clip", *words, "loss_type", "CE", "scale", 0))
