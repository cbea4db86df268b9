"""Trained tensors mixed with each other: a run's start with its end, several runs (for `ensemble` wise and soup)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.datasets import build_data
from tailtune.trainers.head_preparation import prepare_head
from tailtune.trainers.methods import Method
from tailtune.trainers.runs.load_run import FinishedRun, earlier_run, fresh_method, stored_config
from tailtune.trainers.runs.run_folder import FACTS, kept_splits
from tailtune.trainers.storage.checkpoint import (
    check_base,
    check_fit,
    copy_state,
    load_checkpoint,
    trained_state,
)
from tailtune.trainers.storage.manifest import read_json

RANDOM = (
    "ensemble wise goes from the start of a run to its end, and this one's classifier began at random, so that what "
    "lies between means nothing; train with init_head text_feat or class_mean, or leave ensemble out"
)
log = logging.getLogger("tailtune")


def wise(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """θ = (1 − α) θ₀ + α θ₁, from the run's start to its end (WiSE-FT: Wortsman et al., CVPR 2022, section 3)."""
    alpha, first, last = run.cfg.ensemble_alpha, beginning(run), trained_state(run.method)
    mix(run.method, lambda name: torch.lerp(first[name].to(last[name]), last[name], alpha), [first])
    log.info("wise: %g of the way from the run's start to its end", alpha)
    return run.method, {}


def soup(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """θ = mean of θ_r over this run and those of `ensemble_runs` (uniform soup: Wortsman et al., ICML 2022)."""
    own = copied(run.method)
    others = []
    for folder in run.folder.soup:
        load_checkpoint(folder / "checkpoint", run.method, run.data.info.class_names, run.base)
        others.append(copied(run.method))
    copy_state(run.method, own, "", "")
    mix(run.method, lambda name: torch.stack([each[name].double() for each in (own, *others)]).mean(0), others)
    log.info("a soup of %d runs", 1 + len(others))
    return run.method, {}


@torch.no_grad()
def mix(method: Method, value: Callable[[str], Tensor], others: Sequence[Mapping[str, Tensor]]) -> None:
    """Put mixed values into the floating-point tensors of a checkpoint; its whole numbers stay as they are.

    Raises:
        UserError: the others train weights at other positions (`mask`), so that their values do not belong together.
    """
    own = trained_state(method)
    for name, each in own.items():
        if each.is_floating_point():
            each.copy_(value(name))
        elif not name.endswith("num_batches_tracked") and any((other[name] != each).any() for other in others):
            raise UserError(f"ensemble: {name} differs between the runs; it takes runs of one mask_seed and mask_ratio")


def copied(method: Method) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in trained_state(method).items()}


def beginning(run: FinishedRun) -> dict[str, Tensor]:
    """What the run trained, as it was before the first step: made anew from its own config and seed.

    Raises:
        UserError: its head began at random, or where it began cannot be told.
    """
    if run.folder.foreign is not None:
        raise UserError(f"ensemble wise: {run.folder.origin} does not tell where its training began")
    cfg, data = run.cfg, run.data
    if run.folder.source != run.folder.path:
        cfg = stored_config(run.folder.source, run.cfg)
        data = build_data(cfg, kept_splits(run.folder.source), run.folder.class_counts())
    method, base = fresh_method(cfg, data.info, run.accelerator.device)
    check_base(run.folder.source, read_json(run.folder.source / FACTS), base)
    prepare_head(method, data, run.accelerator, run.cfg.test_batch_size, run.cfg.num_workers)
    fresh = [each.clone() for each in method.model.head.parameters()]
    if cfg.after is not None:
        facts = read_json(run.folder.source / FACTS)
        earlier = facts.get("after", "")
        if not (Path(earlier) / FACTS).exists() or read_json(Path(earlier) / FACTS).get("sha256") != facts["after_id"]:
            raise UserError(
                f"ensemble wise: {run.folder.source} began where another run ended (after {cfg.after}), whose folder "
                f"{earlier} is not there, or was trained again; put it back, or repeat the run with `resume False`"
            )
        method.after(earlier_run(Path(earlier), data, run.accelerator, base, cfg, True))
    if cfg.init_head is None and all(map(torch.equal, fresh, method.model.head.parameters())):
        raise UserError(RANDOM)
    start = trained_state(method)
    check_fit(trained_state(run.method), start, str(run.folder.source), "give the options that it was trained with")
    return start
