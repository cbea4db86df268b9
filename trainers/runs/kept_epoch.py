"""The epoch whose weights a run has kept (`keep`), where it decides what the logits mean."""

from pathlib import Path

from tailtune.configs import CfgNode, with_values
from tailtune.trainers.runs.metrics_file import TrainReport
from tailtune.trainers.runs.run_folder import FACTS
from tailtune.trainers.storage.manifest import read_json

KEPT = "kept_epoch"
"""Entry of the checkpoint's facts, and of `train` in metrics.json: number of the epoch, counted from 1."""


def facts_of_epoch(report: TrainReport | None) -> dict[str, int]:
    """The entry of a checkpoint's facts; empty if nothing was trained, or no metric has chosen an epoch."""
    return {} if report is None or report.kept is None else {KEPT: report.kept["epoch"]}


def with_kept_epoch(cfg: CfgNode, home: Path) -> CfgNode:
    """The config of a finished run as if it had ended after the epoch whose weights it has kept.

    Those weights have not seen what later epochs changed, such as the class weights from `drw_epoch` on.

    Args:
        cfg: resolved config of the run.
        home: its folder.
    """
    kept = read_json(home / FACTS).get(KEPT) if (home / FACTS).is_file() else None
    if kept is None and cfg.keep != "last" and (home / "metrics.json").is_file():  # a checkpoint of an earlier version
        kept = (read_json(home / "metrics.json").get("train") or {}).get(KEPT)
    return cfg if kept is None else with_values(cfg, num_epochs=kept)
