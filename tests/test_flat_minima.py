"""`sam`: SAM, Focal-SAM and GNM as modes of the one training step (successors' specification §5.2)."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trajectories
from conftest import ROOT, Cli, free_port, offline
from small import filled
from tiers import slow_except
from torch import Tensor, nn
from trajectories import losses, trained
from yacs.config import CfgNode

from tailtune.benchmarks.steps.host_syncs import HostSyncs
from tailtune.configs.errors import UserError
from tailtune.trainers.config_checks import outline
from tailtune.trainers.flat_minima import (
    PLAIN,
    SAM_MODES,
    ascent,
    class_shares,
    gaussian,
    noise_factor,
    rho_at,
)
from tailtune.trainers.losses import LOSSES, Prior, log_prior
from tailtune.trainers.methods import METHODS
from tailtune.trainers.methods.base import Batch, Step
from tailtune.trainers.optimizers_and_schedules import Plan
from tailtune.trainers.step_passes import StepPasses

Config = Callable[..., CfgNode]
COUNTS = torch.tensor([500, 200, 50, 20, 5])
LABELS = torch.arange(8) * 3 % 5


class WithoutTexts:
    """In place of a model that has no text tower."""

    @contextmanager
    def one_step(self) -> Iterator[Callable[[bool], None]]:
        yield lambda last: None


class Net(nn.Module):
    """z = X Wᵀ with logit adjustment: the net of the fixtures 42 and 42b. It stands for a method."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(filled((5, 4), 1, 0.5).double())
        self.class_counts, self.at_step, self.model = COUNTS, 0, WithoutTexts()
        self.begun: list[int] = []

    def before_step(self, step: int) -> None:
        self.at_step = step
        self.begun.append(step)

    def forward(self, batch: Batch) -> Step:
        logits = batch["image"] @ self.weight.T
        prior = Prior(log_prior(COUNTS), COUNTS)

        def loss(weights: Tensor) -> tuple[Tensor, Tensor]:
            return LOSSES["LA"](logits, batch["label"], weights, prior)

        shared = loss(batch["weight"] * batch["share"])[0] if "share" in batch else None
        return Step(*loss(batch["weight"]), logits, shared)


class OneProcess:
    """Accelerate in one process, with this factor on the loss."""

    device, num_processes = torch.device("cpu"), 1

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def no_sync(self, wrapped: Any) -> Any:
        return nullcontext()

    def backward(self, loss: Tensor, **options: Any) -> None:
        (loss * self.scale).backward(**options)


def batch(images: Tensor, labels: Tensor) -> Batch:
    return {"image": images, "label": labels, "weight": torch.ones(len(labels)).double()}


def passes_of(net: Any, batches: list[Batch], scale: float = 1.0) -> StepPasses:
    def count(each: Batch, outcome: Step) -> Tensor:
        return torch.stack([outcome.weight.detach(), outcome.loss_sum.detach()])

    size = sum(len(each["label"]) for each in batches)
    accelerator: Any = OneProcess(scale)
    net.before_step(1)
    return StepPasses(accelerator, net, net, size, len(batches), iter(batches), count)


def plan(**values: Any) -> Any:
    chosen = dict(seed=0, epochs=70, sam_rho=0.05, sam_rho_late=None, sam_gamma=1.5, sam_lambda=0.8)
    return SimpleNamespace(**{**chosen, "gnm_scale": 0.1, "gnm_half_life": 59, **values})


def fixture(cut: int = 8) -> list[Batch]:
    images = filled((8, 4), 2, 1.0).double()
    return [batch(x, y) for x, y in zip(images.split(cut), LABELS.split(cut), strict=True)]


def stepped(net: Net) -> Tensor:
    """The weights after one step of SGD; the gradients are of the mean loss, because every weight is 1."""
    torch.optim.SGD(net.parameters(), 0.1, weight_decay=5e-4).step()
    return net.weight.detach()


