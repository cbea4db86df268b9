"""Compares a command with a stored config: a run of the same options, and one that gets more epochs.

A run that gets more epochs gives up its results.
"""

from collections.abc import Iterable
from pathlib import Path

from tailtune.configs import CfgNode, load_resolved, schema_of, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import TRAIN
from tailtune.trainers.runs.ownership import OwnedFolder
from tailtune.trainers.storage.atomic_io import remove_folder


def is_trained_as(config: Path, cfg: CfgNode) -> bool:
    """Whether a run has the training options of a command; False if its config is missing or damaged.

    Args:
        config: the `config.yaml` of the run.
        cfg: config of the command.
    """
    try:
        return config.exists() and values_of(load_resolved(config, schema_of(cfg)), TRAIN) == values_of(cfg, TRAIN)
    except UserError:
        return False


def epochs_before(config: Path, cfg: CfgNode) -> int | None:
    """Number of epochs of the run that is there, if a command asks for more of them; otherwise None.

    Args:
        config: the `config.yaml` of the run.
        cfg: config of the command.
    """
    if cfg.test_only or not config.exists():
        return None
    try:
        epochs = int(load_resolved(config, schema_of(cfg)).num_epochs)
    except UserError:  # a damaged config; `RunFolder.check` refuses it
        return None
    return epochs if epochs < cfg.num_epochs else None


def forget_results(folder: OwnedFolder, results: Iterable[Path]) -> None:
    """Remove results of a run that gets more epochs. Its states, from which it continues, stay.

    Args:
        folder: the run folder.
        results: files, and folders of tensors, that the run has written.
    """
    gone = [path for path in results if path.exists()]
    folder.seal({}, gone)
    for path in gone:
        if path.is_dir():
            remove_folder(path)
        else:
            path.unlink()
