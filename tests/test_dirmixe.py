"""DirMixE: fixtures D1 to D3 and D5 of the specification, a plain formulation, its draws and when what counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiers import slow_except
from torch import Tensor, nn
from trajectories import killed_after, trained
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.long_tail import longtail_counts
from tailtune.trainers.evaluation.expert_weights import Learner, Recipe, objective
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods.base import Objective
from tailtune.trainers.methods.dirmixe import DirMixE, Draws, base_priors, semi_variance
from tailtune.trainers.methods.sade import reversed_prior
from tailtune.trainers.run import run

Config = Callable[..., CfgNode]
COUNTS = {10: torch.tensor(longtail_counts(5000, 10, 0.01)), 100: torch.tensor(longtail_counts(500, 100, 0.01))}
PRIOR = COUNTS[10].double() / COUNTS[10].sum()


def make(classes: int = 10, experts: int = 3, seed: int = 0, loss: str = "CE", **options: Any) -> DirMixE:
    """The method around no model: what it makes of logits."""
    model = nn.Module()
    model.num_experts = experts  # type: ignore[assignment]
    objective = Objective(COUNTS[classes], LOSSES[loss], seed=seed)
    return DirMixE(model, objective, DirMixE.Options(**options))  # type: ignore[arg-type]


def recycled(classes: int, per_epoch: int, **options: Any) -> DirMixE:
    method = make(classes, **options)
    method.recycled_draws = method.make_recycled_draws(per_epoch)
    return method


def at(method: DirMixE, step: int, epoch: int = 0) -> Draws:
    method.epoch = epoch
    method.before_step(step)
    return method.drawn(torch.device("cpu"))


def given(method: DirMixE, experts: list[int], priors: Tensor) -> None:
    """Draws of the step at hand."""
    method.drawn = lambda device: Draws(torch.tensor(experts), priors)  # type: ignore[method-assign]


def batch(labels: Tensor, weights: list[float] | None = None) -> dict[str, Tensor]:
    return {"label": labels, "weight": torch.ones(len(labels)) if weights is None else torch.tensor(weights)}


def plain(logits: Tensor, labels: Tensor, method: DirMixE, draws: Draws) -> Tensor:
    """ℓ_m of equation 2.1, one draw after the other, [B, M]."""
    found = []
    for k, w in zip(*draws, strict=True):
        scores = logits[:, k] - ((w / PRIOR) ** method.options.power + 1e-9).log().to(logits.dtype)
        found.append(-scores.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1))
    return torch.stack(found, 1)


# --- fixtures of the specification -----------------------------------------------------------------------------------

D1 = [
    (1.3, 15.0, "3.903399 5.056091 6.279643 4.655909 5.599676 5.403219", (5.149656, 0.267027), (16.727274, 7.034011)),
    (1.0, 1.0, "3.903399 4.551420 5.202983 4.415671 4.939748 4.649644", (4.610477, 0.258532), (4.840985, 0.342920)),
    (1.6, 1.0, "3.903399 5.613791 7.463310 4.921290 6.310810 6.255791", (5.744732, 0.274051), (7.512300, 0.861090)),
]


def d1() -> tuple[Tensor, Tensor, Tensor]:
    """Logits [B, E, C], labels and the priors of the six draws."""
    b, k, c = torch.meshgrid(torch.arange(6.0), torch.arange(3.0), torch.arange(10.0), indexing="ij")
    logits = 3 * torch.sin(0.7 * (k.double() + 1) + 0.3 * b.double() + 1.1 * c.double())
    forward, even, backward = PRIOR, torch.full_like(PRIOR, 0.1), reversed_prior(PRIOR)
    mixed = [(forward + even) / 2, (even + backward) / 2, 0.9 * backward + 0.1 * even]
    return logits, (3 * torch.arange(6)) % 10, torch.stack([forward, even, backward, *mixed])


@pytest.mark.parametrize(("power", "variance", "each", "warm", "final"), D1)
def test_the_loss(power: float, variance: float, each: str, warm: Any, final: Any) -> None:
    """Fixture D1: of every draw alone, of all before and after the start of the semi-variance, and gradients."""
    method, (logits, labels, priors) = make(power=power, variance=variance), d1()
    for k, prior, wanted in zip([0, 1, 2] * 2, priors, map(float, each.split()), strict=True):
        given(method, [k], prior.unsqueeze(0))
        assert float(method.loss(logits, batch(labels))[0]) / 6 == pytest.approx(wanted, rel=1e-5)
    given(method, [0, 1, 2, 0, 1, 2], priors)
    for counts, (value, norm) in ((False, warm), (True, final)):
        method.final = counts
        leaf = logits.clone().requires_grad_()
        loss_sum, weight = method.loss(leaf, batch(labels))
        (loss_sum / weight).backward()
        assert leaf.grad is not None
        assert float(loss_sum.detach()) / 6 == pytest.approx(value, rel=1e-5) and weight == 6
        assert float(leaf.grad.norm()) == pytest.approx(norm, rel=1e-5)


def test_the_semi_variance() -> None:
    """Of what is above the mean only; the divisor is never 0, and equal losses have a gradient of 0."""
    assert semi_variance(torch.tensor([1.0, 2.0, 4.0, 5.0])) == 5
    assert semi_variance(torch.tensor([0.0, 0.0, 3.0])) == 4
    losses = torch.ones(5, requires_grad=True)
    semi_variance(losses).backward()
    assert semi_variance(losses) == 0 and torch.equal(losses.grad, torch.zeros(5))  # type: ignore[arg-type]


def test_the_pool_and_its_shuffle() -> None:
    """Fixture D2."""
    method = recycled(10, 3, draws=4, pool="recycled")
    pool = method.recycled_draws
    assert pool is not None and pool.experts.tolist() == [0, 0, 1, 1, 2, 0, 0, 0, 0, 1, 2, 0]
    wanted = [0.407875, 0.241676, 0.138612, 0.090824, 0.051276, 0.027996, 0.020134, 0.010735, 0.006973, 0.003898]
    assert pool.priors[0].tolist() == pytest.approx(wanted, abs=5e-7)
    assert pool.priors[2, :3].tolist() == pytest.approx([0.099948, 0.101556, 0.099823], abs=5e-7)
    steps = [at(method, step) for step in (1, 2, 3)]
    assert torch.cat([each.experts for each in steps]).tolist() == [0, 1, 2, 0, 0, 1, 0, 0, 0, 2, 1, 0]
    assert steps[0].priors[:, 0].tolist() == pytest.approx([0.407875, 0.099948, 0.004146, 0.403617], abs=5e-7)


D3 = [
    (10, 97, "22012220012021102110", [1974, 1899, 1947], [0.004796, 0.007065, 0.009347, 0.020195, 0.03314]),
    (100, 85, "00010100022102211122", [1697, 1726, 1677], [0.047467, 0.045021, 0.045752, 0.044074, 0.042984]),
]


@pytest.mark.parametrize(("classes", "per_epoch", "first", "totals", "start"), D3)
def test_the_pool_after_the_choice_of_images(
    classes: int, per_epoch: int, first: str, totals: list[int], start: list[float]
) -> None:
    """Fixture D3: where the original's training begins."""
    pool = recycled(classes, per_epoch, pool="recycled_cifar").recycled_draws
    assert pool is not None and "".join(map(str, pool.experts[:20])) == first
    assert torch.from_numpy(pool.experts).bincount().tolist() == totals
    assert pool.priors[0, :5].tolist() == pytest.approx(start, abs=5e-7)


