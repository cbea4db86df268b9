"""RIDE's expert assignment: what decides, what it learns from, what is asked, saved and reported."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from test_resnet import fill, waves
from tiers import slow_except
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs import UserError
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model
from tailtune.models.heads.expert_heads import heads_of
from tailtune.trainers.config_checks import check
from tailtune.trainers.dry_run import dry_run
from tailtune.trainers.evaluation.expert_usage import (
    asked,
    expert_usage,
    flops_by_experts,
    is_finite,
    mean_flops,
    usage_report,
)
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.logit_files import save_logits, stored_logits
from tailtune.trainers.evaluation.row_summary import RowSummary
from tailtune.trainers.evaluation.tta import averaged
from tailtune.trainers.methods import build_method
from tailtune.trainers.methods.ride_expert_assignment import ExpertAssignment
from tailtune.trainers.runs.result_table import usage_line
from tailtune.trainers.storage.resume_states import ResumeStates

Config = Callable[..., CfgNode]
RESNET = ("pretrained", "none", "init_head", "none", "reduce_dimension", True, "resolution", "none")
RESNET += ("full_tuning", True, "bn_tuning", True)
AFTER = ("method", "ride_ea", "after", "tiny_clip")


def build(config: Config, *pairs: object, data: str = "fake_lt", experts: int = 3) -> ExpertAssignment:
    """Without an earlier run: a random model with random heads."""
    few = ("ride_ea.top_choices", 5) if data == "fake_lt" else ()
    cfg = config(
        data, "tiny_clip", "pretrained", "none", "num_experts", experts, "init_head", "none", *few, *AFTER, *pairs
    )
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, info.class_names), info)
    assert isinstance(method, ExpertAssignment)
    return method


def images(count: int = 8, side: int = 32) -> Tensor:
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


# --- the original's numbers ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_fixture_of_the_original(config: Config) -> None:
    """Specification of the experts, fixture 13, second half: everybody asks everybody; loss of the training."""
    words = ("backbone", "ResNet-32", *RESNET, "scale", 30, "ride_ea.top_choices", 30)
    method = build(config, *words, data="cifar100_ir100").eval()
    fill(method.model)
    first = len(list(method.model.parameters()))
    for i, each in enumerate([*method.hidden.parameters(), *method.output.parameters()], start=first):
        v = torch.sin(torch.arange(each.numel()) + 1.0 + i).view_as(each)
        each.copy_(0.1 * v if each.ndim == 1 else v * 2 / math.sqrt(v[0].numel()))
    routed, wanted = method.expert_logits(waves()), method.model(waves())
    assert torch.allclose(routed, wanted, atol=1e-5), "three experts for all"
    batch = {"image": waves(), "label": torch.tensor([0, 5, 10, 15]), "weight": torch.ones(4)}
    outcome = method(batch)
    assert float(outcome.loss_sum / outcome.weight) == pytest.approx(0.98972, abs=1e-4)
    assert torch.allclose(outcome.logits, wanted.mean(1), atol=1e-5)


def test_binary_cross_entropy_of_the_original(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fixture 12."""
    method = build(config, experts=2)
    monkeypatch.setattr(method, "asks", lambda *_: torch.tensor([0.5, -1.0, 2.0]))
    eye = torch.eye(10)
    first, second = eye[[1, 1, 1]], 9 * eye[[0, 1, 0]]  # right only when the second is asked: no. 1 and 3
    batch = {"label": torch.tensor([0, 1, 0]), "weight": torch.ones(3)}
    loss_sum, weight = method.assignment_loss(torch.zeros(3, 48), torch.stack([first, second], 1), batch)
    assert float(loss_sum / weight) == pytest.approx(20.137922, rel=1e-6)


def test_the_sum_over_a_batch_may_be_beyond_half_precision(config: Config) -> None:
    method = build(config, experts=2)
    method.hidden.half()
    method.output.half().bias.data.fill_(-30)
    eye = torch.eye(10)[torch.zeros(64, dtype=torch.long)]
    batch = {"label": torch.ones(64, dtype=torch.long), "weight": torch.ones(64)}
    logits = torch.stack([eye, 9 * eye.roll(1, 1)], 1)  # right only when the second is asked
    loss_sum, _ = method.assignment_loss(torch.zeros(64, method.model.encoder.feature_dim), logits, batch)
    assert 64 * 100 * 25 < float(loss_sum.detach()) < 64 * 100 * 35


