"""Export format `lift_plus`: the checkpoint file that the code of LIFT+ loads."""

from pathlib import Path
from typing import Any

import torch

from tailtune.configs.errors import UserError
from tailtune.trainers.export.exported_model import ExportedModel
from tailtune.trainers.export.lift_format import how_to_evaluate, save
from tailtune.trainers.foreign_checkpoints.lift_plus import BLOCKS, layout


def check(exported: ExportedModel) -> None:
    """Raise a `UserError` if LIFT+'s code cannot load the model."""
    exported.refuse_experts("lift_plus")
    if exported.zero_shot or exported.peft or exported.encoder.projection is not None:
        raise UserError(
            "export lift_plus: LIFT+ has no tuner of the peft library, and saves no zero-shot model and no classifier "
            "of text features; use export merged"
        )
    layout(exported.method.model, exported.tuners)


def write(exported: ExportedModel, folder: Path) -> dict[str, Any]:
    """Write LIFT+'s checkpoint: one dict of plain tensors, in a pickle, because its code reads nothing else.

    Args:
        exported: the model.
        folder: the folder to write into.

    Returns:
        Facts for `facts.json`.
    """
    targets = layout(exported.method.model, exported.tuners)
    tuner = {name.removeprefix("tuner."): target.read().cpu().clone() for name, target in targets.items()}
    for index, sites in exported.encoder.tuners["adaptformer"].items() if "adaptformer" in exported.tuners else ():
        if isinstance(sites["mlp"].scale, float):  # in LIFT+ the scale is always learnt, so it is in the file
            tuner[f"{BLOCKS}.{index}.adaptformer.scale"] = torch.tensor(sites["mlp"].scale)
    save({"tuner": tuner}, folder)
    return how_to_evaluate(exported, "FOLDER is this folder; LIFT+'s own main.py takes test_only and model_dir, too")
