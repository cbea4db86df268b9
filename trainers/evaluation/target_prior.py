"""TARGETS: adjusts the logits of one model to the class frequencies of a test set, which are given or estimated.

The adjusted logits are z' = z/T + log q − log p. p is the class prior for which softmax(z/T) is the correct posterior
(`Method.assumed_prior`; it depends on the loss). q is the target prior. The temperature T is fitted on the validation
split.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError, unknown
from tailtune.configs.option import option
from tailtune.configs.seeding import generator
from tailtune.configs.value_parsers import as_path
from tailtune.datasets.data_bundle import DataInfo, TestDistribution
from tailtune.datasets.data_settings import DataFolders
from tailtune.datasets.test_distributions.class_order import class_order
from tailtune.datasets.test_distributions.frequency_rules import frequency_rule
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.trainers.evaluation.distributions import Results
from tailtune.trainers.evaluation.ensembles import Assumed
from tailtune.trainers.evaluation.frequency_file import read_class_frequencies
from tailtune.trainers.evaluation.inference import Logits, rows_of
from tailtune.trainers.evaluation.label_shift import black_box, frequencies, kl, maximum_likelihood, stream, temperature
from tailtune.trainers.evaluation.metrics import evaluate
from tailtune.trainers.evaluation.rows import MadeRows, Rows
from tailtune.trainers.evaluation.scores import NEVER, scores_of, shifted
from tailtune.trainers.storage.large_tensors import Scratch

ENTRY = "target_prior"
"""Key of these results among the predictors of a distribution in metrics.json."""


@dataclass(frozen=True)
class TargetOptions:
    """The choice of the target prior."""

    target_prior: str | None = option(
        None,
        "Class frequencies that predictions are made for: a way to find them, a distribution such as forward50, or a "
        "JSON file of frequencies (they sum to 1) or of numbers of images (whole numbers). None means that logits stay "
        "as they are.",
        as_path,
        cls="test",
        logits=False,
        table="TARGETS",
    )
    calibrate: bool = option(
        True,
        "The temperature of the logits comes from the validation split, for target_prior.",
        cls="test",
        logits=False,
    )


@dataclass(frozen=True)
class Case:
    """A test distribution, and the data from which its class frequencies may be estimated."""

    name: str
    scores: Rows
    """z/T − log p of its images, [n, C]: a tensor, or rows that are computed when they are read."""
    labels: Tensor
    """Labels of its images [n]; only the metrics and the oracle `known` may read them."""
    train: Tensor
    """Class frequencies of the training images, [C]."""
    val: tuple[Rows, Tensor] | None
    """Scores [m, C] and labels [m] of the validation images; None without validation images."""
    batch_size: int
    """Number of images in a batch of an online estimate."""
    seed: int
    """Random seed of the order of the images in an online estimate."""
    scratch: Scratch = Scratch()
    """Gives room for what is computed from the scores."""


class Found(NamedTuple):
    """A target prior."""

    prior: Tensor
    """The final class frequencies [C]."""
    used: Rows
    """The class frequencies with which each image is predicted [n, C], or [1, C] if they are equal for all images."""


Target = Callable[[Case], Found]
"""A test distribution → its target prior."""


def _fixed(prior: Tensor) -> Found:
    return Found(prior, prior.unsqueeze(0))


def _uniform(case: Case) -> Found:
    return _fixed(torch.full_like(case.train, 1 / len(case.train)))


def _train(case: Case) -> Found:
    return _fixed(case.train)


def _known(case: Case) -> Found:
    """An oracle: it reads the labels."""
    return _fixed(_counted(case))


def _estimate(case: Case) -> Found:
    return _fixed(maximum_likelihood(case.scores, case.scratch))


def _estimate_bbse(case: Case) -> Found:
    if case.val is None:
        raise UserError("target_prior estimate_bbse needs validation images: train with val_per_class or val_list")
    scores, labels = case.val
    absent = (torch.bincount(labels, minlength=scores.shape[1]) == 0).nonzero().flatten().tolist()
    if absent:
        raise UserError(
            f"target_prior estimate_bbse: label {absent[0]} has no validation image; raise val_per_class or "
            "max_test_images, or set target_prior estimate"
        )
    return _fixed(black_box(case.scores, scores, labels))


def _estimate_online(case: Case) -> Found:
    """Predict each image with the estimate after its own batch, as `adapt sade_online` does."""
    draws = generator(case.seed, ENTRY, case.name)
    batches = torch.randperm(len(case.scores), generator=draws).split(case.batch_size)
    priors = stream(case.scores, batches)
    batch_of = torch.empty(len(case.scores), dtype=torch.int64)
    for number, rows in enumerate(batches):
        batch_of[rows] = number
    return Found(priors[-1], MadeRows(tuple(case.scores.shape), lambda rows: priors[batch_of[rows]].float()))


TARGETS: Mapping[str, Target] = {
    "uniform": _uniform,
    "train": _train,
    "known": _known,
    "estimate": _estimate,
    "estimate_bbse": _estimate_bbse,
    "estimate_online": _estimate_online,
}


@dataclass(frozen=True)
class TargetPlan:
    """The settings of `target_prior`, read from the config."""

    name: str
    """Entry of TARGETS, a distribution such as `forward50`, or a JSON file."""
    calibrate: bool
    batch_size: int
    """Number of images in a batch of an online estimate."""
    seed: int
    factors: Mapping[str, float]
    """The option `shift_factors`."""
    folders: Sequence[Path]
    """Folders in which a JSON file is searched."""
    class_order: Callable[[DataInfo], np.ndarray]
    """Properties of the data → class indices, the most frequent class first [C]."""
    may_have_val: bool
    """The data may have validation images, as far as options tell."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "TargetPlan | None":
        """Read the settings from a resolved config; None if `target_prior` is none."""
        if cfg.target_prior is None:
            return None
        return cls(
            name=cfg.target_prior,
            calibrate=cfg.calibrate,
            batch_size=cfg.adapt_batch_size,
            seed=cfg.adapt_seed,
            factors=cfg.shift_factors or {},
            folders=DataFolders.of(cfg).for_lists(),
            class_order=lambda info: class_order(DistributionSettings.of(cfg), info),
            may_have_val=bool(cfg.dataset in ("ImageFolder", "Shards") or cfg.val_list or cfg.val_per_class),
        )

    @property
    def reads_val(self) -> bool:
        """Whether the logits of the validation images are read."""
        return self.calibrate or self.name == "estimate_bbse"


