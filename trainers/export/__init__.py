"""EXPORTS: the formats that a finished run can be exported to; `export NAME` on its command."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailtune.configs.errors import lookup
from tailtune.trainers.export import lift_format, merged_format, onnx_format, peft_format
from tailtune.trainers.export.exported_model import ExportedModel
from tailtune.trainers.export.loading_code import how_to_prepare, preprocessing
from tailtune.trainers.storage.atomic_io import new_folder, write_json

__all__ = ["EXPORTS", "Export", "ExportedModel", "export"]


@dataclass(frozen=True)
class Export:
    """check: raises a `UserError` for a model that the format cannot hold; it may be on the meta device.
    write: fills a folder and returns what is to be known of it, `how_to_load` at least; docs/exports.md has the fields.
    """

    check: Callable[[ExportedModel], None]
    write: Callable[[ExportedModel, Path], dict[str, Any]]


EXPORTS: dict[str, Export] = {
    "peft": Export(peft_format.check, peft_format.write),
    "merged": Export(merged_format.check, merged_format.write),
    "onnx": Export(onnx_format.check, onnx_format.write),
    "lift": Export(lift_format.check, lift_format.write),
}


def export(subject: ExportedModel, name: str, path: Path) -> str:
    """Write a model in a format into the folder `path`, whole or not at all; returns a report in words.

    Raises:
        UserError: the format cannot hold it, or the file system refuses.
    """
    entry = lookup(EXPORTS, name, "export")
    entry.check(subject)
    with new_folder(path) as folder:
        facts = entry.write(subject, folder)
        files = sorted(each.name for each in folder.iterdir())
        steps = preprocessing(subject, inside=name == "onnx")
        facts = {"preprocessing": steps, "how_to_prepare": how_to_prepare(steps), **facts}
        write_json(folder / "facts.json", {"format": name, "files": files, **subject.describe(), **facts})
        # Libraries write through private temporary files; this one has the mode that the user's umask gives.
        mode = (folder / "facts.json").stat().st_mode
        for each in folder.iterdir():
            each.chmod(mode)
    checked = f", largest difference {facts['largest_difference']:.1g}" if "largest_difference" in facts else ""
    said = "facts.json says how to load it and how to prepare images (how_to_load, how_to_prepare)"
    return f"exported to {path}: {', '.join(files)}, facts.json{checked}\n{said}"
