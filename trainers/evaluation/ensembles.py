"""ENSEMBLES: how a trained method becomes the predictor that is evaluated: with its start, other runs, zero-shot CLIP.

The first two mix trained tensors, and what is evaluated costs no more; the last two add up logits, and the zero-shot
classifier runs beside the trained one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import lookup
from tailtune.configs.option import NoOptions, key_names, option
from tailtune.configs.value_parsers import as_paths, as_str
from tailtune.trainers.evaluation.weight_ensembles import soup, wise
from tailtune.trainers.evaluation.zero_shot_ensembles import gla, logits
from tailtune.trainers.methods import Method
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


def reads(entry: Ensemble, key: str) -> bool:
    """Whether an ensemble has an option."""
    return key in key_names(entry.Options).values()


def ensemble_named(name: str | None) -> Ensemble:
    """The entry of a name; None: the trained method alone."""
    return NONE if name is None else lookup(ENSEMBLES, name, "ensemble")


def ensembled(run: FinishedRun, name: str | None) -> tuple[Method, dict[str, Any]]:
    """The predictor that an ensemble makes of a run, and what metrics.json says of it.

    Args:
        name: as in `ensemble_named`.
    """
    return ensemble_named(name).make(run)
