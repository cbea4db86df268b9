"""ENSEMBLES: combinations of a trained method with its initial weights, other runs or the zero-shot classifier of CLIP.

`wise` and `soup` average weights; the result needs no more computation than one model. `logits` and `gla` add up
logits, so the zero-shot classifier runs in addition to the trained one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.configs.errors import lookup
from tailtune.configs.option import NoOptions, key_names, option
from tailtune.configs.value_parsers import as_paths, as_str
from tailtune.trainers.evaluation.weight_ensembles import soup, wise
from tailtune.trainers.evaluation.zero_shot_ensembles import gla, logits
from tailtune.trainers.methods import Method
from tailtune.trainers.runs.class_prior import prior_of_run, prior_of_start, priors_of_soup
from tailtune.trainers.runs.load_run import FinishedRun
from tailtune.trainers.runs.run_folder import RunFolder

GUESSED = (
    "the mixed weights assume different class priors, so that the prior of the mixture is a guess: for wise that of "
    "the trained run, for soup the mean of the logarithms"
)


@dataclass(frozen=True)
class EnsembleOptions:
    """The option that chooses an ensemble."""

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
    """Weight of the trained run in an ensemble."""

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
    """The other runs of an ensemble."""

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
    """Finished run → the method that predicts, and entries of metrics.json about it."""
    Options: type = NoOptions
    """Dataclass of the options that this ensemble reads."""
    start: bool = False
    """Whether the ensemble needs the initial weights of the run."""
    text: bool = False
    """Whether the ensemble runs the zero-shot classifier."""
    reads_train: bool = False
    """Whether its logits also depend on the training images that are there."""
    others: Callable[[RunFolder, CfgNode], list[Tensor]] = lambda folder, cfg: []
    """→ the log class prior [E, C] that each of the other mixed weights assumes."""
    assumes: Callable[[Tensor, list[Tensor], float], Tensor] = lambda prior, others, alpha: prior
    """(log class prior that the trained logits assume [E, C], those of `others`, α) → log class prior that the
    ensemble's logits assume.

    The prior of zero-shot logits is unknown; it is treated as uniform.
    """


def as_trained(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """No ensemble: the trained method alone."""
    return run.method, {}


NONE = Ensemble(as_trained)
ENSEMBLES: Mapping[str, Ensemble] = {
    # Between start and end, the prior comes earlier than α says: on digits, the logits at α = ¼ follow ⅘ of it.
    "wise": Ensemble(
        wise,
        AlphaOptions,
        start=True,
        others=lambda folder, cfg: [prior_of_start(folder, cfg).assumed],
        assumes=lambda prior, others, alpha: prior if alpha else others[0],
    ),
    "soup": Ensemble(
        soup,
        RunsOptions,
        others=priors_of_soup,
        assumes=lambda prior, others, _: torch.stack([prior, *others]).mean(0).log_softmax(-1),
    ),
    "logits": Ensemble(
        logits, AlphaOptions, text=True, assumes=lambda prior, _, alpha: (alpha * prior).log_softmax(-1)
    ),
    "gla": Ensemble(
        gla, text=True, reads_train=True, assumes=lambda prior, *_: torch.zeros_like(prior).log_softmax(-1)
    ),
}


@dataclass(frozen=True)
class Assumed:
    """What the logits of an evaluation assume about the class frequencies, for `target_prior`."""

    prior: Tensor
    """log p [E, C] in fp64."""
    train: Tensor
    """Class frequencies of the training images [C]."""
    note: str = ""
    """Why p is a guess; empty if it is not."""

    @classmethod
    def of(cls, folder: RunFolder, cfg: CfgNode) -> "Assumed":
        """Of the run that a command evaluates, with its ensemble."""
        entry, trained = ensemble_named(cfg.ensemble), prior_of_run(folder, cfg)
        others = entry.others(folder, cfg)
        prior = entry.assumes(trained.assumed, others, cfg.ensemble_alpha)
        ends = entry.start and cfg.ensemble_alpha in (0, 1)
        differ = not ends and not all(torch.allclose(trained.assumed, other, atol=1e-6) for other in others)
        note = f"target_prior: {GUESSED}" if differ else ""
        return cls(prior, trained.train, note)


def reads(entry: Ensemble, key: str) -> bool:
    """Whether an ensemble reads the option `key`."""
    return key in key_names(entry.Options).values()


def ensemble_named(name: str | None) -> Ensemble:
    """The ensemble of this name; None means the trained method alone.

    Raises:
        UserError: no ensemble has this name.
    """
    return NONE if name is None else lookup(ENSEMBLES, name, "ensemble")


def ensembled(run: FinishedRun, name: str | None) -> tuple[Method, dict[str, Any]]:
    """Build an ensemble.

    Args:
        run: the finished run.
        name: name of the ensemble, as in `ensemble_named`.

    Returns:
        The method that predicts, and entries of metrics.json about it.
    """
    return ensemble_named(name).make(run)