def spread(method: ExpertAssignment, given: Tensor) -> None:
    """Put the threshold where images differ in whom they ask."""
    with torch.no_grad():
        logits = method.model(given)
        shared = method.model.trunk(given)
        asks = [
            method.asks(i, method.model.expert(shared, i)[0], logits[:, : i + 1].mean(1))
            for i in range(len(method.hidden))
        ]
        method.output.bias -= torch.stack(asks).median()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("expert_split", 2, "adaptformer", True),
        ("backbone", "ResNet-20", *RESNET),
        ("backbone", "ResNet-20", *RESNET, "expert_split", 0),
    ],
    ids=["heads", "blocks", "stages", "heads of a resnet"],
)
@torch.no_grad()
def test_only_who_goes_on_is_computed(words: tuple[object, ...], config: Config) -> None:
    """Against a loop over the images, each asking its experts one by one."""
    method, given = build(config, *words, experts=4).eval(), images(12)
    spread(method, given)
    asked: list[int] = []
    original = method.model.expert
    method.model.expert = lambda shared, e: (asked.append(len(shared)), original(shared, e))[1]  # type: ignore
    found = method.expert_logits(given)
    numbers = (~found.isnan().all(-1)).sum(1)
    assert asked == [int((numbers > e).sum()) for e in range(len(asked))] and len(set(numbers.tolist())) > 1
    method.model.expert = original  # type: ignore[method-assign]
    logits = method.model(given)
    for row, each in enumerate(given):
        shared, number = method.model.trunk(each[None]), 1
        for i in range(3):
            features = original(shared, i)[0]
            hidden = (method.hidden[i](features / features.norm(dim=1, keepdim=True))).relu()
            top = logits[row, : i + 1].mean(0).sort(descending=True).values[:5]
            if method.output(torch.cat([top, hidden[0]])).sigmoid() <= 0.5:
                break
            number += 1
        assert number == numbers[row]
        assert (
            torch.allclose(found[row, :number], logits[row, :number], atol=1e-4) and found[row, number:].isnan().all()
        )
        assert torch.allclose(method.predict(given)[row], logits[row, :number].mean(0), atol=1e-4)


def test_left_out_images_and_weights(config: Config) -> None:
    method = build(config).train()
    batch = {"image": images(4), "label": torch.arange(4), "weight": torch.tensor([1.0, 2.0, 0.0, 1.0])}
    with torch.no_grad():
        features = method.model.features(batch["image"])
        logits = method.model.logits(features)
    features[2], logits[2] = torch.nan, torch.nan
    total, weight = method.assignment_loss(features, logits, batch)
    alone = [
        method.assignment_loss(
            features[i : i + 1], logits[i : i + 1], {k: each[i : i + 1] for k, each in batch.items()}
        )[0]
        for i in (0, 1, 3)
    ]
    assert torch.allclose(total, torch.stack(alone).sum()) and weight == 4
    total.backward()
    trained = {name for name, each in method.named_parameters() if each.grad is not None and each.grad.isfinite().all()}
    assert trained == {name for name, each in method.named_parameters() if each.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"hidden", "output"}


# --- sizes and refusals --------------------------------------------------------------------------------------------

ADDED = [
    ("ResNet-32", 30, "cifar100_ir100", 1_615, 785_471),
    ("ResNet-10", 30, "imagenet_lt", 12_367, 9_401_792 + 12_367),
    ("ResNeXt-50", 50, "imagenet_lt", 49_251, 42_889_024 + 49_251),
]


