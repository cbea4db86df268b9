"""Export format `lift`: the checkpoint file that LIFT's own code loads."""

import shlex
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.trainers.export.exported_model import ExportedModel
from tailtune.trainers.foreign_checkpoints.checkpoint_file import LIFT_FILE
from tailtune.trainers.foreign_checkpoints.lift import layout
from tailtune.trainers.storage.atomic_io import write_bytes


def check(exported: ExportedModel) -> None:
    """Raise a `UserError` if LIFT's code cannot load the model."""
    exported.refuse_experts("lift")
    if exported.zero_shot or exported.peft:
        raise UserError(
            "export lift: LIFT has no tuner of the peft library and saves no zero-shot model; use export merged"
        )
    if any(exported.encoder.tuned_blocks.get("vpt_shallow", ())):  # a block with an index above 0
        raise UserError("export lift: LIFT has vpt_shallow at the first block only; use export onnx")
    layout(exported.method.model, exported.tuners)


def write(exported: ExportedModel, folder: Path) -> dict[str, Any]:
    """Write LIFT's checkpoint. LIFT reads only pickles, so the file is a pickle that contains only plain tensors.

    Args:
        exported: the model.
        folder: the folder to write into.

    Returns:
        Facts for `facts.json`.
    """
    targets = layout(exported.method.model, exported.tuners)
    content: dict[str, dict[str, Tensor]] = {"tuner": {}, "head": {}}
    for key, target in targets.items():
        part, name = key.split(".", 1)
        content[part][name] = target.read().cpu().clone()
    for index, sites in exported.encoder.tuners["adaptformer"].items() if "adaptformer" in exported.tuners else ():
        if isinstance(sites["mlp"].scale, float):  # in LIFT the scale is always learnt, so it is in the file
            content["tuner"][f"adaptformer_list.{index}.scale"] = torch.tensor([sites["mlp"].scale])
    save(content, folder)
    return how_to_evaluate(exported, "FOLDER is this folder; LIFT's own main.py takes such options too")


def save(content: dict[str, dict[str, Tensor]], folder: Path) -> None:
    """Write tensors into a checkpoint file in a folder."""
    buffer = BytesIO()
    torch.save(content, buffer)
    write_bytes(folder / LIFT_FILE, buffer.getvalue())  # torch.save itself would raise RuntimeError on a full disk


def how_to_evaluate(exported: ExportedModel, note: str) -> dict[str, Any]:
    """The facts that say which command evaluates the file.

    Args:
        exported: the model.
        note: a remark on the command.
    """
    words = [*exported.command, "test_only", "True", "model_dir", "FOLDER"]
    return {"command": words, "how_to_load": f"{shlex.join(['python', 'main.py', *words])}\n# {note}"}
