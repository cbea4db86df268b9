"""Backbone × tuner × step × loss × method × test-time step: all pairs that go together, in rows that do all of it.

The rows are the covering array of docs/composition.json: each trains two steps, resumes after the first, saves, loads
and is evaluated on generated images. By default some rows run, which hold every entry; `make test-slow` adds the other
rows, and rows in which every three entries occur.
"""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs import load_configs, values_of
from tailtune.configs.key import TEST, TRAIN
from tailtune.configs.option import options_from
from tailtune.datasets.build_data import build_data
from tailtune.datasets.data_bundle import DataBundle
from tailtune.models import resolve
from tailtune.scripts.make_composition import (
    ARRAY,
    AXES,
    OTHER,
    Choice,
    every_pair,
    page,
    refusal,
    refused_pairs,
    tried,
    words,
)
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.evaluation.ensembles import ensembled
from tailtune.trainers.evaluation.evaluate import Evaluation
from tailtune.trainers.evaluation.evaluation_plan import Builders, EvaluationPlan
from tailtune.trainers.flat_minima import sam_mode
from tailtune.trainers.head_preparation import prepare_head
from tailtune.trainers.methods import Earlier
from tailtune.trainers.methods.base import Batch, Step
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer
from tailtune.trainers.option_schema import declared
from tailtune.trainers.runs.load_run import FinishedRun, earlier_run, make_method
from tailtune.trainers.runs.merged_runs import MergeOptions, facts_of
from tailtune.trainers.runs.resume_decision import Decision
from tailtune.trainers.runs.run_folder import FACTS, RunFolder
from tailtune.trainers.step_passes import StepPasses
from tailtune.trainers.storage.checkpoint import (
    copy_state,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    trained_state,
)
from tailtune.trainers.storage.manifest import read_json
from tailtune.trainers.storage.optimizer_state import optimizer_state, restore_optimizer

STORED = json.loads(ARRAY.read_text(encoding="utf-8"))
SMALL = ["max_test_images", "12", "batch_size", "6", "num_workers", "0", "test_batch_size", "12", "adapt_epochs", "1"]
USUAL = {axis: next(iter(entries)) for axis, entries in AXES.items()}


def test_the_stored_rows_are_of_these_tables() -> None:
    """What enters a table enters the rows: run scripts/make_composition.py."""
    assert STORED["axes"] == {axis: list(entries) for axis, entries in AXES.items()}


def test_the_rows_hold_every_pair_that_is_not_refused() -> None:
    refused = {frozenset(pair.items()) for pair, _ in STORED["refused"]}
    covered = {frozenset({a, b}) for row in STORED["rows"] for a in row.items() for b in row.items() if a != b}
    assert {frozenset(pair) for pair in every_pair()} == covered | refused and not covered & refused


@pytest.mark.parametrize("number", range(0, len(STORED["refused"]), 6))
def test_a_refused_pair_is_refused_with_these_words(number: int) -> None:
    pair, reason = STORED["refused"][number]
    assert refusal(next(tried(*pair.items()))) == reason


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    refused = refused_pairs()
    assert page(refused, STORED["rows"]) == ARRAY.with_suffix(".md").read_text(encoding="utf-8")


def configs(row: Choice) -> tuple[CfgNode, CfgNode, CfgNode | None]:
    """Of the evaluation, of the training, and of the run before it."""
    given = [*words(row), *SMALL]
    test = load_configs("fake_lt", "tiny_clip", given, declared())
    train = words({**row, "test": "plain"})
    train.remove("test_only"), train.remove("True")
    stages = load_configs("fake_lt", "tiny_clip", [*train, *SMALL], declared())
    return resolve(test[-1]), resolve(stages[-1]), resolve(stages[0]) if len(stages) > 1 else None


@cache
def few(backbone: str, test: str) -> DataBundle:
    """Generated images in the shape that a backbone and a test-time step ask for; rows share them."""
    data = build_data(configs({**USUAL, "backbone": backbone, "test": test})[0])
    of_class = [(data.train_unaugmented.labels == k).nonzero()[:2, 0] for k in range(10)]
    few = torch.cat(of_class).numpy()  # enough for a head's start, and quicker
    data.train_unaugmented = data.train_unaugmented.take(few)
    return data


