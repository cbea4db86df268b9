"""Writes and reads metrics.json, the result of a run, and formats the result as a table for the terminal."""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailtune.configs import CfgNode
from tailtune.datasets import DataBundle, DataInfo
from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.trainers.distributed import hardware
from tailtune.trainers.methods.base import Method
from tailtune.trainers.storage.atomic_io import Damaged, Digest, write_json
from tailtune.trainers.storage.checkpoint import package_versions
from tailtune.trainers.storage.manifest import read_json

SCHEMA_VERSION = 2
"""Version of the layout of metrics.json: which entries the file has, and at which place."""

COLUMNS = {
    "accuracy": "all",
    "mean_acc": "mean",
    "many_acc": "many",
    "med_acc": "medium",
    "few_acc": "few",
    "worst_case_acc": "worst",
    "macro_f1": "macro F1",
    "ece": "ECE",
}
"""Metric in metrics.json → heading of its column in the terminal."""


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


@dataclass(frozen=True)
class RunLabel:
    """The names and numbers that identify a run in its report."""

    data: str
    model: str
    backbone: str
    seed: int
    epochs: int
    """Number of training epochs."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "RunLabel":
        return cls(cfg.data, cfg.model, cfg.backbone, cfg.seed, cfg.num_epochs)


def headline(label: RunLabel, data: DataBundle, method: Method) -> str:
    """Two lines that describe the run before it starts: its images, and its trained parameters.

    Args:
        label: identifies the run.
        data: the data of the run.
        method: the method of the run.
    """
    counts, params = data.info.class_counts, method.counts()
    sizes = f"{len(data.train):,} training images of {len(counts)} classes ({counts.max()} … {counts.min()} each)"
    trains = f"{params['tuner']:,} parameters of tuners and {params['trainable'] - params['tuner']:,} of the head"
    return (
        f"{label.data}: {sizes}, {len(data.test):,} test images\n"
        f"{label.model}: {label.backbone}, trains {trains} of {params['total']:,}"
    )


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
        "train": None if train is None else train_facts(train),
    }


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


def read_result(path: Path) -> dict[str, Any]:
    """Read a metrics.json that this version or an earlier version of TailTune has written.

    Args:
        path: the file.

    Returns:
        The content, in the layout of the present schema.

    Raises:
        Damaged: the file is missing or damaged, or is not the result of a run.
    """
    result = read_json(path)
    if not {"data", "model", "seed", "test"} <= result.keys():
        raise Damaged(path, "it is no result of a run")
    return upgraded(result)


def upgraded(result: dict[str, Any]) -> dict[str, Any]:
    """Convert the content of a metrics.json to schema 2.

    In schema 1, an entry of `distributions` or `dirichlet` held its predictors (`plain`, `sade`, `target_prior` …) and
    its other facts side by side. In schema 2 the predictors are in a mapping of their own, `predictors`.

    Args:
        result: content of a metrics.json of any schema.
    """
    if result.get("schema", 1) >= SCHEMA_VERSION:
        return result
    grouped: dict[str, Any] = {
        key: {name: _with_predictors(entry) for name, entry in result[key].items()}
        for key in ("distributions", "dirichlet")
        if key in result
    }
    return {**result, **grouped, "schema": SCHEMA_VERSION}


def _with_predictors(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Convert an entry of schema 1 to schema 2. A mapping with the key `accuracy` is a predictor."""
    predictors = {name: value for name, value in entry.items() if isinstance(value, dict) and "accuracy" in value}
    facts = {name: value for name, value in entry.items() if name not in predictors}
    return {**facts, "predictors": predictors}


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
    }


def table(metrics: dict[str, Any]) -> str:
    """Format a metrics.json for the terminal: one line for each evaluated split, then the test distributions."""
    split = "train" if metrics.get("evaluation", {}).get("test_train") else "test"
    rows = {title: metrics[name] for title, name in ((split, "test"), ("val", "val")) if name in metrics}
    width = max(len(name) for name in COLUMNS.values()) + 1
    head = " " * 6 + "".join(f"{title:>{width}}" for title in COLUMNS.values())
    lines = [f"{metrics['data']} · {metrics['model']} · seed {metrics['seed']}", head, "─" * len(head)]
    for title, values in rows.items():
        cells = (values[name] for name in COLUMNS)
        lines.append(f"{title:<6}" + "".join(f"{number(v):>{width}}" for v in cells))
    if "experts_used" in metrics["test"]:
        lines.append(usage_line(metrics["test"]["experts_used"]))
    lines += distribution_lines(metrics.get("distributions", {}))
    return "\n".join([*lines, *dirichlet_lines(metrics.get("dirichlet", {}))])


