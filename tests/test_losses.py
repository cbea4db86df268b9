"""Losses: LIFT's fixture (§13.3), that sums do not depend on how a batch is cut, deferred re-weighting."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from small import loss_with
from torch import Tensor
from trajectories import killed_after, losses
from yacs.config import CfgNode

from tailtune.configs import config_hash
from tailtune.configs.errors import UserError
from tailtune.configs.seeding import generator
from tailtune.datasets.build_data import build_data
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.models import build_model
from tailtune.trainers.losses import (
    LOSSES,
    Prior,
    class_balanced,
    cross_entropy,
    effective_weights,
    log_prior,
    reweighted,
)
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.run import run

Config = Callable[..., CfgNode]
COUNTS = torch.tensor([500, 200, 50, 20, 5])
FIXTURE = {
    **{"CE": 4.525486, "Focal": 4.290299, "LDAM": 11.125924, "CB": 5.361949, "GRW": 5.362905},
    **{"BS": 5.184051, "LA": 5.184051, "LADE": 5.539836, "LAS": 4.429644, "GCL": 4.656044},
}
CB_WEIGHTS = [0.0369768, 0.0910735, 0.3615757, 0.9025912, 3.6077828]
GRW_WEIGHTS = [0.0361011, 0.0902527, 0.3610108, 0.9025270, 3.6101081]
MARGINS = [0.1581139, 0.1988177, 0.2811707, 0.3535534, 0.5]
SEPARABLE = sorted(name for name, loss in LOSSES.items() if not loss.couples)


def fixture() -> tuple[Tensor, Tensor]:
    """z[i, c] = 5·sin(1 + i + 2c), y_i = 3i mod 5, eight samples of five classes."""
    i, c = torch.arange(8.0).view(-1, 1), torch.arange(5.0)
    return 5 * torch.sin(1 + i + 2 * c), 3 * torch.arange(8) % 5


def prior(counts: Tensor = COUNTS) -> Prior:
    return Prior(log_prior(counts), counts)


def mean(name: str, logits: Tensor, labels: Tensor, given: Prior, **options: float) -> Tensor:
    loss_sum, weight = loss_with(name, **options)(logits, labels, torch.ones(len(labels)), given)
    return loss_sum / weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", FIXTURE)
def test_values_are_those_of_the_original(name: str, dtype: torch.dtype) -> None:
    logits, labels = fixture()
    found = mean(name, logits.to(dtype), labels, prior())
    assert float(found) == pytest.approx(FIXTURE[name], abs=1e-5) and found.dtype == dtype


def test_ldam_at_the_papers_scale() -> None:
    assert float(mean("LDAM", *fixture(), prior(), scale=30.0)) == pytest.approx(12.499870, abs=1e-5)


def test_balanced_bce() -> None:
    """Fixture 43 of the successors: the loss of each class against the rest, summed over the classes; its biases."""
    logits, labels = (each.double() if each.is_floating_point() else each for each in fixture())
    assert float(mean("BalBCE", logits, labels, prior(), smoothing=0.0)) == pytest.approx(6.572949, abs=1e-6)
    biases = torch.tensor([0.597837, -1.056053, -2.674149, -3.630985, -5.036952]).double()
    targets = 0.8 * F.one_hot(labels, 5) + 0.2 / 5
    wanted = 5 * F.binary_cross_entropy_with_logits(logits + biases, targets)
    assert float(mean("BalBCE", logits, labels, prior(), smoothing=0.2)) == pytest.approx(float(wanted), abs=1e-5)


def test_smoothing_follows_the_counts() -> None:
    """ε of the specification's fixture, from the loss of logits of which one stands out."""
    counts = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
    wanted = [0.3, 0.241412, 0.157844, 0.096049, 0.056308, 0.032021, 0.017317, 0.008472, 0.003142, 0]
    logits, labels = 100.0 * torch.eye(10).double(), torch.arange(10)
    given = Prior(log_prior(counts), counts)
    each = [LOSSES["LAS"](logits[k : k + 1], labels[k : k + 1], torch.ones(1), given)[0] for k in range(10)]
    assert (torch.stack(each) / 90).tolist() == pytest.approx(wanted, abs=1e-6)  # the mean of −log p is 90
    flat = loss_with("LAS", smooth_tail=0.1)(logits, labels, torch.ones(10), prior(torch.full((10,), 7)))
    assert float(flat[0]) == pytest.approx(10 * 0.1 * 90), "of classes that are equally frequent all are the rarest"