def batch(cfg: CfgNode) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(5)
    shape = (6, 3, cfg.resolution, cfg.resolution)
    names = ("image", "partner", "other_image", "other_partner")
    found = {name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws) for name in names}
    return {**found, "label": torch.arange(6), "partner_label": torch.arange(6).flip(0), "weight": torch.ones(6)}


def checked(_: Batch, outcome: Step) -> Tensor:
    """What is counted of a micro-batch: its weight."""
    assert torch.isfinite(outcome.loss_sum) and outcome.logits.shape == (6, 10)
    return outcome.weight


class Training:
    """A method and its optimizer, stepped as the trainer steps them."""

    def __init__(self, cfg: CfgNode, data: DataBundle, earlier: Earlier | None = None) -> None:
        self.cfg, self.method = cfg, make_method(cfg, data.info)
        self.base = fingerprint(self.method.model)
        prepare_head(self.method, data, make_accelerator(Devices.of(cfg)), 64, 0)
        if earlier is not None:
            self.method.after(earlier)
        self.begin()

    def begin(self) -> None:
        groups = self.method.param_groups()
        self.optimizer = build_optimizer(groups, Plan.of(self.cfg, 6)) if groups else None
        self.method.train()
        self.method.before_training(2, 2)
        self.method.on_epoch(1, 2)  # in epoch 0, the classifier of glmc has the weight 0

    def twin(self) -> "Training":
        """As it begins, built from nothing the same way; a copy takes a tenth of the time."""
        other = copy.copy(self)
        other.method = copy.deepcopy(self.method)
        other.begin()
        return other

    def step(self, number: int) -> None:
        """One optimizer step, in which exactly what trains gets a gradient."""
        if self.optimizer is None:
            return
        self.method.train()
        self.method.before_step(number)
        torch.manual_seed(number)  # of dropout, whose state the trainer saves
        batches, accelerator = iter([batch(self.cfg)]), make_accelerator(Devices.of(self.cfg))
        passes = StepPasses(accelerator, self.method, self.method, 6, 1, batches, checked)
        sam_mode(self.cfg.sam).gradients(passes, Plan.of(self.cfg, 6), 0)
        for name, each in self.method.named_parameters():
            assert (each.grad is not None) == each.requires_grad, name
        self.optimizer.step()
        self.method.after_step(number)
        self.optimizer.zero_grad()

    def resume_from(self, other: "Training") -> None:
        copy_state(self.method, trained_state(other.method), "a state", "")
        if self.optimizer is not None:
            tensors, values = optimizer_state(other.optimizer)
            restore_optimizer(self.optimizer, {name: tensor.clone() for name, tensor in tensors.items()}, values)

    @torch.no_grad()
    def logits(self) -> Tensor:
        return self.method.eval().expert_logits(batch(self.cfg)["image"])

    def facts(self, data: DataBundle) -> dict[str, Any]:
        return {"base": self.base, "class_names": list(data.info.class_names)}

    def save(self, folder: RunFolder, data: DataBundle, after: Path | None = None) -> None:
        facts = self.facts(data) | facts_of(options_from(MergeOptions, self.cfg))
        if after is not None:
            facts |= {"after": str(after), "after_id": read_json(after / FACTS)["sha256"]}
        folder.seal(save_checkpoint(folder.checkpoint, self.method, facts))

    def save_as_other(self, data: DataBundle) -> None:
        """As the run with which `soup` and `merge_runs` average."""
        save_checkpoint(Path(OTHER) / "checkpoint", self.method, self.facts(data))
        (Path(OTHER) / "config.yaml").write_text(yaml.safe_dump(values_of(self.cfg, TRAIN, TEST)))


@cache
def stepped(backbone: str, tuner: str, step: str, classifier: str) -> Training:
    """The earlier run of a chain after one step, which all methods that continue one share."""
    method = "tau_norm" if classifier == "LinearClassifier" else "crt"
    before = configs({**USUAL, "backbone": backbone, "tuner": tuner, "step": step, "method": method})[2]
    assert before is not None
    run = Training(before, few(backbone, "plain"))
    run.step(1)
    return run