@pytest.mark.parametrize(
    ("entropy", "start", "end"),
    [
        (0.0, [-0.9847252, -0.9847410], [-0.9857168, 0.365314, 0.312496, 0.322190]),
        (0.01, [-0.9903548, -0.9903725], [None, 0.367323, 0.311239, 0.321438]),
    ],
)
def test_weights_at_test_time(entropy: float, start: list[float], end: list[float | None]) -> None:
    """Fixture D5: what `adapt sade` does on the same views again and again."""
    b, v, k, c = torch.meshgrid(*(torch.arange(n).double() for n in (8, 2, 3, 5)), indexing="ij")
    views = 2 * torch.sin(0.5 * (k + 1) + 0.9 * b + 0.4 * c * (k + 1) + 0.3 * v)
    logits = Logits(views[:, 0], torch.zeros(8, dtype=torch.int64), torch.arange(8), 0)
    learner = Learner("uniform", logits, torch.arange(8), Recipe(entropy=entropy))
    losses, values = [], []
    for _ in range(20):
        losses.append(float(objective(views, learner.w.softmax(0), entropy)[0].detach()))
        learner.step(views, torch.arange(8))
        values.append(learner.w.tolist())
    assert losses[:2] == pytest.approx(start, abs=1e-7)
    if not entropy:
        assert values[0] == pytest.approx([0.334686, 0.332374, 0.332845], abs=1e-6)
        assert values[1] == pytest.approx([0.336615, 0.331007, 0.332148], abs=1e-6)
        assert losses[19] == pytest.approx(end[0], abs=1e-7)
    assert learner.weights.tolist() == pytest.approx(end[1:], abs=1e-6)