def target_of(plan: TargetPlan, info: DataInfo, names: Sequence[str] | None = None) -> Target:
    """The function that finds the target prior; reads the JSON file if the plan names one.

    Args:
        plan: the settings.
        info: properties of the data.
        names: names of the classes, which a file may use as keys; None: not known yet.

    Raises:
        UserError: an unknown name, or a file that does not fit the classes.
    """
    name = plan.name
    if name in TARGETS:
        return TARGETS[name]
    if name.endswith(".json"):
        prior = read_class_frequencies(name, plan.folders, info.num_classes, names)
    else:
        try:
            rule = frequency_rule(name, plan.factors, "target_prior")
        except UserError:
            raise unknown(
                "target_prior", name, [*TARGETS, "file.json", "forward<r>", "backward<r> such as backward50"]
            ) from None
        prior = torch.zeros(info.num_classes, dtype=torch.float64)
        images = rule(1e6, info.num_classes)  # so many that rounding down does not matter
        prior[torch.from_numpy(plan.class_order(info).copy())] = torch.tensor(images, dtype=torch.float64)
    return lambda case: _fixed(prior / prior.sum())


def check_target(plan: TargetPlan | None, info: DataInfo) -> None:
    """Raise a `UserError` if `target_prior` is not possible for this run. This needs neither images nor weights."""
    if plan is None:
        return
    target_of(plan, info)
    if plan.name == "estimate_bbse" and not plan.may_have_val:
        raise UserError("target_prior estimate_bbse needs validation images: train with val_per_class or val_list")


def fitted_temperature(val: Logits, prior: Tensor) -> float:
    """The temperature T for which softmax(z/T) is calibrated on the validation images.

    Args:
        val: logits of the validation images.
        prior: log p, fp64 [C], the class prior that the logits assume.
    """
    val_frequencies = frequencies(torch.bincount(val.labels, minlength=len(prior)))
    return temperature(scores_of(val), val_frequencies.log() - prior, val.labels)


def add_target_results(
    plan: TargetPlan,
    assumed: Assumed,
    found: Logits,
    val: Logits | None,
    distributions: Sequence[TestDistribution],
    info: DataInfo,
    results: Results,
    scratch: Scratch = Scratch(),  # noqa: B008
) -> list[str]:
    """Add the results of `target_prior` to the predictors of each distribution in `results`; returns warnings.

    Args:
        assumed: what the logits assume.
        found, val: logits of the test and of the validation images.
        scratch: gives room for what is computed from the logits.
    """
    target = target_of(plan, info, info.class_names)
    prior, hot = assumed.prior.mean(0).log_softmax(0), 1.0  # log p [C] of the mean of the experts; T
    notes = [assumed.note] if assumed.note else []
    validation = None
    if val is not None:
        if plan.calibrate:
            hot = fitted_temperature(val, prior)
        validation = (scores_of(val, hot, prior.float()), val.labels)
    elif plan.calibrate:
        notes.append("target_prior: uncalibrated, for the run kept no validation images (train with val_per_class)")
    if plan.name == "known":
        notes.append("target_prior known reads the labels of the test images: an oracle to compare estimates with")
    common = (assumed.train, validation, plan.batch_size, plan.seed, scratch)
    for distribution in (candidate for candidate in distributions if candidate.name in results):
        rows = rows_of(found, distribution.positions)
        case = Case(distribution.name, scores_of(found, hot, prior.float(), rows), found.labels[rows], *common)
        predictors, answer = results[distribution.name]["predictors"], target(case)
        metrics = evaluate(shifted(case.scores, answer.used), case.labels, info.groups)
        predictors[ENTRY] = {
            **metrics,
            "gain": metrics["accuracy"] - predictors["plain"]["accuracy"],
            "kind": plan.name,
            "prior": answer.prior.tolist(),
            "kl": kl(_counted(case), answer.prior.clamp_min(NEVER)),
            "temperature": hot,
        }
    return notes


def _counted(case: Case) -> Tensor:
    """Class frequencies of the labels of a test distribution, [C] in fp64."""
    counts = torch.bincount(case.labels, minlength=len(case.train)).double()
    return counts / counts.sum()