def trained(row: Choice, cfg: CfgNode, before: CfgNode | None, data: DataBundle) -> Training:
    """Two steps, and the same two with a resumed run between them, whose result is the same; a checkpoint of both."""
    earlier = None
    if before is not None:
        ended = stepped(row["backbone"], row["tuner"], row["step"], before.classifier)
        ended.save(RunFolder(before), data)
        if row["method"] == "LT-Soups":
            merged = ended.twin()
            merged.step(2)
            merged.save_as_other(data)
        earlier = earlier_run(RunFolder(before).path, data, make_accelerator(Devices.of(cfg)), ended.base, cfg, True)
    run = Training(cfg, data, earlier)
    twin = run.twin()
    start = {name: each.clone() for name, each in run.method.named_parameters()}
    run.step(1)
    twin.resume_from(run)
    run.step(2), twin.step(2)
    for name, each in run.method.named_parameters():
        assert torch.equal(each, start[name]) != each.requires_grad, name
    assert torch.allclose(run.logits(), twin.logits(), rtol=0, atol=0, equal_nan=True), "resumed is not another run"
    run.save(RunFolder(cfg), data, before and RunFolder(before).path)
    for each in trained_state(twin.method).values():
        each.zero_()
    load_checkpoint(RunFolder(cfg).checkpoint, twin.method, data.info.class_names, twin.base)
    assert torch.allclose(run.logits(), twin.logits(), rtol=0, atol=0, equal_nan=True), "saved and loaded"
    return twin


def evaluated(cfg: CfgNode, run: Training, data: DataBundle) -> dict[str, Any]:
    """metrics.json of the evaluation that the row asks for."""
    accelerator, folder = make_accelerator(Devices.of(cfg)), RunFolder(cfg)
    plan = Decision(trains=False, target=folder.path / "tests" / "row")
    finished = FinishedRun(cfg, folder, run.method, data, accelerator, run.base)
    method, _ = ensembled(finished, cfg.ensemble)
    evaluation = Evaluation(EvaluationPlan.of(cfg), Builders.of(cfg, folder, False), accelerator, folder, plan)
    evaluation.from_images(method, data, {"data": "", "model": "", "seed": 0})
    return read_json(plan.target / "metrics.json")


def name_of(row: Choice) -> str:
    return " · ".join(row.values())


def check_row(row: Choice) -> None:
    cfg, train, before = configs(row)
    data = few(row["backbone"], row["test"])
    if before is not None:
        RunFolder(before).claim(trains=True)
    RunFolder(train).claim(trains=True)
    run = trained(row, train, before, data)
    if row["test"] == "soup":
        run.save_as_other(data)
    result = evaluated(cfg, run, data)
    assert 0 <= result["test"]["accuracy"] <= 100
    entries = result.get("distributions", {}).get("test", {}).get("predictors", {})
    assert ("target_prior" in entries) == (cfg.target_prior is not None) and (cfg.adapt in entries) == bool(cfg.adapt)


def core() -> list[Choice]:
    """Rows with every entry of every axis, few of them."""
    missing = {entry for row in STORED["rows"] for entry in row.items()}
    rows = []
    while missing:
        rows.append(max(STORED["rows"], key=lambda row: len(row.items() & missing)))
        missing -= rows[-1].items()
    return rows


CORE = core()


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[] if row in CORE else pytest.mark.slow, id=name_of(row)) for row in STORED["rows"]],
)
def test_a_row_trains_resumes_saves_loads_and_is_evaluated(
    row: Choice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_row(row)


@pytest.mark.slow
@pytest.mark.parametrize("method", AXES["method"])
@pytest.mark.parametrize("tuner", AXES["tuner"])
def test_every_three_entries(tuner: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with one backbone, which rotates, so that every three entries that go together occur in a row."""
    backbones = [*AXES["backbone"]]
    for number, test in enumerate(AXES["test"]):
        first = number + [*AXES["tuner"]].index(tuner) + [*AXES["method"]].index(method)
        for turn in range(len(backbones)):
            backbone = backbones[(first + turn) % len(backbones)]
            row = {**USUAL, "backbone": backbone, "tuner": tuner, "method": method, "test": test}
            if refusal(row) is None:
                (tmp_path / str(number)).mkdir()
                monkeypatch.chdir(tmp_path / str(number))
                check_row(row)
                break