def usage_line(used: Mapping[str, Any]) -> str:
    """One line that says how often each expert was used (%), and how many operations that saved."""
    shares = ", ".join(f"{number}: {share:.1f} %" for number, share in enumerate(used["all"], start=1))
    return (
        f"experts asked about an image  {shares}; {used['gflops_per_image']:.3f} of "
        f"{used['gflops_all_experts']:.3f} GFLOPs, {used['saved_percent']:.1f} % saved"
    )


def distribution_lines(distributions: dict[str, Any]) -> list[str]:
    """Lines of the table of test distributions, with one row for each distribution.

    The columns hold the accuracy (%) of the unweighted experts, of adapted expert weights, and of `target_prior`.

    Args:
        distributions: the entry `distributions` of metrics.json: name → result.
    """
    if not distributions:
        return []
    every = [result["predictors"] for result in distributions.values()]
    adapts = sorted({name for predictors in every for name in predictors} - {"plain", "target_prior"})
    weighs = [name for name in adapts if all("weights" in predictors[name] for predictors in every)]
    wide = max(max(map(len, distributions)), 12) + 1
    columns = ["all", "many", "medium", "few", "expected", *(text for name in adapts for text in (name, "gain"))]
    aims = [predictors["target_prior"]["kind"] for predictors in every if "target_prior" in predictors]
    columns += [f"for {Path(aims[0]).stem}", "gain", "KL"] if aims else []
    head = f"{'distribution':<{wide}}{'images':>8}" + "".join(f"{name:>{max(9, len(name) + 2)}}" for name in columns)
    head += "   weights of the experts" if weighs else ""
    lines = ["", head, "─" * len(head)]
    for (title, result), predictors in zip(distributions.items(), every, strict=True):
        values = [predictors["plain"][name] for name in ("accuracy", *SHOT_GROUPS)] + [result["expected_accuracy"]]
        values += [predictors[name][key] for name in adapts for key in ("accuracy", "gain")]
        values += [predictors["target_prior"][key] for key in ("accuracy", "gain", "kl") if aims]
        texts = (number(v, 4 if name == "KL" else 2) for name, v in zip(columns, values, strict=True))
        cells = (f"{text:>{max(9, len(name) + 2)}}" for name, text in zip(columns, texts, strict=True))
        weights = (" ".join(f"{weight:.2f}" for weight in predictors[name]["weights"]) for name in weighs)
        lines.append("   ".join([f"{title:<{wide}}{result['n']:>8,}" + "".join(cells), *weights]))
    return lines


def dirichlet_lines(summary: dict[str, Any]) -> list[str]:
    """Lines of the table of test distributions that were drawn from Dirichlet distributions.

    Each cell is the mean ± standard deviation over the draws: of one component, or of all components.

    Args:
        summary: the entry `dirichlet` of metrics.json: component → result.
    """
    if not summary:
        return []
    titles = {name: COLUMNS[name] for name in ("accuracy", *SHOT_GROUPS)}
    wide = max(len(name) for part in summary.values() for name in ("draws", *part["predictors"])) + 2
    head = f"{'mean ± std':<12}{'draws':>5}  {'':<{wide}}" + "".join(f"{title:>15}" for title in titles.values())
    lines = ["", head, "─" * len(head)]
    single = len(summary) == 2  # then the entry "all" equals the entry of the only component
    for component, part in list(summary.items())[: 1 if single else None]:
        first = f"{component:<12}{part['draws']:>5}"
        for name, values in part["predictors"].items():
            cells = (f"{number(values[metric]['mean'])} ± {number(values[metric]['std'])}" for metric in titles)
            lines.append(f"{first}  {name:<{wide}}" + "".join(f"{cell:>15}" for cell in cells))
            first = " " * 17
    return lines


def number(value: float | None, decimals: int = 2) -> str:
    """A number as text with a fixed number of decimals; `n/a` for None, a value that could not be measured."""
    return "n/a" if value is None else f"{value:.{decimals}f}"


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
