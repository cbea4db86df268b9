"""H2T and ResLT: the numbers of the specification's fixtures, what is held and what shifts, two stages in one go."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from conftest import Cli
from small import loss_with
from torch import Tensor, nn
from trajectories import killed_after, trained
from yacs.config import CfgNode

from tailtune.configs import UserError, load_configs
from tailtune.configs.seeding import generator
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model
from tailtune.trainers.config_checks import check
from tailtune.trainers.losses import LOSSES, Prior, log_prior
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.methods.base import Objective
from tailtune.trainers.methods.h2t import channels, fused
from tailtune.trainers.methods.reslt import ResLT
from tailtune.trainers.methods.ride import Ride
from tailtune.trainers.option_schema import declared
from tailtune.trainers.run import run
from tailtune.trainers.storage.checkpoint import load_checkpoint, save_checkpoint, trained_state

Config = Callable[..., CfgNode]
COUNTS = torch.tensor([5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50])
SMALL = ("backbone", "ResNet-20", "num_workers", 0)
LABELS = torch.tensor([0, 3, 6, 9])


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def test_the_channels_are_those_of_the_original() -> None:
    """H1."""
    wanted = [44, 46, 17, 3, 47, 21, 35, 6, 33, 2, 63, 19, 28, 22, 42, 11]
    assert channels(64, 0.25, seed()).tolist() == wanted
    assert [len(channels(64, ratio, seed())) for ratio in (0.0, 0.3, 0.4, 1.0)] == [0, 19, 25, 64]


def maps() -> list[Tensor]:
    """Two of [4, 64, 8, 8]."""
    b, c, i, j = torch.meshgrid(*(torch.arange(n).double() for n in (4, 64, 8, 8)), indexing="ij")
    return [torch.sin(0.3 * b + 0.17 * c + 0.05 * i + 0.02 * j + phase) for phase in (0, 1)]


def linear() -> tuple[Tensor, Tensor]:
    k, d = torch.meshgrid(torch.arange(10).double(), torch.arange(64).double(), indexing="ij")
    return torch.cos(0.1 * k * d + 0.3 * k).requires_grad_(), (0.01 * torch.arange(10).double()).requires_grad_()


FUSED = {0.0: (6.679004, 5.258149), 0.25: (6.485469, 4.537694), 0.3: (6.632904, 4.598734), 1.0: (7.294875, 3.881151)}


@pytest.mark.parametrize("ratio", FUSED)
def test_the_fused_loss_is_that_of_the_original_which_fuses_maps(ratio: float) -> None:
    """H2. Channels of the mean over the map are the mean over the map of channels."""
    first, second = maps()
    pooled = fused(first.mean((2, 3)), second.mean((2, 3)), ratio, 1, seed())
    taken = channels(64, ratio, seed())
    first[:, taken] = second[:, taken]
    assert torch.allclose(pooled, first.mean((2, 3)), atol=1e-12)
    weight, bias = linear()
    loss = F.cross_entropy(F.linear(pooled, weight, bias), LABELS)
    loss.backward()
    assert weight.grad is not None
    assert (float(loss.detach()), float(weight.grad.norm())) == pytest.approx(FUSED[ratio], rel=1e-5)


def test_two_steps_are_those_of_the_original() -> None:
    weight, bias = linear()
    optimizer = torch.optim.SGD([weight, bias], lr=0.02, momentum=0.9, weight_decay=5e-4)
    first, second = (each.mean((2, 3)) for each in maps())
    losses = []
    for _ in range(3):
        loss = F.cross_entropy(F.linear(fused(first, second, 0.25, 1, seed()), weight, bias), LABELS)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses == pytest.approx([6.485469, 6.067087, 5.330849], rel=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_each_expert_has_a_choice_of_its_own(shared: bool) -> None:
    first, second = torch.zeros(5, 3, 64), torch.ones(5, 3, 64)
    found = fused(*((each[:, 0] if shared else each) for each in (first, second)), 0.25, 3, seed())
    draws = seed()
    for expert in found.unbind(1):
        assert torch.equal(expert, expert[:1].expand(5, -1)), "the same for all samples"
        assert expert[0].nonzero().flatten().tolist() == sorted(channels(64, 0.25, draws).tolist())
    assert not torch.equal(found[:, 0], found[:, 1])


# --- losses -------------------------------------------------------------------------------------------------------


def waves() -> tuple[Tensor, Tensor]:
    """H3: logits of three experts [8, 3, 10] and labels."""
    b, k, c = torch.meshgrid(*(torch.arange(n).double() for n in (8, 3, 10)), indexing="ij")
    return 2 * torch.sin(0.4 * b + 0.9 * c + 0.5 * k), 3 * torch.arange(8) % 10


def mean(name: str, logits: Tensor) -> float:
    loss, prior = loss_with(name, scale=30.0), Prior(log_prior(COUNTS), COUNTS)
    loss_sum, weight = loss(logits, waves()[1], torch.ones(8), prior)
    return float(loss_sum / weight)


def test_losses_are_those_of_the_original() -> None:
    logits = waves()[0]
    wanted = {"CE": 3.4116218, "CB": 3.2484376, "LAS": 3.3539672, "LDAM": 12.2072744}
    assert {name: mean(name, logits[:, 0]) for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert mean("CE", logits.mean(1)) == pytest.approx(3.3851688, rel=1e-5)


def around(kind: type[Method], loss: str, **options: Any) -> Any:
    """A method around no model: what it makes of logits of three experts."""
    model = nn.Module()
    model.num_experts = 3  # type: ignore[assignment]
    return kind(model, Objective(COUNTS, loss_with(loss, scale=30.0)), kind.Options(**options))  # type: ignore[arg-type]


def batch_of(labels: Tensor, weights: Tensor | None = None) -> dict[str, Any]:
    return {"label": labels, "weight": torch.ones(len(labels)).double() if weights is None else weights}


def test_ride_is_that_of_the_original() -> None:
    logits, labels = waves()
    loss_sum, weight = around(Ride, "LDAM").loss(logits, batch_of(labels))
    assert float(loss_sum / weight) == pytest.approx(36.7044525, rel=1e-5)


@pytest.mark.parametrize(("beta", "wanted"), [(0.99, 3.3952923), (0.3, 5.9746527)])
def test_reslt_is_that_of_the_original(beta: float, wanted: float) -> None:
    """The original adds 1e-7 to probabilities, which shows where they are as small as 1e-5."""
    logits, labels = waves()
    groups = (labels >= 0, labels >= 2, labels >= 4)

    def plain(floor: float) -> float:
        def losses(each: Tensor) -> Tensor:
            return -(each.softmax(1)[torch.arange(8), labels] + floor).log()

        own = sum((losses(z) * group).sum() for z, group in zip(logits.unbind(1), groups, strict=True))
        alone = own / sum(group.sum() for group in groups)
        return float((1 - beta) * losses(logits.sum(1)).mean() + beta * alone)

    method = around(ResLT, "CE", beta=beta, medium_from=0.2, few_from=0.4)
    loss_sum, weight = method.loss(logits.shape[1] * logits, batch_of(labels))
    assert float(loss_sum / weight) == pytest.approx(plain(0.0), rel=1e-12)
    assert plain(1e-7) == pytest.approx(wanted, rel=1e-6) and plain(0.0) == pytest.approx(wanted, rel=2e-4)


def test_groups_of_reslt_go_by_the_counts() -> None:
    counts = torch.tensor([5, 500, 50, 50, 1, 7])
    model = nn.Module()
    model.num_experts = 3  # type: ignore[assignment]
    method: Any = ResLT(model, Objective(counts, LOSSES["CE"]), ResLT.Options())  # type: ignore[arg-type]
    members = [each.nonzero().flatten().tolist() for each in method.members]
    assert members == [[0, 1, 2, 3, 4, 5], [0, 3, 4, 5], [0, 4]], "of 6 classes all but 2 and 4; ties by label"
    weights = torch.tensor([1.0, 0.0, 1.0, 1.0]).double()
    logits, labels = torch.randn(4, 3, 6, generator=seed()).double(), torch.tensor([0, 1, 2, 5])
    whole = method.loss(logits, batch_of(labels, weights))
    left = weights > 0
    assert torch.stack(whole).tolist() == pytest.approx(
        torch.stack(method.loss(logits[left], batch_of(labels[left]))).tolist()
    )
    logits[1] = float("nan")
    assert torch.equal(torch.stack(whole), torch.stack(method.loss(logits, batch_of(labels, weights))))


# --- around a model -----------------------------------------------------------------------------------------------


def build(config: Config, *pairs: object, model: str = "resnet32_h2t") -> Any:
    cfg = config("fake_lt", model, *SMALL, *pairs)
    info = build_info(cfg)
    return build_method(cfg, build_model(cfg, info.class_names, pixel_stats=(info.mean, info.std)), info)


def batch() -> dict[str, Any]:
    images = torch.randint(0, 256, (2, 8, 3, 32, 32), dtype=torch.uint8, generator=seed(1))
    return {"image": images[0], "partner": images[1], "label": torch.arange(8), "weight": torch.ones(8)}


def test_a_momentum_of_norms_as_the_original() -> None:
    """H7: ones, then threes."""
    norm = nn.BatchNorm2d(1).train()
    for value in (1.0, 3.0):
        norm(torch.full((2, 1, 2, 2), value))
    assert float(norm.running_mean) == pytest.approx(0.39) and norm.num_batches_tracked == 2


def test_norms_shift_while_all_weights_are_held(config: Config, tmp_path: Path) -> None:
    """Two forwards a step, the fusing images last; the shifted statistics are in the checkpoint."""
    method, images = build(config), batch()
    before = {name: each.clone() for name, each in [*method.named_parameters(), *method.named_buffers()]}
    method.train().before_step(3)
    outcome = method(images)
    outcome.loss_sum.backward()
    now = dict([*method.named_parameters(), *method.named_buffers()])
    changed = {name for name, each in now.items() if not torch.equal(each, before[name])}
    assert changed and all("running" in name or "num_batches" in name for name in changed)
    assert {name for name, each in method.named_parameters() if each.requires_grad} == {
        "model.head.weight",
        "model.head.bias",
    }
    norm = method.model.encoder.net.bn1
    assert norm.num_batches_tracked == 2 and method.batch_coupled
    first, second = (
        method.model.encoder.net.conv1(method.model.normalised(images[name])).mean((0, 2, 3))
        for name in ("image", "partner")
    )
    assert torch.allclose(norm.running_mean, 0.9 * 0.1 * first + 0.1 * second, atol=1e-6)
    assert changed <= trained_state(method).keys()

    facts = {"base": "base", "class_names": ["a"]}
    save_checkpoint(tmp_path / "checkpoint", method, facts)
    twin = build(config)
    load_checkpoint(tmp_path / "checkpoint", twin, ["a"], "base")
    assert torch.equal(twin.eval().predict(images["image"]), method.eval().predict(images["image"]))


@pytest.mark.parametrize("words", [(), ("num_experts", 3), ("num_experts", 3, "expert_split", 0)])
def test_the_loss_is_of_fused_features(words: tuple[object, ...], config: Config) -> None:
    """Where norms are held, so that it can be repeated. A choice for each step, the same in every micro-batch."""
    method, images = build(config, "h2t.shift_bn", False, *words), batch()
    assert not method.batch_coupled
    method.train()
    found = []
    for step in (1, 2):
        method.before_step(step)
        outcome = method(images)
        found.append(float(outcome.loss_sum.detach()))
        halves = [method({name: each[part] for name, each in images.items()}) for part in (slice(4), slice(4, 8))]
        assert sum(float(each.loss_sum.detach()) for each in halves) == pytest.approx(found[-1], rel=1e-5)
        features = [method.model.features(images[name]) for name in ("image", "partner")]
        draws = generator(method.objective.seed, "h2t", step)
        logits = method.model.logits(fused(*features, 0.25, method.model.num_experts, draws)).mean(1)
        assert torch.allclose(outcome.logits, logits, atol=1e-5)
        assert found[-1] == pytest.approx(
            float(F.cross_entropy(logits, images["label"], reduction="sum").detach()), rel=1e-5
        )
    assert found[0] != found[1]


def test_no_second_image_without_a_share(config: Config) -> None:
    method, images = build(config, "h2t.ratio", 0, "pair_sampler", "none"), batch()
    images.pop("partner")
    method.train()(images)
    assert method.model.encoder.net.bn1.num_batches_tracked == 1


def test_weight_scaling_learns_beside_the_classifier(config: Config) -> None:
    method = build(config, "h2t.weight_scaling", True, "num_experts", 3)
    plain = build(config, "num_experts", 3)
    images = batch()["image"]
    assert torch.equal(method.eval().predict(images), plain.eval().predict(images))
    with torch.no_grad():
        method.scales[:, 2] = 3.0
    wanted = plain.expert_logits(images) * torch.tensor([1.0, 1, 3, 1, 1, 1, 1, 1, 1, 1])
    assert torch.allclose(method.expert_logits(images), wanted)
    groups = {each["name"]: [tuple(p.shape) for p in each["params"]] for each in method.param_groups()}
    assert groups["tuner"] == [(3, 10)] and len(groups["head"]) == 6


def test_the_sum_of_reslt_is_kept(config: Config) -> None:
    """Of itself and of what wraps it: the mean of the experts' logits is the sum of the heads' logits."""
    words = ("h2t.inner", "reslt", "num_experts", 3)
    for method in (build(config, *words), build(config, model="resnet32_reslt")):
        method.eval()
        images = batch()["image"]
        logits = method.model(images)
        assert torch.allclose(method.expert_logits(images).mean(1), logits.sum(1), atol=1e-5)
        assert torch.allclose(method.predict(images), logits.sum(1), atol=1e-5)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("bn_tuning", False), "h2t.shift_bn True: no batch norm"),
        (("h2t.ratio", 1.5), "must be at most 1, not 1.5"),
        (("h2t.inner", "crt"), "continues an earlier run"),
        (("h2t.inner", "mixup"), "does more with the model"),
        (("pair_sampler", "none"), "pair_sampler shuffle"),
        (("h2t.ratio", 0), "set pair_sampler none"),
        (("after", "none"), "`after`"),
        (("h2t.inner", "reslt"), "num_experts 3"),
        (("h2t.inner", "reslt", "num_experts", 3, "reslt.few_from", 0.1), "must rise"),
    ],
)
def test_refusals(words: tuple[object, ...], says: str, config: Config) -> None:
    with pytest.raises(UserError, match=says):
        check(config("fake_lt", "resnet32_h2t", *SMALL, *words))


# --- from end to end ----------------------------------------------------------------------------------------------

STAGES = "num_epochs 1 batch_size 8 max_test_images 20 after.num_epochs 1 after.batch_size 8 after.lr_steps [1]"
STAGES += " after.warmup_epochs 0 backbone ResNet-20 after.backbone ResNet-20 num_workers 0 save_every 2"
STAGES += " subset_cap 4 after.subset_cap 4"  # five steps


def test_two_stages(launch: Cli, tmp_path: Path) -> None:
    done = launch("-d fake_lt -m resnet32_h2t", STAGES, "output_dir here")
    assert done.returncode == 0, done.stderr
    first, second = tmp_path / "output/here/stage1", tmp_path / "output/here"
    test = json.loads((second / "metrics.json").read_text())["test"]
    assert 0 <= test["accuracy"] <= 100 and test["calibration"]["bins"] == 15
    before, after = trained(first), trained(second)
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name for name in moved if "running" not in name and "batches" not in name} == {
        "model.head.weight",
        "model.head.bias",
    }
    norm = "model.encoder.net.bn1.num_batches_tracked"
    steps = json.loads((second / "metrics.json").read_text())["train"]["steps"]
    assert int(after[norm]) == int(before[norm]) + 2 * steps
    again = launch("-d fake_lt -m resnet32_h2t", STAGES, "output_dir here test_only True test_prec fp64")
    assert again.returncode == 0, again.stderr


def test_a_killed_run_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stages: λ, order and channels are functions of the step, and the statistics are in the state."""
    monkeypatch.chdir(tmp_path)

    def train(name: str, killed: int | None) -> dict[str, Tensor]:
        previous = None
        for stage in load_configs("fake_lt", "resnet32_h2t", [*STAGES.split(), "output_dir", name], declared()):
            with killed_after(killed):
                run(stage, previous)
            AcceleratorState._reset_state()
            previous = run(stage, previous)
            AcceleratorState._reset_state()
        assert previous is not None
        return trained(previous)

    whole, again = train("whole", None), train("killed", 3)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