@pytest.mark.parametrize("cut", [8, 4, 2])
def test_focal_sam_is_that_of_the_fixture(cut: int) -> None:
    """42: the class weights and a step; the batch may be cut."""
    shares = class_shares(COUNTS, 1.5, 0.8)
    assert shares.tolist() == pytest.approx([0.169097, 0.511257, 0.723843, 0.769233, 0.792271], abs=1e-6)
    net = Net()
    SAM_MODES["focal"].gradients(passes_of(net, fixture(cut)), plan(), 0)
    found = stepped(net)
    assert float(found.sum()) == pytest.approx(1.727636, abs=1e-6)
    assert float(found.norm()) == pytest.approx(1.526488, abs=1e-6)
    assert found[0].tolist() == pytest.approx([0.340936, 0.039079, -0.003311, 0.194052], abs=1e-6)


def by_hand(strength: float) -> Tensor:
    """The gradient of Focal-SAM from the formula, without the code under test."""
    net, images = Net(), filled((8, 4), 2, 1.0).double()
    shares = class_shares(COUNTS, 1.5, strength)[LABELS]

    def gradient(weights: Tensor, factors: Tensor) -> Tensor:
        weights = weights.clone().requires_grad_()
        logits = images @ weights.T + log_prior(COUNTS)
        (nn.functional.cross_entropy(logits, LABELS, reduction="none") * factors).mean().backward()
        assert weights.grad is not None
        return weights.grad

    start = net.weight.detach()
    slope = gradient(start, shares)
    return gradient(start, 1 - shares) + gradient(start + 0.05 * slope / (slope.norm() + 1e-12), shares)


@pytest.mark.parametrize("strength", [0.0, 0.8, 1.1])
def test_focal_sam_is_its_formula(strength: float) -> None:
    """λ above 1 gives rare classes a negative weight at θ, as on iNaturalist."""
    net = Net()
    SAM_MODES["focal"].gradients(passes_of(net, fixture(4)), plan(sam_lambda=strength), 0)
    assert net.weight.grad is not None
    torch.testing.assert_close(net.weight.grad, by_hand(strength), rtol=1e-12, atol=1e-14)


def test_focal_sam_of_the_whole_loss_is_sam() -> None:
    """γ = 0 and λ = 1: c = 1 for every class."""
    one, other = Net(), Net()
    SAM_MODES["sam"].gradients(passes_of(one, fixture()), plan(), 0)
    SAM_MODES["focal"].gradients(passes_of(other, fixture()), plan(sam_gamma=0.0, sam_lambda=1.0), 0)
    assert one.weight.grad is not None and other.weight.grad is not None
    torch.testing.assert_close(one.weight.grad, other.weight.grad, rtol=1e-12, atol=1e-15)


def test_gnm_is_that_of_the_fixture() -> None:
    """42b: the noise, its factor by epoch, the loss at the moved weights and the step."""
    noise = gaussian(torch.Size((5, 4)), torch.Generator().manual_seed(0))
    assert noise[0].tolist() == pytest.approx([-0.375280, -0.384120, -0.083526, -0.144626], abs=1e-6)
    assert float(noise.sum()) == pytest.approx(2.313567, abs=1e-5)
    wanted = {0: (0.01, 2.115337, 1.526429), 1: (0.005, 2.115695, 1.526420), 60: (0.0025, 2.115874, 1.526415)}
    for epoch, (factor, loss, length) in wanted.items():
        assert noise_factor(plan(), epoch) == pytest.approx(factor)
        net = Net()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tailtune.trainers.flat_minima.generator", lambda *_: torch.Generator().manual_seed(0))
            weight, loss_sum = SAM_MODES["gnm"].gradients(passes_of(net, fixture(4)), plan(), epoch)
        assert float(loss_sum / weight) == pytest.approx(loss, abs=1e-6)
        found = stepped(net)
        assert float(found.sum()) == pytest.approx(1.727636, abs=1e-6)
        assert float(found.norm()) == pytest.approx(length, abs=1e-6)