# --- against a plain formulation -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_one_product_is_a_softmax_for_every_draw(spread: float, dtype: torch.dtype, close: float) -> None:
    """Values and gradients; some samples count twice or not at all, of which one is not even a number."""
    method = make(power=1.6, variance=3.0)
    method.final = True
    draws = at(method, 1)
    labels, weights = torch.arange(8), [1.0, 2.0, 0.0, 1.0, 1.0, 0.0, 0.5, 1.0]
    logits = spread * torch.rand(8, 3, 10, generator=torch.Generator().manual_seed(0), dtype=dtype)
    own, other = (logits.clone().requires_grad_() for _ in range(2))
    holed = torch.where(torch.arange(8).view(-1, 1, 1) == 2, torch.nan, own)
    loss_sum, weight = method.loss(holed, batch(labels, weights))
    scale = torch.tensor(weights, dtype=dtype)
    losses = (plain(other, labels, method, draws) * scale.unsqueeze(1)).sum(0) / scale.sum()
    above = losses[losses > losses.mean()]
    value = losses.mean() + 3.0 * (above - losses.mean()).square().sum() / max(len(above) - 1, 1)
    assert weight == scale.sum()
    torch.testing.assert_close(loss_sum, scale.sum() * value, rtol=close, atol=0)
    (loss_sum / weight).backward(), value.backward()
    torch.testing.assert_close(own.grad, other.grad, rtol=close, atol=close)


def test_nothing_is_kept_for_every_draw_and_class() -> None:
    """Neither in the forward pass nor for the backward one is there a tensor as large as [M, B, C]."""
    method, kept = make(100), []

    def keep(each: Tensor) -> Tensor:
        kept.append(each.numel())
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        method.loss(torch.zeros(64, 3, 100, requires_grad=True), batch(torch.arange(64)))
    assert 0 < max(kept) <= 64 * 3 * 100


def test_a_share_without_samples() -> None:
    """A process may have none at the end of an epoch: no weight, no gradient, no NaN."""
    method, logits = make(), torch.full((2, 3, 10), torch.nan, requires_grad=True)
    method.final = True
    loss_sum, weight = method.loss(logits, batch(torch.tensor([0, 1]), [0.0, 0.0]))
    loss_sum.backward()
    assert loss_sum == 0 and weight == 0 and torch.equal(logits.grad, torch.zeros(2, 3, 10))  # type: ignore[arg-type]


# --- test priors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 3, 5])
def test_any_number_of_experts(experts: int) -> None:
    """They stand evenly from π over the uniform prior to the reversed one."""
    even, backward = torch.full_like(PRIOR, 0.1), reversed_prior(PRIOR)
    between = [(x**0.5 / (x**0.5).sum()) for x in (PRIOR, backward)]
    wanted = {1: [even], 2: [PRIOR, backward], 3: [PRIOR, even, backward]}
    wanted[5] = [PRIOR, between[0], even, between[1], backward]
    torch.testing.assert_close(base_priors(COUNTS[10], experts), torch.stack(wanted[experts]))
    method = make(experts=experts)
    assert at(method, 1).experts.unique().tolist() == list(range(experts))
    loss_sum, _ = method.loss(torch.zeros(4, experts, 10), batch(torch.arange(4)))
    assert loss_sum.isfinite()