@pytest.mark.parametrize(("name", "top", "data", "added", "total"), ADDED)
def test_parameters(name: str, top: int, data: str, added: int, total: int, config: Config) -> None:
    words = ("backbone", name, *RESNET, "num_experts", 3, "ride_ea.top_choices", top, *AFTER)
    params = dry_run(config(data, "tiny_clip", *words))[0]["params"]
    assert params["trainable"] == params["tuner"] == added and params["total"] == total


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("num_experts", 1), "num_experts"),
        (("num_experts", 3, "ride_ea.top_choices", 0), "top_choices"),
        (("num_experts", 3, "after", "none"), "after"),
    ],
)
def test_refusals(words: tuple[object, ...], says: str, config: Config) -> None:
    with pytest.raises(UserError, match=says):
        check(config("fake_lt", "tiny_clip", "pretrained", "none", *AFTER, *words))


def test_all_logits_of_few_classes(config: Config) -> None:
    method = build(config, "ride_ea.top_choices", 30).eval()
    assert method.output.in_features == 10 + 16 and method.predict(images()).isfinite().all()


# --- what is reported ----------------------------------------------------------------------------------------------


def some_logits() -> Tensor:
    logits = torch.randn(8, 3, 10)
    logits[2:, 2], logits[5:, 1] = torch.nan, torch.nan  # 2 images ask three experts, 3 two, 3 one
    return logits


def sound(logits: Tensor, asks_every_expert: bool) -> bool:
    summary = RowSummary.of(logits, torch.zeros(len(logits), dtype=torch.int64))
    return is_finite(summary.asked, summary.finite, asks_every_expert)


def test_shares() -> None:
    logits = some_logits()
    assert expert_usage(asked(logits)) == pytest.approx([37.5, 37.5, 25])
    assert expert_usage(asked(torch.randn(4, 3, 10))) == [0, 0, 100]
    assert sound(logits, asks_every_expert=False) and not sound(logits, asks_every_expert=True)
    logits[0, 0, 3] = torch.nan
    assert not sound(logits, asks_every_expert=False)
    logits = some_logits()
    logits[4, 0] = torch.nan
    assert not sound(logits, asks_every_expert=False), "the first expert is always asked"


def test_cost_of_one_to_three_experts(config: Config) -> None:
    """Specification, section 1.6: multiply-adds of ResNet-32 with one, two and three reduced experts."""
    model = check(config("cifar100_ir100", "tiny_clip", "backbone", "ResNet-32", *RESNET, "num_experts", 3))
    flops = flops_by_experts(model, 32)
    assert flops == [2 * 49_476_288, 2 * 74_917_248, 2 * 100_358_208]
    found = mean_flops(model, 32, [50, 25, 25])
    mean = (0.5 * flops[0] + 0.25 * flops[1] + 0.25 * flops[2]) / 1e9
    wanted = {"gflops_per_image": mean, "gflops_all_experts": flops[2] / 1e9}
    assert found == pytest.approx({**wanted, "saved_percent": 100 * (1 - mean / (flops[2] / 1e9))})


def test_report(config: Config) -> None:
    model = check(config("fake_lt", "tiny_clip", "pretrained", "none", "num_experts", 3))
    groups = {"many": torch.tensor([0]), "med": torch.tensor([], dtype=torch.int64), "few": torch.arange(1, 10)}
    used = usage_report(asked(some_logits()), torch.tensor([0, 0, 1, 1, 1, 2, 2, 0]), groups, model, 32)
    assert used["all"] == pytest.approx([37.5, 37.5, 25]) and used["med"] is None
    assert used["many"] == pytest.approx([100 / 3, 0, 200 / 3]) and used["few"] == pytest.approx([40, 60, 0])
    assert used["gflops_per_image"] < used["gflops_all_experts"]
    assert "1: 37.5 %, 2: 37.5 %, 3: 25.0 %" in usage_line(used)


def test_files_keep_who_was_asked(tmp_path: Path) -> None:
    logits = some_logits()
    save_logits(tmp_path / "logits.safetensors", Logits(logits, torch.arange(8), torch.arange(8)), {})
    found = stored_logits(tmp_path, {})
    assert found is not None and torch.allclose(found[1].logits[:], logits, atol=0.01, equal_nan=True)


@torch.no_grad()
def test_several_views(config: Config) -> None:
    """An expert that some views of an image have asked counts by the mean of those."""
    method, given = build(config).eval(), images(6, 40)
    spread(method, images(6))
    found = averaged(method, "fivecrop", 32)(given)
    assert found[:, 0].isfinite().all() and found.nanmean(1).isfinite().all()


