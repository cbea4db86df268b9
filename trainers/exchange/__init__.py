"""Exchange with other tools. EXPORTS: what a finished run is written as; `export NAME` on its command."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import lookup
from trainers.exchange import lift, merge, onnx_format, peft_format, ride
from trainers.exchange.foreign import Foreign
from trainers.exchange.numbering import Numbering
from trainers.exchange.recipe import how_to_prepare, preprocessing
from trainers.exchange.subject import Subject
from trainers.files import new_folder, write_json
from trainers.methods import Method

__all__ = ["EXPORTS", "Export", "Subject", "export", "load_foreign"]


@dataclass(frozen=True)
class Export:
    """check: raises a `UserError` for a model that the format cannot hold; it may be on the meta device.
    write: fills a folder and returns what is to be known of it, `how_to_load` at least; docs/exports.md has the fields.
    """

    check: Callable[[Subject], None]
    write: Callable[[Subject, Path], dict[str, Any]]


EXPORTS: dict[str, Export] = {
    "peft": Export(peft_format.check, peft_format.write),
    "merged": Export(merge.check, merge.write),
    "onnx": Export(onnx_format.check, onnx_format.write),
    "lift": Export(lift.check, lift.write),
}


def load_foreign(
    file: Foreign, method: Method, tuners: Sequence[str], partial: Any, numbering: Numbering | None = None
) -> str:
    """Fill a method from a checkpoint file of other people's code, strictly; returns a report in words.

    Args:
        tuners: names of ours that are on.
        partial: the option.
        numbering: of the classes in the data, where others may have another.

    Raises:
        UserError: it cannot be read, or does not fit.
    """
    if ride.is_ride(file):
        return ride.load(file, method, numbering)
    return lift.load(file, method.model, tuners, partial, numbering)


def export(subject: Subject, name: str, path: Path) -> str:
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