@pytest.mark.parametrize("name", SAM_MODES)
def test_weights_stay_and_gradients_follow_the_scale_of_the_loss(name: str) -> None:
    """The factor of loss scaling reaches the gradient once, and θ is θ again, bit for bit."""
    one, other = Net(), Net()
    start = one.weight.detach().clone()
    SAM_MODES[name].gradients(passes_of(one, fixture(4)), plan(), 0)
    SAM_MODES[name].gradients(passes_of(other, fixture(4), 2.0**16), plan(), 0)
    assert one.weight.grad is not None and other.weight.grad is not None
    torch.testing.assert_close(other.weight.grad / 2.0**16, one.weight.grad, rtol=1e-12, atol=1e-15)
    assert torch.equal(one.weight, start)


@pytest.mark.parametrize("name", ["sam", "focal"])
def test_a_gradient_that_overflows_reaches_the_optimizer(name: str) -> None:
    """Loss scaling skips a step whose gradients are infinite, so none may be hidden."""
    net = Net()
    start = net.weight.detach().clone()
    SAM_MODES[name].gradients(passes_of(net, fixture(4), float("inf")), plan(), 0)
    assert net.weight.grad is not None and not net.weight.grad.isfinite().all()
    assert torch.equal(net.weight, start)


def scaled_step(name: str, scale: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The weights after a step with torch's own loss scaling, and the factor after it."""
    net, scaler = Net().to(dtype), torch.amp.GradScaler("cpu", init_scale=scale)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    batches = fixture(4)
    for each in batches:
        each["image"], each["weight"] = 100 * each["image"].to(dtype), each["weight"].to(dtype)
    passes = passes_of(net, batches)
    accelerator: Any = passes.accelerator
    accelerator.backward = lambda loss, **options: scaler.scale(loss).backward(**options)
    SAM_MODES[name].gradients(passes, plan(), 0)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    return net.weight.detach(), scaler.get_scale()


@pytest.mark.parametrize("name", SAM_MODES)
def test_loss_scaling_changes_nothing_and_skips_a_step_that_overflows(name: str) -> None:
    (plain, _), (scaled, _) = (scaled_step(name, scale, torch.float64) for scale in (1.0, 2.0**16))
    torch.testing.assert_close(scaled, plain, rtol=1e-12, atol=1e-14)
    overflown, factor = scaled_step(name, 2.0**127, torch.float32)
    assert torch.equal(overflown, Net().weight.float()) and factor == 2.0**126


@pytest.mark.parametrize("name", SAM_MODES)
def test_the_host_waits_for_nothing(name: str) -> None:
    passes = passes_of(Net(), fixture(4))
    with HostSyncs(torch.device("cpu")) as syncs:
        SAM_MODES[name].gradients(passes, plan(), 0)
    assert not syncs.found


def test_an_empty_step_moves_nothing() -> None:
    """A rank or a step without a readable image: all weights are 0."""
    empty = [{**each, "weight": torch.zeros(4).double()} for each in fixture(4)]
    for mode in SAM_MODES.values():
        net = Net()
        mode.gradients(passes_of(net, list(empty)), plan(), 0)
        assert net.weight.grad is not None and not net.weight.grad.any()


class Noisy(Net):
    """A net with a batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4).double(), nn.Dropout(0.5)
        self.masks: list[Tensor] = []

    def forward(self, batch: Batch) -> Step:
        kept = self.dropout(torch.ones_like(batch["image"]))
        self.masks.append(kept)
        return super().forward({**batch, "image": self.norm(batch["image"]) * kept})


@pytest.mark.parametrize("name", SAM_MODES)
def test_each_image_counts_once(name: str) -> None:
    """Running statistics and global random numbers after a step are those of one pass; dropout is the same in both."""
    found = {}
    for mode in (PLAIN, SAM_MODES[name]):
        torch.manual_seed(3)
        net = Noisy()
        mode.gradients(passes_of(net, fixture(4)), plan(), 0)
        found[mode] = net, torch.rand(())
        assert net.norm.track_running_stats and int(net.norm.num_batches_tracked) == 2
    (plain, after_plain), (net, after) = found.values()
    assert torch.equal(after, after_plain)
    assert torch.equal(net.norm.running_mean, plain.norm.running_mean)
    assert torch.equal(net.norm.running_var, plain.norm.running_var)
    assert len(net.masks) == (2 if name == "gnm" else 4)
    assert all(torch.equal(mask, plain.masks[index % 2]) for index, mask in enumerate(net.masks))
    assert net.begun == [1] * (1 if name == "gnm" else 2)


@pytest.mark.parametrize("slope", [1e-7, 0.0])
def test_half_precision_holds_the_move_of_a_small_gradient(slope: float) -> None:
    """With prec fp16 the factor ρ/‖g‖ may be too large for the gradients' dtype, and the move is not."""
    (move,) = ascent([torch.full((4,), slope, dtype=torch.float16)], 0.05)
    assert move is not None and move.dtype == torch.float16
    assert float(move.float().norm()) == pytest.approx(0.05 if slope else 0.0, rel=1e-3)


def test_rho_of_the_last_fifth() -> None:
    """As in the original's step schedule: epochs from 1, the late ones from 0.8 E on."""
    late = plan(epochs=200, sam_rho=0.1, sam_rho_late=0.2)
    assert [rho_at(late, epoch) for epoch in (0, 158, 159, 199)] == [0.1, 0.1, 0.2, 0.2]
    assert rho_at(plan(), 69) == 0.05


# --- any method --------------------------------------------------------------------------------------------------


def words_of(name: str) -> tuple[object, ...]:
    after = ("after", "tiny_clip", "after.num_experts", 3) if METHODS[name].continues_from_earlier_run else ()
    more: dict[str, tuple[object, ...]] = {
        "tau_norm": ("classifier", "LinearClassifier", "after.classifier", "LinearClassifier", "num_epochs", 0),
        "glmc": ("pair_sampler", "shuffle"),
        "h2t": ("pair_sampler", "shuffle", "h2t.shift_bn", False, "sampler", "balanced"),
    }
    return ("pretrained", "none", "method", name, "num_experts", 3, "loss_type", "CE", *after, *more.get(name, ()))


@pytest.mark.parametrize("name", METHODS)
def test_focal_takes_the_methods_that_add_up_samples(name: str, config: Config) -> None:
    """The part of the loss that `share` weighs is the sum of the shares of the single images; or it is refused."""
    method = outline(config("fake_lt", "tiny_clip", *words_of(name), "sam", "sam"))
    if not method.adds_up_samples:
        with pytest.raises(UserError, match=f"method {name} with loss_type CE computes its loss from several images"):
            outline(config("fake_lt", "tiny_clip", *words_of(name), "sam", "focal"))
        return
    method = outline(config("fake_lt", "tiny_clip", *words_of(name), "sam", "focal"))
    if not method.param_groups():
        return
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 3, 10).double(), torch.arange(6)
    with torch.device("cpu"):
        real = type(method)._apply(method.to_empty(device="cpu").double(), lambda each: each)
    for buffer, source in ((real.log_prior, log_prior(method.objective.class_counts)),):
        buffer.copy_(source)
    shares = torch.rand(6).double()
    each = {"label": labels, "weight": torch.ones(6).double(), "share": shares}
    whole = real.judged(logits, each).shared_sum
    single = [
        share * real.loss(logits[i : i + 1], {"label": labels[i : i + 1], "weight": torch.ones(1).double()})[0]
        for i, share in enumerate(shares)
    ]
    assert whole is not None
    torch.testing.assert_close(whole, torch.stack(single).sum())