def test_drawn_priors_lie_around_those_of_the_experts() -> None:
    """Dir(A b) has the mean b and the variance b (1 − b) / (A + 1); all experts are drawn equally often."""
    method = make(draws=20000, concentration=1000.0)
    experts, priors = at(method, 1)
    for expert, base in enumerate(base_priors(COUNTS[10], 3)):
        own = priors[experts == expert]
        assert len(own) / 20000 == pytest.approx(1 / 3, abs=0.015)
        spread = (base * (1 - base) / 1001) ** 0.5
        assert ((own.mean(0) - base).abs() < 5 * spread / len(own) ** 0.5).all()
        torch.testing.assert_close(own.std(0), spread, rtol=0.05, atol=0)
    torch.testing.assert_close(priors.sum(1), torch.ones(20000).double())


def test_the_prior_that_logits_are_right_for() -> None:
    """With p = 1 the expert's own base prior; with p = 0 the training prior; normalised with any other."""
    for power, wanted in ((1.0, base_priors(COUNTS[10], 3)), (0.0, PRIOR.expand(3, -1))):
        torch.testing.assert_close(make(power=power).assumed_prior().exp(), wanted)
    ratio = (base_priors(COUNTS[10], 3) / PRIOR) ** 1.3 * PRIOR
    torch.testing.assert_close(make().assumed_prior().exp(), ratio / ratio.sum(1, keepdim=True))


@pytest.mark.parametrize("pool", ["fresh", "recycled"])
def test_draws_belong_to_the_step(pool: str) -> None:
    """All micro-batches of a step share them, the next step has others, and an epoch on they are in another order."""
    method = make(pool=pool) if pool == "fresh" else recycled(10, 3, pool=pool)
    first = at(method, 1)
    assert method.drawn(torch.device("cpu")) is first
    second = at(method, 2)
    assert torch.equal(at(method, 1).priors, first.priors), "a function of the step"
    others = [second, at(method, 4, epoch=1), at(make(seed=1), 1)]
    assert not any(torch.equal(each.priors, first.priors) for each in others)


def test_who_resumes_repeats_the_shuffles() -> None:
    """Each epoch has the same draws in another order; one who comes in later has those of one who was there."""
    there, later = (recycled(10, 3, draws=4, pool="recycled") for _ in range(2))
    epochs = [[at(there, 1 + step + 3 * epoch, epoch) for step in range(3)] for epoch in range(4)]
    orders = [torch.cat([each.priors for each in steps]) for steps in epochs]
    assert not torch.equal(orders[0], orders[1])
    assert all(torch.equal(each.sort(0).values, orders[0].sort(0).values) for each in orders)
    assert torch.equal(at(later, 11, 3).priors, epochs[3][1].priors)


@pytest.mark.parametrize("pool", slow_except(["recycled"], ["fresh", "recycled"]))
def test_killed_and_resumed(pool: str, config: Config, tmp_path: Path) -> None:
    """Bitwise the run that was not killed; the semi-variance is on in the second epoch."""
    words = "num_epochs 2 subset_cap 4 batch_size 16 save_every 2 max_test_images 8 test_dists None adapt None"
    words += f" adapt None num_workers 0 dirmixe.warm 0.5 dirmixe.pool {pool} pretrained none"
    found = []
    for name, kill in (("whole", None), ("killed", 5)):
        cfg = config("fake_lt", "tiny_clip_dirmixe", *words.split(), "output_dir", str(tmp_path / name))
        if kill:
            with killed_after(kill):
                run(cfg)
            AcceleratorState._reset_state(reset_partial_state=True)
        found.append(trained(run(cfg)))
        AcceleratorState._reset_state(reset_partial_state=True)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items())


# --- when what counts, and what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "first"), [(200, 161), (180, 145), (100, 81)])
def test_the_first_epoch_with_semi_variance(epochs: int, first: int) -> None:
    """Counted from 1, as the original counts."""
    method, counts = make(), []
    for epoch in range(epochs):
        method.on_epoch(epoch, epochs)
        counts.append(method.final)
    assert counts == [epoch >= first for epoch in range(1, epochs + 1)]


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [("LA", {}, ["loss_type CE"]), ("LDAM", {}, ["loss_type CE"]), ("CE", {"concentration": 0.0}, ["above 0"])],
)
def test_refused(loss: str, options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        make(loss=loss, **options)
    assert all(word in str(error.value) for word in ["dirmixe", *words])
