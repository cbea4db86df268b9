"""Backbone × tuner × method × test-time step: each pair of entries that goes together, in a row that does all of it.

The rows are the covering array of docs/composition.json. Each trains two steps, is resumed after the first, saves, loads and
evaluates itself on generated images. The full product is in `make test-slow`.
"""

import json
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from yacs.config import CfgNode

from configs import load_configs
from datasets import DataBundle, build_data
from models import resolve
from scripts.make_composition import ARRAY, AXES, Choice, every_pair, page, refusal, refused_pairs, words
from trainers.checkpoint import (
    copy_state,
    fingerprint,
    load_checkpoint,
    momenta,
    restore_momenta,
    save_checkpoint,
    trained_state,
)
from trainers.evaluation import Evaluation
from trainers.folder import RunFolder
from trainers.head import prepare_head
from trainers.launch import make_accelerator
from trainers.methods import Earlier, Method, declared
from trainers.optim import Plan, build_optimizer
from trainers.trained import make_method

STORED = json.loads(ARRAY.read_text(encoding="utf-8"))
SMALL = ("max_test_images", "12", "batch_size", "6", "num_workers", "0", "test_batch_size", "12", "adapt_epochs", "1")


def test_the_stored_rows_are_of_these_tables() -> None:
    """An entry that enters a table is in the rows: run scripts/make_composition.py."""
    assert STORED["axes"] == {axis: list(entries) for axis, entries in AXES.items()}


def test_the_rows_hold_every_pair_that_is_not_refused() -> None:
    refused = {frozenset(pair.items()) for pair, _ in STORED["refused"]}
    covered = {frozenset({a, b}) for row in STORED["rows"] for a in row.items() for b in row.items() if a < b}
    wanted = {frozenset(pair) for pair in every_pair()}
    assert covered >= wanted - refused and not covered & refused


@pytest.mark.parametrize("number", range(0, len(STORED["refused"]), 10))
def test_a_refused_pair_is_refused_with_these_words(number: int) -> None:
    from scripts.make_composition import tried

    pair, reason = STORED["refused"][number]
    assert refusal(next(tried(*pair.items()))) == reason


@pytest.mark.slow
def test_the_page_is_up_to_date() -> None:
    refused = refused_pairs()
    assert page(refused, STORED["rows"]) == ARRAY.with_suffix(".md").read_text(encoding="utf-8")


def config(row: Choice) -> CfgNode:
    return resolve(load_configs("fake_lt", "tiny_clip", [*words(row), *SMALL], declared())[-1])


@cache
def few(cfg_key: str) -> DataBundle:
    """Generated images in the shape that a config asks for; rows of one shape share them."""
    return build_data(config(json.loads(cfg_key)))


def batch(cfg: CfgNode, method: Method) -> dict[str, Any]:
    draws = torch.Generator().manual_seed(5)
    shape = (6, 3, cfg.resolution, cfg.resolution)
    found = {name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=draws) for name in ("image", "partner")}
    return {**found, "label": torch.arange(6), "weight": torch.ones(6)}


class Training:
    """A method and its optimizer, stepped as the trainer steps them."""

    def __init__(self, cfg: CfgNode, data: DataBundle, earlier: Earlier | None) -> None:
        self.cfg, self.method = cfg, make_method(cfg, data.info)
        self.base = fingerprint(self.method.model.encoder)
        prepare_head(self.method, data, make_accelerator(cfg), 12, 0)
        if earlier is not None:
            self.method.after(earlier)
        groups = self.method.param_groups()
        self.optimizer = build_optimizer(groups, Plan.of(cfg, 6)) if groups else None
        self.method.train()
        self.method.before_training(2, 2)
        self.method.on_epoch(0, 1)

    def step(self, number: int) -> None:
        """One optimizer step, after which exactly what trains has had a gradient."""
        if self.optimizer is None:
            return
        self.method.train()
        self.method.before_step(number)
        torch.manual_seed(number)  # for methods and tuners with dropout, whose state a run saves
        outcome = self.method(batch(self.cfg, self.method))
        (outcome.loss_sum / outcome.weight).backward()
        assert torch.isfinite(outcome.loss_sum) and outcome.logits.shape == (6, 10)
        for name, each in self.method.named_parameters():
            assert (each.grad is not None) == each.requires_grad, name
        self.optimizer.step()
        self.method.after_step(number)
        self.optimizer.zero_grad()

    def logits(self) -> Tensor:
        return self.method.eval().expert_logits(batch(self.cfg, self.method)["image"])
