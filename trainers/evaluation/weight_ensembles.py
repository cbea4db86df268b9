"""Averages of weights: of a run's initial and final weights, or of several runs (`ensemble` wise and soup)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import options_from
from tailtune.datasets.build_data import build_data
from tailtune.models.text_mode import starts_at_random
from tailtune.trainers.feature_store import FeatureStore
from tailtune.trainers.head_preparation import prepare_head
from tailtune.trainers.methods import Method
from tailtune.trainers.runs.load_run import (
    FinishedRun,
    check_same_network,
    earlier_run,
    fresh_method,
    stored_config,
)
from tailtune.trainers.runs.merged_runs import MergeOptions, check_unchanged
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
    """WiSE-FT (Wortsman et al., CVPR 2022, section 3): θ = (1 − α) θ₀ + α θ₁, α = `ensemble_alpha`.

    θ₀ are the initial and θ₁ the final weights of the run.
    """
    alpha, first, last = run.cfg.ensemble_alpha, beginning(run), trained_state(run.method)
    mix(run.method, lambda name: torch.lerp(first[name].to(last[name]), last[name], alpha), [first])
    log.info("wise: %g of the way from the run's start to its end", alpha)
    return run.method, {}


def soup(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """Uniform soup (Wortsman et al., ICML 2022): the mean of the weights of this run and those of `ensemble_runs`."""
    weights = copied(run.method)
    others = []
    for folder in run.folder.soup:
        check_same_network(run.cfg, folder, "ensemble_runs")
        load_checkpoint(folder / "checkpoint", run.method, run.data.info.class_names, run.base)
        others.append(copied(run.method))
    copy_state(run.method, weights, "", "")
    mix(run.method, lambda name: torch.stack([state[name].double() for state in (weights, *others)]).mean(0), others)
    log.info("a soup of %d runs", 1 + len(others))
    return run.method, {}


@torch.no_grad()
def mix(method: Method, value: Callable[[str], Tensor], others: Sequence[Mapping[str, Tensor]]) -> None:
    """Replace the trained floating-point tensors of a method in place. Integer tensors are not changed.

    Args:
        method: the method.
        value: name of a tensor → its new value.
        others: trained tensors of the other runs. Their integer tensors must equal those of `method`.

    Raises:
        UserError: an integer tensor differs. For `mask`, the runs then train weights at different positions, and their
            weights cannot be averaged.
    """
    for name, tensor in trained_state(method).items():
        if tensor.is_floating_point():
            tensor.copy_(value(name))
        elif not name.endswith("num_batches_tracked") and any((other[name] != tensor).any() for other in others):
            raise UserError(f"ensemble: {name} differs between the runs; it takes runs of one mask_seed and mask_ratio")


def copied(method: Method) -> dict[str, Tensor]:
    """Copies of the trained tensors of a method, by name."""
    return {name: tensor.clone() for name, tensor in trained_state(method).items()}


def beginning(run: FinishedRun) -> dict[str, Tensor]:
    """The trained tensors of a run as they were before its first step, by name.

    They are computed again from the config and the seed of the run.

    Raises:
        UserError: the head was initialised at random, or the initial weights cannot be reproduced.
    """
    if run.folder.foreign is not None:
        raise UserError(f"ensemble wise: {run.folder.origin} does not tell where its training began")
    cfg, data = run.cfg, run.data
    if run.folder.source != run.folder.path:
        cfg = stored_config(run.folder.source, run.cfg)
        data = build_data(cfg, kept_splits(run.folder.source), run.folder.class_counts())
    method, base = fresh_method(cfg, data.info, run.accelerator.device)
    facts, head_init = read_json(run.folder.source / FACTS), method.model.init
    check_base(run.folder.source, facts, base)
    features = FeatureStore.of(run.cfg, run.accelerator)
    prepare_head(method, data, run.accelerator, run.cfg.test_batch_size, run.cfg.num_workers, features)
    fresh = [parameter.clone() for parameter in method.model.head.parameters()]
    if cfg.after is not None:
        earlier = facts.get("after", "")
        if not (Path(earlier) / FACTS).exists() or read_json(Path(earlier) / FACTS).get("sha256") != facts["after_id"]:
            raise UserError(
                f"ensemble wise: {run.folder.source} began where another run ended (after {cfg.after}), whose folder "
                f"{earlier} is not there, or was trained again; put it back, or repeat the run with `resume False`"
            )
        check_unchanged(options_from(MergeOptions, cfg), facts)
        method.after(earlier_run(Path(earlier), data, run.accelerator, base, cfg, True))
    if all(map(torch.equal, fresh, method.model.head.parameters())):  # not taken over from an earlier run
        images = data.records["train"].fingerprint
        if starts_at_random(cfg):
            raise UserError(RANDOM)
        if head_init is not None and head_init.text_encoder is None and facts.get("images", images) != images:
            raise UserError(
                f"ensemble wise: the classifier of {run.folder.source} began with features of its training images, "
                "which have changed since; put the images back, or train on those of now with `resume False`"
            )
    start = trained_state(method)
    check_fit(trained_state(run.method), start, str(run.folder.source), "give the options that it was trained with")
    return start