@pytest.mark.parametrize(
    "words, message",
    [
        ("sam focal loss_type LADE", "computes its loss from several images"),
        ("sam focal loss_type GCL", "or draws"),
        ("sam focal method mixup mixup.inner classify", "method mixup"),
        ("sam flat", "unknown sam 'flat'"),
        ("sam sam sam_rho -1", "sam_rho must be at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(words: str, message: str, config: Config) -> None:
    with pytest.raises(UserError, match=message):
        outline(config("fake_lt", "tiny_clip", "pretrained", "none", *words.split()))


def test_sharded_training_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outline(config("fake_lt", "tiny_clip", "pretrained", "none"))
    with pytest.raises(UserError, match="sam sam does not go with FSDP"):
        outline(config("fake_lt", "tiny_clip", "pretrained", "none", "sam", "sam"))


# --- whole runs --------------------------------------------------------------------------------------------------


FEW = "subset_cap 4 batch_size 16 max_test_images 8"  # three steps an epoch, too


@pytest.mark.parametrize("name", slow_except(["focal"], SAM_MODES))
def test_cut_and_killed_runs_are_the_same(name: str, tmp_path: Path) -> None:
    """fp64: 8 images at once as 16, to rounding; killed as not killed, bit for bit."""
    whole, cut, killed = (
        trajectories.train(tmp_path, 0, micro, dies, more=f"sam {name} {FEW}")
        for micro, dies in ((16, False), (8, False), (8, True))
    )
    plain = trajectories.train(tmp_path / "plain", 0, 16, False, more=FEW)
    for key, tensor in trained(whole).items():
        assert torch.allclose(trained(cut)[key], tensor, rtol=1e-9, atol=1e-12), key
        assert torch.equal(trained(killed)[key], trained(cut)[key]), key
    assert any(not torch.allclose(trained(plain)[key], tensor, rtol=1e-6) for key, tensor in trained(whole).items())
    assert losses(cut) == pytest.approx(losses(whole), rel=1e-6)


@pytest.mark.slow
def test_dropout_and_draws_are_the_same_after_a_kill(tmp_path: Path) -> None:
    """A transformer across the batch has dropout: its global random numbers go on as if there were one pass."""
    words = "method batchformer batchformer.inner classify loss_type CE sam sam"
    whole, killed = (trained(trajectories.train(tmp_path, 0, 32, dies, more=words)) for dies in (False, True))
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Every mode on two processes."""
    folder = tmp_path_factory.mktemp("flat")
    launcher = [str(Path(sys.executable).parent / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    for name in SAM_MODES:
        script = [str(ROOT / "tests" / "trajectories.py"), str(folder / name), "pair", "sam", name]
        subprocess.run(
            [*launcher, "--main_process_port", str(free_port()), *script],
            cwd=folder,
            env=offline(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
            check=True,
            capture_output=True,
            timeout=280,
        )
    yield folder


@pytest.mark.slow
@pytest.mark.xdist_group("flat minima")
@pytest.mark.parametrize("name", SAM_MODES)
def test_two_processes_train_as_one(name: str, pairs: Path, tmp_path: Path) -> None:
    one = trained(trajectories.train(tmp_path, 0, 32, False, more=f"sam {name}"))
    two = trained(pairs / name / trajectories.name_of(0, 8, False, 2))
    assert all(torch.allclose(two[key], tensor, rtol=1e-9, atol=1e-12) for key, tensor in one.items())


def test_a_late_rho_depends_on_the_length(launch: Cli) -> None:
    words = "-d fake_lt -m tiny_clip_peft pretrained none schedule constant max_test_images 8 subset_cap 4 sam sam "
    assert launch(f"{words} sam_rho_late 0.1 num_epochs 1 output_dir late").returncode == 0
    done = launch(f"{words} sam_rho_late 0.1 num_epochs 2 output_dir late")
    assert done.returncode == 2 and "sam_rho_late sets the length" in done.stdout + done.stderr


def test_plans_read_the_options(config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "sam", "gnm", "sam_rho", 0.5, "gnm_half_life", 1)
    assert noise_factor(Plan.of(cfg, 8), 3) == pytest.approx(0.5 * 0.1 / 4)