# --- runs ----------------------------------------------------------------------------------------------------------

BOTH = {
    "heads": "num_experts 3 adaptformer True",
    "stages": "num_experts 3 backbone ResNet-20 resolution none reduce_dimension True full_tuning True bn_tuning True",
}
SHORT = "-d fake_lt -m tiny_clip pretrained none init_head none max_test_images 40 subset_cap 8 batch_size 16 lr 0.05"


def command(kind: str) -> str:
    """The second stage of two; both with the same parts."""
    both = BOTH[kind]
    earlier = " ".join(f"after.{key} {value}" for key, value in zip(both.split()[::2], both.split()[1::2], strict=True))
    first = "after tiny_clip after.method ride after.loss_type LDAM after.max_steps 2 after.init_head none"
    first += " after.subset_cap 8 after.batch_size 16"
    second = "method ride_ea num_epochs 1 max_steps 3 save_every 1"
    return f"{SHORT} {both} {second} {first} {earlier} after.pretrained none output_dir"


@pytest.mark.parametrize("kind", slow_except(["heads"], BOTH))
def test_a_chain_of_runs(kind: str, launch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = launch(command(kind), "run")
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "output" / "run"
    before, after = (load_file(each / "checkpoint" / "tensors.safetensors") for each in (folder / "stage1", folder))
    assert all(torch.equal(after[name], before[name]) for name in before), "held, batch norms included"
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"hidden", "output"}
    result = json.loads((folder / "metrics.json").read_text())
    used = result["test"]["experts_used"]
    assert sum(used["all"]) == pytest.approx(100) and used["gflops_per_image"] <= used["gflops_all_experts"]
    assert result["params"]["trainable"] == sum(after[name].numel() for name in after.keys() - before.keys())
    assert "experts asked about an image" in (folder / "log.txt").read_text()

    other = launch(command(kind), "run many_above 5")  # from the stored logits
    assert other.returncode == 0, other.stderr
    (again,) = (folder / "tests").glob("*/metrics.json")
    assert json.loads(again.read_text())["test"]["experts_used"]["all"] == used["all"]
    assert launch(command(kind), "run test_only True test_batch_size 7").returncode == 0

    save = ResumeStates.save

    def killed(self: ResumeStates, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 2 and self.folder.parent.name == "killed":
            raise InterruptedError

    shutil.copytree(folder / "stage1", tmp_path / "output" / "killed" / "stage1")  # which is not repeated
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(ResumeStates, "save", killed)
        launch(command(kind), "killed")
    assert launch(command(kind), "killed").returncode == 0
    found = load_file(tmp_path / "output" / "killed" / "checkpoint" / "tensors.safetensors")
    assert found.keys() == after.keys() and all(torch.equal(found[name], after[name]) for name in after)


def test_an_earlier_run_with_other_parts_is_refused(launch: Cli) -> None:
    run = launch(command("heads").replace("after.adaptformer True", "after.adaptformer False"), "run")
    assert run.returncode == 2 and "which did not" in run.stderr
    run = launch(command("heads").replace("after.num_experts 3", "after.num_experts 2"), "other")
    assert run.returncode == 2 and "after" in run.stderr


def test_the_heads_are_the_earlier_runs(config: Config) -> None:
    method = build(config, "init_head", "class_mean")
    before = [head.get_parameter("weight").clone() for head in heads_of(method.model.head)]
    method.prepare(None)  # type: ignore[arg-type]
    assert all(
        torch.equal(a, b.get_parameter("weight")) for a, b in zip(before, heads_of(method.model.head), strict=True)
    )


@pytest.mark.parametrize(
    ("pairs", "said"),
    [("num_experts 4", "give both the same tuners, experts and head"), ("scale 20", "whose scale is 30.0, not 20.0")],
)
def test_a_stage_that_does_not_fit_is_refused_before_the_first_one_trains(pairs: str, said: str, launch: Cli) -> None:
    for flags in ("--dry-run", ""):
        found = launch("-d cifar100_ir100 -m resnet32_ride_ea", pairs, flags)
        assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1
