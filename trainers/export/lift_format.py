"""`lift`: the checkpoint file that LIFT's own code loads."""

import shlex
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.trainers.export.exported_model import ExportedModel
from tailtune.trainers.foreign_checkpoints.checkpoint_file import FILE
from tailtune.trainers.foreign_checkpoints.lift import layout
from tailtune.trainers.storage.atomic_io import write_bytes


def check(subject: ExportedModel) -> None:
    subject.refuse_experts("lift")
    if subject.zero_shot or subject.peft:
        raise UserError("export lift: LIFT has no tuner of the peft library and saves no zero-shot model; use merged")
    start = next(iter(subject.encoder.block_range(subject.partial)), 0) if subject.partial is not None else 0
    if start and "vpt_shallow" in subject.tuners:
        raise UserError("export lift: LIFT has vpt_shallow at the first block only; use onnx")
    layout(subject.method.model, subject.tuners, subject.partial)


def write(subject: ExportedModel, folder: Path) -> dict[str, Any]:
    """The one file of ours that is a pickle, of plain tensors only, because LIFT reads no other."""
    places = layout(subject.method.model, subject.tuners, subject.partial)
    parts: dict[str, dict[str, Tensor]] = {"tuner": {}, "head": {}}
    for key, place in places.items():
        part, name = key.split(".", 1)
        parts[part][name] = place.read().cpu().clone()
    for index, sites in subject.encoder.tuners["adaptformer"].items() if "adaptformer" in subject.tuners else ():
        if isinstance(sites["mlp"].scale, float):  # the original has a learnt one always
            parts["tuner"][f"adaptformer_list.{index}.scale"] = torch.tensor([sites["mlp"].scale])
    content = BytesIO()
    torch.save(parts, content)
    write_bytes(folder / FILE, content.getvalue())  # torch.save makes RuntimeErrors of a full disk
    words = [*subject.command, "test_only", "True", "model_dir", "FOLDER"]
    note = "# FOLDER is this folder; LIFT's own main.py takes such options too"
    return {"command": words, "how_to_load": f"{shlex.join(['python', 'main.py', *words])}\n{note}"}
