"""BalPoE and LGLA: the numbers of the specification's fixtures, what the experts assume, refusals, published recipes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small import loss_with
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.trainers.config_checks import outline
from tailtune.trainers.evaluation.metrics import calibration
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import Method
from tailtune.trainers.methods.balpoe import BalPoE
from tailtune.trainers.methods.base import Objective
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
    alone = [
        value(make(experts=1, taus=[tau]), logits[:, e : e + 1]) for e, tau in enumerate(strengths)
    ]
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
    """Fixture 40; our errors are in percent."""
    a, b = torch.meshgrid(torch.arange(40), torch.arange(5), indexing="ij")
    confidence, classes = (3 * torch.sin(1 + a + 2 * b.double())).softmax(1).max(1)
    hits = classes == 7 * torch.arange(40) % 5
    found = calibration(confidence, hits)
    assert hits.double().mean() == pytest.approx(0.225)
    assert (found["ece"], found["mce"]) == pytest.approx((39.6732, 94.9302), abs=1e-4)


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
