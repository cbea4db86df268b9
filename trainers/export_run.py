"""`export_run`: writes the model of a finished run in another format (`export`), and uploads it (`push_to_hub`)."""

import logging
from pathlib import Path

import torch

from tailtune.configs import CfgNode
from tailtune.datasets.build_data import build_data
from tailtune.trainers.evaluation.stored_temperature import stored_temperature
from tailtune.trainers.export import SharedRun, export, push
from tailtune.trainers.runs.class_prior import prior_of_run
from tailtune.trainers.runs.load_run import subject_of, trained_method
from tailtune.trainers.runs.result_table import read_result
from tailtune.trainers.runs.run_folder import FACTS, RunFolder
from tailtune.trainers.storage.manifest import read_json
from tailtune.trainers.trained_model import info_of_run

log = logging.getLogger("tailtune")


def export_run(cfg: CfgNode, folder: RunFolder, metrics: Path, device: torch.device) -> None:
    """Export the model of a finished run into its folder. A run of `model_dir` is exported beside `metrics`.

    Args:
        cfg: resolved config of the command.
        folder: run folder of the command.
        metrics: the metrics.json of the evaluation.
        device: where the model is built.

    Raises:
        UserError: the format cannot hold the model, a file is damaged, or the Hub refuses the upload.
    """
    is_ours = folder.foreign is None
    info = info_of_run(cfg, read_json(folder.source / FACTS)) if is_ours else build_data(cfg).info
    method = trained_method(cfg, folder.evaluated, info, device).to("cpu")
    if cfg.model_dir is None:
        folder.own("export")
    home = folder.path if cfg.model_dir is None else metrics.parent

    def assumed() -> torch.Tensor:
        return prior_of_run(folder, cfg).assumed

    subject = subject_of(
        cfg,
        method,
        info.class_names,
        folder.origin,
        class_counts=info.class_counts.tolist(),
        temperature=stored_temperature(folder.source, cfg.crop_margin, assumed) if is_ours else None,
        run=SharedRun(folder.source, read_result(metrics)) if is_ours else None,
    )
    path = home / "export" / cfg.export
    log.info(export(subject, cfg.export, path))
    if cfg.push_to_hub is not None:
        log.info(push(path, cfg.push_to_hub))
