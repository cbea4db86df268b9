"""The method of a finished run without weights, and the class priors that its logits and mixed weights assume.

The functions of this module build models, so they take a whole config.
"""

from pathlib import Path

import torch
from torch import Tensor

from tailtune.configs import CfgNode
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


def outline_of(folder: RunFolder, cfg: CfgNode) -> Method:
    """The method, without weights, of the run whose checkpoint a command evaluates.

    Args:
        folder: run folder of the command.
        cfg: config of the command.
    """
    return trained_outline(folder.source, _config_of(folder, cfg))


def prior_of_run(folder: RunFolder, cfg: CfgNode) -> Tensor:
    """As `assumed_prior`, of the run whose checkpoint a command evaluates; the arguments are those of `outline_of`."""
    return assumed_prior(folder.source, _config_of(folder, cfg))


def prior_of_start(folder: RunFolder, cfg: CfgNode) -> Tensor:
    """As `prior_of_run`, before the first step of that run."""
    cfg = resolve(_config_of(folder, cfg)).clone()
    cfg.defrost()
    cfg.num_epochs = 0
    cfg.freeze()
    return _prior(folder.source, cfg)


def priors_of_soup(folder: RunFolder, cfg: CfgNode) -> list[Tensor]:
    """As `prior_of_run`, of each run that `ensemble_runs` names."""
    return [assumed_prior(home, stored_config(home, cfg)) for home in folder.soup]


def trained_outline(home: Path, cfg: CfgNode) -> Method:
    """The method, without weights, that computed the stored logits of a run.

    Some methods predict with the model of the earlier run (`after`), and so does a run that trains no epoch of it. For
    these, the earlier run's method is returned. If `keep` has chosen an epoch, the method is that of a run of so many.

    Args:
        home: folder of the run.
        cfg: config of the run.

    Raises:
        UserError: the folder of the earlier run is missing.
    """
    cfg = with_kept_epoch(resolve(cfg), home)
    method = _outline(home, cfg)
    runs = _computed_by(home, cfg, method)
    if len(runs) == 1 or method.predicts_as_earlier_run:
        earlier, _ = runs[0]
        return trained_outline(earlier, stored_config(earlier, cfg))
    return method


def assumed_prior(home: Path, cfg: CfgNode, info: DataInfo | None = None) -> Tensor:
    """log p [E, C] in fp64: the class prior that the logits of a run assume.

    If the run only merges others, without training, log p is the mean of theirs, with the weights of the merge. That is
    exact for logits that are linear in the weights.

    Args:
        home: folder of the run.
        cfg: config of the run.
        info: facts about its data; None: they are looked for where the data are.

    Raises:
        UserError: as `trained_outline`.
    """
    return _prior(home, with_kept_epoch(resolve(cfg), home), info)


def _prior(home: Path, cfg: CfgNode, info: DataInfo | None = None) -> Tensor:
    method = _outline(home, cfg, info)
    runs = _computed_by(home, cfg, method)
    if runs:
        priors = [weight * assumed_prior(run, stored_config(run, cfg)) for run, weight in runs]
        return torch.stack(priors).sum(0).log_softmax(1) if len(priors) > 1 else priors[0]
    prior = method.assumed_prior()
    return prior if method.objective.epochs else torch.zeros_like(prior).log_softmax(1)  # nothing is adjusted yet


def _config_of(folder: RunFolder, cfg: CfgNode) -> CfgNode:
    has_config = folder.foreign is None and (folder.source / "config.yaml").exists()
    return stored_config(folder.source, cfg) if has_config else cfg


def _outline(home: Path, cfg: CfgNode, info: DataInfo | None = None) -> Method:
    info = info or build_info(cfg, counts_of(home))
    with torch.device("meta"):
        return make_method(cfg, info)


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
