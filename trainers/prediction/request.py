"""`ModelRequest`: which model labels images; `PredictRequest`: what `predict` shall do with it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.path_list import PathList
from tailtune.trainers.prediction.tables import UNSURE, check_format


@dataclass(frozen=True)
class ModelRequest:
    """Which model labels images, and how."""

    run: str
    """A run folder, its name in output/, or a checkpoint of another project."""
    data: str | None = None
    """Data config for a checkpoint of another project."""
    model: str | None = None
    """Model config for a checkpoint of another project."""
    options: Sequence[str] = ()
    """Options of the evaluation or of the machine, as `KEY VALUE KEY VALUE …`."""
    threshold: float | None = None
    """Probability below which the label is `UNSURE`."""


@dataclass(frozen=True)
class PredictRequest(ModelRequest):
    """What `predict` shall do."""

    paths: PathList = field(default_factory=lambda: PathList(()))
    """The N images."""
    kind: str = "csv"
    """Entry of `tables.TABLES`."""
    out: Path | None = None
    """File of the table; None: standard output."""
    embeddings: Path | None = None
    """File of the embeddings."""
    copy_into: Path | None = None
    """Folder for copies of the images."""


def check_threshold(threshold: float | None, class_names: Sequence[str]) -> None:
    """Raise a `UserError` if a class is called like the label below the threshold."""
    if threshold is not None and UNSURE in class_names:
        raise UserError(f"a threshold would mix images of the class '{UNSURE}' with those below it; leave it out")


def check_outputs(request: PredictRequest) -> None:
    """Raise a `UserError` if something that the request asks for cannot be written, before anything is computed."""
    check_format(request.kind, request.out is not None)
    for flag, file in (("--out", request.out), ("--embeddings", request.embeddings)):
        if file is not None:
            if file.is_dir():
                raise UserError(f"{flag} {file} is a folder: name a file in it")
            _check_parent(flag, file)
    if request.out is not None and request.out == request.embeddings:
        raise UserError(f"--out and --embeddings both name {request.out}: give them two files")
    if (folder := request.copy_into) is not None:
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise UserError(f"--copy-into {folder} exists already: name a new or an empty folder")
        _check_parent("--copy-into", folder)


def _check_parent(flag: str, path: Path) -> None:
    folder = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {path}: files cannot be written into {folder}; choose another folder")
