"""Makes and writes the content of metrics.json, the result of a run. `result_table.py` reads and shows it."""

import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tailtune.configs import CfgNode
from tailtune.configs.console_text import wrapped
from tailtune.configs.launch_environment import world_size
from tailtune.datasets.data_bundle import DataBundle, DataInfo
from tailtune.trainers.distributed import uses_cuda
from tailtune.trainers.methods.base import Method
from tailtune.trainers.runs.result_table import SCHEMA_VERSION
from tailtune.trainers.storage.atomic_io import Damaged, Digest, write_json
from tailtune.trainers.storage.checkpoint import package_versions
from tailtune.trainers.storage.manifest import read_json

OUTCOMES = ("test", "val", "distributions", "dirichlet", "evaluation")
"""Entries of metrics.json that belong to one evaluation, not to training."""


@dataclass
class TrainReport:
    """Counters and measurements of a training. They are stored with the state, so they survive an interruption."""

    epochs: int = 0
    """Number of finished epochs."""
    steps: int = 0
    """Number of optimizer steps."""
    seconds: float = 0.0
    """Wall time of the training, in seconds."""
    images: int = 0
    """Number of images that were trained on; an image counts again in every epoch."""
    bad_images: int = 0
    """Number of times that an image could not be read."""
    skipped_steps: int = 0
    """Number of optimizer steps that loss scaling skipped because a gradient overflowed."""
    peak_memory_bytes: int | None = None
    """Largest amount of allocated GPU memory, in bytes; None on a CPU."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """Metrics of each validation during the training, with its `epoch` and `step`."""
    kept: dict[str, Any] | None = None
    """The validation of the epoch whose weights the run ended with, if a metric has chosen it."""


@dataclass(frozen=True)
class RunLabel:
    """The names and numbers that identify a run in its report."""

    data: str
    model: str
    backbone: str
    seed: int
    epochs: int
    """Number of training epochs."""
    subset_cap: int | None = None
    """The option: the largest number of training images of a class."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "RunLabel":
        return cls(cfg.data, cfg.model, cfg.backbone, cfg.seed, cfg.num_epochs, cfg.subset_cap)


def headline(label: RunLabel, data: DataBundle, method: Method) -> str:
    """What a run begins with: its images, and its trained parameters. No line has more than 80 columns.

    Args:
        label: identifies the run.
        data: the data of the run.
        method: the method of the run.
    """
    counts, params = data.info.class_counts, method.counts()
    sizes = f"{len(data.train):,} training images of {len(counts)} classes ({counts.max():,} … {counts.min():,} each)"
    trains = f"{params['tuner']:,} parameters of tuners and {params['trainable'] - params['tuner']:,} of the head"
    images = f"{label.data}: {sizes}, {len(data.test):,} test images"
    model = f"{label.model}: {label.backbone}, trains {trains} of {params['total']:,}"
    return "\n".join(wrapped(images, "  ") + wrapped(model, "  "))


def summary(label: RunLabel, info: DataInfo, method: Method, train: TrainReport | None, prec_used: str) -> dict:
    """The content of metrics.json that describes the training; the evaluation and the notes are added later.

    Args:
        label: identifies the run.
        info: facts about the data.
        method: the trained method.
        train: report of the training; None if the command trained nothing.
        prec_used: the precision that was used, an entry of PRECISIONS.
    """
    return {
        "schema": SCHEMA_VERSION,
        "data": label.data,
        "model": label.model,
        "seed": label.seed,
        **circumstances(),
        "prec_used": prec_used,
        "stopped_early": train is not None and train.epochs < label.epochs,
        "params": method.counts(),
        "class_counts": info.class_counts.tolist(),
        **({} if label.subset_cap is None else {"subset_cap": label.subset_cap}),
        "train": None if train is None else train_facts(train),
    }


def of_training(result: dict[str, Any]) -> dict[str, Any]:
    """The entries of a metrics.json about the training, without the notes about its evaluation."""
    own = result.get("evaluation", {}).get("notes", ())  # earlier versions did not tell them apart
    notes = [note for note in result.get("notes", ()) if note not in own]
    return {**{key: value for key, value in result.items() if key not in OUTCOMES}, "notes": notes}


def of_ensemble(path: Path) -> dict[str, Any]:
    """The entry `ensemble` of a metrics.json; empty if there is none, or the file is missing or damaged."""
    try:
        return {key: value for key, value in read_json(path).items() if key == "ensemble"} if path.exists() else {}
    except Damaged:
        return {}


def circumstances() -> dict[str, Any]:
    """Commit, package versions and hardware of this computation."""
    return {"commit": commit(), "packages": package_versions(), "hardware": hardware()}


def write_metrics(folder: Path, result: dict[str, Any]) -> dict[Path, Digest]:
    """Write metrics.json.

    Args:
        folder: the run folder, or the folder of a further evaluation.
        result: the content of the file.

    Returns:
        Path of the file → its digest.
    """
    path = folder / "metrics.json"
    return {path: write_json(path, result)}


def train_facts(train: TrainReport) -> dict[str, Any]:
    """The entry `train` of metrics.json."""
    return {
        "epochs": train.epochs,
        "steps": train.steps,
        "seconds": round(train.seconds, 3),
        "images_per_second": round(train.images / train.seconds, 2) if train.seconds else None,
        "peak_memory_bytes": train.peak_memory_bytes,
        "bad_images": train.bad_images,
        "skipped_steps": train.skipped_steps,
        **({"validations": train.validations} if train.validations else {}),
        **({"kept_epoch": train.kept["epoch"]} if train.kept else {}),
    }


def commit() -> str | None:
    """The git commit of TailTune, with the suffix `-dirty` if files have changed; None outside a git checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed package may lie inside the repository of another project
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
        completed = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip() or None


def hardware() -> str:
    """The devices of this computation, in words: number and name of the GPUs, or the CPU and its threads."""
    return (f"{world_size()} × " if world_size() > 1 else "") + device_name()


def device_name() -> str:
    """The device of this process, in words."""
    if uses_cuda():
        return torch.cuda.get_device_name()
    return f"CPU ({_cpu()}, {torch.get_num_threads()} threads)"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