def test_noise_of_gcl_is_of_rare_classes_and_new_every_time() -> None:
    logits = torch.zeros(4000, 5).double()

    def loss(label: int, seed: int, scale: float = 30.0) -> float:
        given = prior()._replace(draws=lambda purpose: generator(purpose, seed))
        return (
            float(loss_with("GCL", scale=scale)(logits, torch.full((4000,), label), torch.ones(4000), given)[0]) / 4000
        )

    assert loss(4, 0) != loss(4, 1) and loss(4, 0) == loss(4, 0)
    assert loss(4, 0, scale=0.0) == pytest.approx(math.log(5)), "without noise"
    lowered = [loss(label, 0) - loss(0, 0) for label in range(5)]  # 30 · ½ · E|ε| · m_c, E|ε| = √(2/π)/3 but for ±1
    wanted = [15 * 0.2653 * math.log(500 / int(n)) / math.log(100) for n in COUNTS]
    assert lowered == pytest.approx(wanted, abs=0.05)


def test_ldam_lowers_the_true_classs_logit_by_its_margin() -> None:
    logits, labels = fixture()
    lowered = logits - 25 * F.one_hot(labels, 5) * torch.tensor(MARGINS)
    found = mean("LDAM", logits, labels, prior())
    assert float(found) == pytest.approx(float(F.cross_entropy(lowered, labels)), rel=1e-6)


@pytest.mark.parametrize(("loss", "weights"), [(class_balanced, CB_WEIGHTS), (reweighted, GRW_WEIGHTS)])
def test_class_weights_are_those_of_the_original(loss: Callable[..., Tensor], weights: list[float]) -> None:
    """One sample of each class: the weights are what the denominator is made of, and torch weighs like that."""
    logits, labels = fixture()[0][:5], torch.arange(5)
    each = [float(loss(logits[i : i + 1], labels[i : i + 1], torch.ones(1), prior())[1]) for i in range(5)]
    assert each == pytest.approx(weights, abs=1e-6)
    loss_sum, weight = loss(logits, labels, torch.ones(5), prior())
    assert float(loss_sum / weight) == pytest.approx(
        float(F.cross_entropy(logits, labels, torch.tensor(weights))), rel=1e-5
    )


def test_effective_weights() -> None:
    """Equal for large classes, 1/n for small ones, mean 1."""
    found = effective_weights(torch.tensor([1, 2, 10**6, 10**7], dtype=torch.float64))
    assert float(found.mean()) == pytest.approx(1)
    assert float(found[0] / found[1]) == pytest.approx(2, rel=1e-3) and float(found[2] / found[3]) == pytest.approx(1)


def test_balanced_softmax_is_logit_adjustment_of_strength_one() -> None:
    balanced = mean("BS", *fixture(), prior(), tau=0.3)
    assert torch.equal(balanced, mean("LA", *fixture(), prior(), tau=1.0))
    assert not torch.equal(balanced, mean("LA", *fixture(), prior(), tau=0.3))


def test_without_strength_or_tail_logit_adjustment_is_cross_entropy() -> None:
    plain = mean("CE", *fixture(), prior())
    assert torch.equal(mean("LA", *fixture(), prior(), tau=0.0), plain)
    uniform = mean("LA", *fixture(), prior(torch.full((5,), 7)))
    assert float(uniform) == pytest.approx(float(plain), rel=1e-6)


