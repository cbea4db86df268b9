"""Exports finished runs to the formats in EXPORTS. The option `export NAME` of a run's command starts an export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailtune.configs.errors import UserError, lookup
from tailtune.trainers.export import hub_format, lift_format, lift_plus_format, merged_format, onnx_format, peft_format
from tailtune.trainers.export.exported_model import ExportedModel, SharedRun
from tailtune.trainers.export.hub_upload import check_push, push
from tailtune.trainers.export.inference_script import SCRIPT, write_script
from tailtune.trainers.export.loading_code import how_to_prepare, preprocessing
from tailtune.trainers.storage.atomic_io import new_folder, write_json

__all__ = ["EXPORTS", "Export", "ExportedModel", "SharedRun", "check_export", "export", "push"]


@dataclass(frozen=True)
class Export:
    """An export format.

    Args:
        check: raises a `UserError` if the format cannot hold the model. The model may be on the meta device.
        write: writes files into a folder. Returns facts for `facts.json`, at least `how_to_load`; docs/exports.md lists
            the fields.
        is_code: whether `how_to_load` is Python code; then `infer.py` is written, too.
    """

    check: Callable[[ExportedModel], None]
    write: Callable[[ExportedModel, Path], dict[str, Any]]
    is_code: bool = True


EXPORTS: dict[str, Export] = {
    "peft": Export(peft_format.check, peft_format.write),
    "merged": Export(merged_format.check, merged_format.write),
    "onnx": Export(onnx_format.check, onnx_format.write),
    "hub": Export(hub_format.check, hub_format.write),
    "lift": Export(lift_format.check, lift_format.write, is_code=False),
    "lift_plus": Export(lift_plus_format.check, lift_plus_format.write, is_code=False),
}
"""Name → format."""


def check_export(name: str | None, half: bool, repository: str | None) -> None:
    """Check the options that belong to one format.

    Args:
        name: the option `export`.
        half: the option `export_fp16`.
        repository: the option `push_to_hub`.

    Raises:
        UserError: an option of another format, or a repository to which nothing can be uploaded.
    """
    if half and name != "onnx":
        raise UserError("export_fp16 True is for export onnx: add `export onnx`, or leave it out")
    if repository is not None:
        if name != "hub":
            raise UserError("push_to_hub uploads what `export hub` writes: add `export hub`")
        check_push(repository)


def export(exported: ExportedModel, name: str, path: Path) -> str:
    """Export a model. The folder is written completely or not at all.

    Args:
        exported: the model.
        name: entry of EXPORTS.
        path: the folder to write.

    Returns:
        A report in words.

    Raises:
        UserError: the format cannot hold the model, or the file system refuses to write.
    """
    entry = lookup(EXPORTS, name, "export")
    entry.check(exported)
    with new_folder(path) as folder:
        facts = entry.write(exported, folder)
        steps = preprocessing(exported, inside=name == "onnx")
        facts = {"preprocessing": steps, "how_to_prepare": how_to_prepare(steps), **facts}
        if entry.is_code:
            write_script(folder, facts)
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        write_json(folder / "facts.json", {"format": name, "files": files, **exported.describe(), **facts})
        # Libraries write private temporary files; facts.json has the permissions that the user's umask gives.
        mode = (folder / "facts.json").stat().st_mode
        for name in files:
            (folder / name).chmod(mode)
    checked = f", largest difference {facts['largest_difference']:.1g}" if "largest_difference" in facts else ""
    advice = "facts.json says how to load it and how to prepare images (how_to_load, how_to_prepare)"
    advice += f"; python {path / SCRIPT} IMAGE classifies an image" if entry.is_code else ""
    return f"exported to {path}: {', '.join(files)}, facts.json{checked}\n{advice}"
