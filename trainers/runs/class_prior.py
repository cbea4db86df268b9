"""The class priors that the logits of finished runs, and of weights mixed from them, assume.

The functions of this module build models without weights, so they take a whole config.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tailtune.configs import CfgNode, with_values
from tailtune.configs.errors import UserError
from tailtune.configs.option import options_from
from tailtune.datasets.build_data import build_info
from tailtune.datasets.data_bundle import DataInfo
from tailtune.models import resolve
from tailtune.trainers.methods import Method
from tailtune.trainers.runs.kept_epoch import with_kept_epoch
from tailtune.trainers.runs.load_run import make_method, stored_config
from tailtune.trainers.runs.merged_runs import MergeOptions, folders, merge_weights
from tailtune.trainers.runs.run_folder import FACTS, RunFolder, counts_of
from tailtune.trainers.storage.manifest import read_json


class ClassPrior(NamedTuple):
    """The class frequencies behind the logits of a run."""

    assumed: Tensor
    """log p [E, C] in fp64: the class prior that the logits assume."""
    train: Tensor
    """Class frequencies [C] of the training images of the run that computed the logits."""


def prior_of_run(folder: RunFolder, cfg: CfgNode) -> ClassPrior:
    """As `prior_of`, of the run whose checkpoint a command evaluates.

    Args:
        folder: run folder of the command.
        cfg: config of the command.
    """
    return prior_of(folder.source, _config_of(folder, cfg))


def prior_of_start(folder: RunFolder, cfg: CfgNode) -> ClassPrior:
    """As `prior_of_run`, before the first step of that run."""
    return _prior(folder.source, with_values(resolve(_config_of(folder, cfg)), num_epochs=0))


def priors_of_soup(folder: RunFolder, cfg: CfgNode) -> list[Tensor]:
    """What the logits of each run that `ensemble_runs` names assume, [E, C]."""
    return [prior_of(home, stored_config(home, cfg)).assumed for home in folder.soup]


def prior_of(home: Path, cfg: CfgNode, info: DataInfo | None = None) -> ClassPrior:
    """The class frequencies behind the logits of a run.

    Some methods predict with the model of the earlier run (`after`), and so does a run that trains no epoch of it. Its
    logits then assume what those of the earlier run do. If `keep` has chosen an epoch, they assume what a run of that
    length does. If the run only merges others, without training, log p is the mean of theirs, with the weights of the
    merge. That is exact for logits that are linear in the weights.

    Args:
        home: folder of the run.
        cfg: config of the run.
        info: facts about its data; None: they are looked for where the data are.

    Raises:
        UserError: the folder of the earlier run is missing.
    """
    return _prior(home, with_kept_epoch(resolve(cfg), home), info)


def _prior(home: Path, cfg: CfgNode, info: DataInfo | None = None) -> ClassPrior:
    info = info or build_info(cfg, counts_of(home))
    with torch.device("meta"):
        method = make_method(cfg, info)
    train = method.log_prior.exp().cpu()
    if not (runs := _computed_by(home, cfg, method)):
        assumed = method.assumed_prior().cpu()
        # Without an epoch, nothing is adjusted yet.
        return ClassPrior(assumed if method.objective.epochs else torch.zeros_like(assumed).log_softmax(1), train)
    priors = [prior_of(run, stored_config(run, cfg)) for run, _ in runs]
    if len(priors) == 1:
        return priors[0]
    mean = torch.stack([weight * prior.assumed for prior, (_, weight) in zip(priors, runs, strict=True)]).sum(0)
    return ClassPrior(mean.log_softmax(1), priors[0].train if method.predicts_as_earlier_run else train)


def _config_of(folder: RunFolder, cfg: CfgNode) -> CfgNode:
    has_config = folder.foreign is None and (folder.source / "config.yaml").exists()
    return stored_config(folder.source, cfg) if has_config else cfg


def _computed_by(home: Path, cfg: CfgNode, method: Method) -> list[tuple[Path, float]]:
    """The earlier runs whose weights compute the logits of a run, each with its share; empty: the run has its own."""
    if not (method.predicts_as_earlier_run or _trains_nothing(cfg, method)):
        return []
    options, first = options_from(MergeOptions, cfg), Path(read_json(home / FACTS).get("after", ""))
    merged = folders(options)
    share, *shares = merge_weights(len(merged) // options.together, options.share)
    for run in (first, *merged):
        if not (run / "config.yaml").is_file():
            raise UserError(
                f"the logits of {home} are those of the run before it (after {cfg.after}), whose folder "
                f"{run} is not there; put it back, or repeat the run with `resume False`"
            )
    of_merged = ((run, shares[number // options.together] / options.together) for number, run in enumerate(merged))
    return [(first, share), *of_merged]


def _trains_nothing(cfg: CfgNode, method: Method) -> bool:
    """Whether a run takes over the weights of the earlier run and trains no epoch."""
    if cfg.after is None or cfg.zero_shot or method.objective.epochs:
        return False
    return method.starts_where_earlier_run_ended and not method.changes_start and not method.discards("model.head.")