def test_adjustment_is_the_log_prior_times_tau() -> None:
    logits, labels = fixture()
    adjusted = logits + 0.7 * (COUNTS / COUNTS.sum()).log()
    assert float(mean("LA", logits, labels, prior(), tau=0.7)) == pytest.approx(
        float(F.cross_entropy(adjusted, labels))
    )


@pytest.mark.parametrize("name", SEPARABLE)
@pytest.mark.parametrize("cut", [[8], [1] * 8, [3, 5], [7, 1], [2, 3, 3]])
def test_sums_add_up_over_any_cut_of_the_batch(name: str, cut: list[int]) -> None:
    logits, labels = (each.double() if each.is_floating_point() else each for each in fixture())
    weights = torch.tensor([1, 0.5, 0, 2, 1, 1, 0.25, 1], dtype=torch.float64)
    whole = LOSSES[name](logits, labels, weights, prior())
    parts = zip(logits.split(cut), labels.split(cut), weights.split(cut), strict=True)
    sums = [torch.stack(LOSSES[name](*part, prior())) for part in parts]
    assert torch.allclose(torch.stack(sums).sum(0), torch.stack(whole), rtol=1e-12)


def test_lade_depends_on_who_is_here_and_says_so(config: Config) -> None:
    """Halves have estimates of their own, which the step weighs by their samples; weight 2 is two samples."""
    logits, labels = fixture()
    ones, given = torch.ones(8), prior()
    whole = LOSSES["LADE"](logits, labels, ones, given)[0]
    halves = [LOSSES["LADE"](logits[part], labels[part], ones[part], given)[0] for part in (slice(3), slice(3, 8))]
    assert abs(float(sum(halves) - whole)) > 0.01
    twice = LOSSES["LADE"](logits.repeat(2, 1), labels.repeat(2), ones.repeat(2), given)
    weighted = LOSSES["LADE"](logits, labels, 2 * ones, given)
    assert torch.allclose(torch.stack(twice), torch.stack(weighted), rtol=1e-5)
    assert torch.allclose(twice[0], 2 * whole, rtol=1e-5)
    method = small_method(config, "loss_type", "LADE")
    assert method.batch_coupled and not small_method(config).batch_coupled


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
    if name != "GCL":  # alone, the others would have other noise
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
    loss_sum, weight = loss_with("LA", tau=1.5)(ours, labels, torch.ones(8), prior())
    (loss_sum / weight).backward()
    F.cross_entropy(theirs + 1.5 * log_prior(COUNTS), labels).backward()
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7)


def test_weights_are_torchs_class_weights() -> None:
    """Σ w_i ℓ_i / Σ w_i, the weighted mean that torch makes of class weights."""
    logits, labels = fixture()
    of_class = torch.tensor([1.0, 2.0, 0.5, 3.0, 0.1])
    loss_sum, weight = cross_entropy(logits, labels, of_class[labels], prior())
    assert float(loss_sum / weight) == pytest.approx(float(F.cross_entropy(logits, labels, of_class)), rel=1e-6)


def test_a_coupled_losss_micro_batch_is_part_of_the_run(config: Config, tmp_path: Path) -> None:
    """Another share is another objective, so it is named, hashed and warned of; of other losses it is not."""

    def named(*pairs: object) -> tuple[str, str]:
        cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "batch_size", 32, *pairs)
        return cfg.run_name, config_hash(cfg)

    lade, la = ("loss_type", "LADE"), ("loss_type", "LA")
    whole, cut = named(*lade), named(*lade, "micro_batch_size", 8)
    assert cut[0] == whole[0].replace("LADE", "LADE_micro_batch_size_8") and cut[1] != whole[1]
    assert named(*lade, "micro_batch_size", 32) == whole and named(*la, "micro_batch_size", 8) == named(*la)
    with pytest.raises(UserError, match="must not depend on memory"):
        named(*lade, "micro_batch_size", "auto")
    words = ("batch_size", 16, "micro_batch_size", 8, "max_steps", 1, "num_epochs", 1, "max_test_images", 10)
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", *words, *lade, "output_dir", str(tmp_path / "cut"))
    notes = json.loads((run(cfg) / "metrics.json").read_text())["notes"]
    assert any("couples the images" in note and "8 of batch_size 16" in note for note in notes)


