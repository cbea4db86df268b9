"""Shows the result of a finished run again. This needs no torch, so it takes a fraction of a second."""

import logging
from dataclasses import replace
from pathlib import Path

from tailtune.configs import CfgNode, with_values
from tailtune.configs.launch_environment import world_size
from tailtune.configs.loader_options import BY_BACKBONE
from tailtune.configs.yaml_reader import read_yaml
from tailtune.datasets.splits.split_records import StoredSplits
from tailtune.trainers.processes.console_log import attach_file, detach_file, start_console
from tailtune.trainers.runs.result_table import read_result, table
from tailtune.trainers.runs.resume_decision import Command, Decision, decide
from tailtune.trainers.runs.run_folder import RunFolder, kept_splits
from tailtune.trainers.runs.run_lock import RunLock
from tailtune.trainers.storage.manifest import Manifest, read_json

SUGGESTED = "suggested"
"""Entry of `evaluation` in metrics.json: the values that the backbone suggested where the command left them open."""

log = logging.getLogger("tailtune")


def shown_again(cfg: CfgNode) -> bool:
    """Show the stored result of a finished run, if the command has nothing to compute.

    Args:
        cfg: the config of the command, not resolved.

    Returns:
        Whether the result was shown. If not, nothing was written or printed.

    Raises:
        UserError: the data have changed since the run was trained, or another launch uses the run folder.
    """
    exports = cfg.export is not None or cfg.export_fp16 or cfg.push_to_hub is not None
    if world_size() > 1 or exports or not cfg.resume:
        return False
    known = _with_stored_inputs(cfg)
    if known is None:
        return False
    folder = RunFolder(known)
    if not (folder.target() / folder.metrics.name).exists():  # before all images are compared with those of the run
        return False
    lock = RunLock(folder.path)
    start_console(main=True)
    try:
        folder.hold(lock)
        plan = splits_and_decision(known, folder)[1]
        if plan.stored is not None:
            show(plan.stored, plan, folder)
        return plan.stored is not None
    finally:
        detach_file()
        lock.release()


def _with_stored_inputs(cfg: CfgNode) -> CfgNode | None:
    """A copy of the config in which the backbone's suggestions replace None, as the finished run has stored them.

    Returns:
        None if the folder holds no finished run of this backbone, or if a suggestion is not known: then a value was
        given when the run was made.
    """
    folder = RunFolder(cfg)
    marker = Manifest.read(folder.path) if folder.metrics.exists() else None
    if cfg.model_dir is not None or marker is None or not all(map(marker.intact, (folder.metrics, folder.config))):
        return None
    stored, evaluation = read_yaml(folder.config), read_json(folder.metrics).get("evaluation", {})
    suggested = evaluation.get(SUGGESTED, {})
    missing = [key for key in BY_BACKBONE if cfg[key] is None]
    same_backbone = all(stored.get(key) == cfg[key] for key in ("backbone", "pretrained"))
    if not same_backbone or not suggested.keys() >= set(missing):
        return None
    return with_values(cfg, **{key: suggested[key] for key in missing})


def splits_and_decision(
    cfg: CfgNode, folder: RunFolder, previous: Path | None = None
) -> tuple[StoredSplits | None, Decision]:
    """The stored splits that a run must use, and the decision what to compute.

    Args:
        cfg: resolved config of the run.
        folder: its run folder.
        previous: folder of the finished run that this run continues.

    Raises:
        UserError: as `decide`.
    """
    starts_over = not cfg.resume and not cfg.test_only
    kept = None if starts_over else folder.kept()
    plan = decide(Command.of(cfg), folder, kept)
    if kept is None and previous is not None and (earlier := kept_splits(previous)) is not None:
        kept = replace(earlier, of_earlier=True)
    return kept, plan


def show(stored: Path, plan: Decision, folder: RunFolder) -> None:
    """Print a stored result.

    Args:
        stored: its metrics.json.
        plan: has a note for each change since the run was trained.
        folder: run folder of the command; its log file receives the same lines.
    """
    attach_file(folder.log_file())
    for note in plan.notes:
        log.warning("warning: %s", note)
    log.info("finished before; the result of %s\n%s", stored, table(read_result(stored)))
