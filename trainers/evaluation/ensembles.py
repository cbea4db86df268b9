"""ENSEMBLES: how a trained method becomes the predictor that is evaluated: with its start, other runs, zero-shot CLIP.

The first two mix trained tensors, and what is evaluated costs no more; the last two add up logits, and the zero-shot
classifier runs beside the trained one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError, lookup
from tailtune.configs.option import NoOptions, key_names, option
from tailtune.configs.value_parsers import as_paths, as_str
from tailtune.datasets import build_info
from tailtune.models import build_model
from tailtune.trainers.evaluation.weight_ensembles import RANDOM, soup, wise
from tailtune.trainers.evaluation.zero_shot_ensembles import gla, logits, zero_shot_of
from tailtune.trainers.methods import METHODS, Method
from tailtune.trainers.methods.wrapper import Wrapper
from tailtune.trainers.runs.load_run import FinishedRun


@dataclass(frozen=True)
class EnsembleOptions:
    """What is evaluated together with the finished run."""

    ensemble: str | None = option(
        None,
        "How a finished run is evaluated together with its start, with other runs or with the zero-shot classifier. "
        "None means that it is evaluated alone.",
        as_str,
        cls="test",
        table="ENSEMBLES",
    )


@dataclass(frozen=True)
class AlphaOptions:
    """Share of the trained run."""

    alpha: float = option(
        0.5,
        "Share of the trained run in ensemble wise and logits.",
        key="ensemble_alpha",
        cls="test",
        least=0.0,
        most=1.0,
    )


@dataclass(frozen=True)
class RunsOptions:
    """Other runs."""

    runs: list[str] | None = option(
        None,
        "Folders of the other finished runs of ensemble soup, separated by commas.",
        as_paths,
        key="ensemble_runs",
        cls="test",
    )


@dataclass(frozen=True)
class Ensemble:
    """An entry of ENSEMBLES."""

    make: Callable[[FinishedRun], tuple[Method, dict[str, Any]]]
    """The predictor, and what metrics.json says of it."""
    Options: type = NoOptions
    """Dataclass of the options that it reads."""
    start: bool = False
    """It needs what the run began with."""
    text: bool = False
    """It runs the zero-shot classifier."""
    assumes: Callable[[Tensor, float], Tensor] = lambda prior, _: prior
    """Log prior that the trained logits assume [E, C], α → that of its own logits; of zero-shot ones nothing is known,
    which counts as uniform."""


def as_trained(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    return run.method, {}


NONE = Ensemble(as_trained)
ENSEMBLES: Mapping[str, Ensemble] = {
    "wise": Ensemble(wise, AlphaOptions, start=True),
    "soup": Ensemble(soup, RunsOptions),
    "logits": Ensemble(logits, AlphaOptions, text=True, assumes=lambda prior, alpha: (alpha * prior).log_softmax(-1)),
    "gla": Ensemble(gla, text=True, assumes=lambda prior, _: torch.zeros_like(prior).log_softmax(-1)),
}


def entry_of(cfg: CfgNode) -> Ensemble:
    """What `ensemble` names."""
    return NONE if cfg.ensemble is None else lookup(ENSEMBLES, cfg.ensemble, "ensemble")


def ensembled(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """The predictor that `ensemble` asks for, and what metrics.json says of it; none: the method as it was trained."""
    return entry_of(run.cfg).make(run)


def check_ensemble(cfg: CfgNode) -> None:
    """Refuse what cannot be, without images or weights.

    Raises:
        UserError: an unknown entry, an option that it does not read, a run without what it needs.
    """
    entry, name, alpha = entry_of(cfg), cfg.ensemble, cfg.ensemble_alpha
    moved = alpha != AlphaOptions().alpha
    if entry is NONE:
        if moved or cfg.ensemble_runs:
            raise UserError("ensemble_alpha and ensemble_runs: without `ensemble` nothing reads them; leave them out")
        return
    if moved and not reads(entry, "ensemble_alpha"):
        raise UserError(f"ensemble_alpha {alpha:g}: ensemble {name} does not read it; {_who('ensemble_alpha')} do")
    if cfg.ensemble_runs and not reads(entry, "ensemble_runs"):
        raise UserError(f"ensemble_runs: ensemble {name} does not read it; {_who('ensemble_runs')} does")
    if reads(entry, "ensemble_runs") and not cfg.ensemble_runs:
        raise UserError(f"ensemble {name} is of several finished runs: name the others with ensemble_runs")
    if cfg.zero_shot:
        raise UserError(f"ensemble {name} is of a trained run, and zero_shot has trained nothing; leave out either")
    if not cfg.test_only:
        raise UserError(f"ensemble {name} evaluates a finished run: train without it, then add test_only True")
    if cfg.export is not None:
        raise UserError(f"export {cfg.export} writes what was trained: leave out ensemble {name}")
    if entry.start and cfg.init_head is None and not _goes_on(cfg):
        raise UserError(RANDOM)
    if entry.text:
        _check_text(cfg)


def _goes_on(cfg: CfgNode) -> bool:
    """Whether the run's classifier began where an earlier run's ended; one may also be a teacher, or be left out."""
    kind = METHODS[cfg.method]
    starts = cfg.after is not None and kind.after in (Method.after, Wrapper.after)
    return starts and not kind.drops_head()


def reads(entry: Ensemble, key: str) -> bool:
    """Whether an ensemble has an option."""
    return key in key_names(entry.Options).values()


def _who(key: str) -> str:
    return " and ".join(name for name, entry in ENSEMBLES.items() if reads(entry, key))


def _check_text(cfg: CfgNode) -> None:
    """Refuse a backbone without text tower, as zero-shot itself does."""
    names = build_info(cfg).class_names
    try:
        with torch.device("meta"):
            build_model(zero_shot_of(cfg), names)
    except UserError as error:
        raise UserError(f"ensemble {cfg.ensemble}: {error}") from error