# --- deferred re-weighting -----------------------------------------------------------------------------------------


def small_method(config: Config, *pairs: object) -> Method:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", *pairs)
    data = build_data(cfg)
    return build_method(cfg, build_model(cfg, data.info.class_names), data.info)


@pytest.mark.parametrize("name", ["CE", "LDAM"])
def test_class_weights_come_with_their_epoch(name: str, config: Config) -> None:
    """Before it every sample counts as it is; from it on like in torch's cross-entropy with class weights."""
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none")
    batch = next(iter(eval_loader(build_data(cfg).train_unaugmented, 300, 0)))
    batch["weight"][3] = 0.0
    given = batch["weight"].clone()
    deferred = small_method(config, "loss_type", name, "drw_epoch", 2)
    plain = small_method(config, "loss_type", name)(batch)
    for epoch in (0, 1):
        deferred.on_epoch(epoch, 4)
        assert torch.equal(deferred(batch).loss_sum, plain.loss_sum) and float(deferred(batch).weight) == given.sum()
    for epoch in (2, 3):
        deferred.on_epoch(epoch, 4)
        found = deferred(batch)
        n = deferred.class_counts.double()
        weights = (1 - 0.9999) / (1 - 0.9999**n)
        weights = (weights / weights.mean()).float()[batch["label"]] * given
        wanted = LOSSES[name](found.logits, batch["label"], weights, deferred.prior)
        assert torch.allclose(torch.stack([found.loss_sum, found.weight]), torch.stack(wanted), rtol=1e-5)
        assert not torch.allclose(found.loss_sum / found.weight, plain.loss_sum / plain.weight, rtol=0.01)
    assert torch.equal(batch["weight"], given), "the trainer counts images by the batch's own weights"


def test_deferred_re_weighting_in_a_training(config: Config, tmp_path: Path) -> None:
    """Epoch 0 as without it, epoch 1 not; the run that dies in the middle of epoch 1 ends with the same bits."""

    def train(name: str, *pairs: object) -> Path:
        words = ("pretrained", "none", "num_epochs", 2, "batch_size", 64, "save_every", 1, "lr", 0.05)
        AcceleratorState._reset_state(reset_partial_state=True)
        return run(config("fake_lt", "tiny_clip", *words, *pairs, "output_dir", str(tmp_path / name)))

    with killed_after(4):
        train("killed", "drw_epoch", 1)
    plain, deferred, killed = train("plain"), train("drw", "drw_epoch", 1), train("killed", "drw_epoch", 1)
    assert "resuming after step" in (killed / "log.txt").read_text()
    found, wanted = losses(deferred), losses(plain)
    half = len(wanted) // 2
    assert len(wanted) == 6 and found[:half] == wanted[:half]
    assert all(abs(a - b) > 1e-4 for a, b in zip(found[half:], wanted[half:], strict=True))
    tensors = [load_file(each / "checkpoint" / "tensors.safetensors") for each in (deferred, killed)]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])


def test_an_epoch_that_never_comes_is_said(config: Config, tmp_path: Path) -> None:
    words = ("pretrained", "none", "num_epochs", 1, "max_steps", 1, "batch_size", 16, "max_test_images", 10)
    (tmp_path / "mine.yaml").write_text("backbone: TinyCLIP\nschedule: multistep\nlr_steps: [3]\n")
    for schedule in ("multistep", "cosine"):
        late = ("drw_epoch", 1, "schedule", schedule, "output_dir", str(tmp_path / schedule))
        path = run(config("fake_lt", str(tmp_path / "mine.yaml"), *words, *late))
        notes = json.loads((path / "metrics.json").read_text())["notes"]
        assert any("drw_epoch 1 never comes: the last epoch is 0" in note for note in notes)
        assert any("lr_steps [3] never come" in note for note in notes) == (schedule == "multistep")
