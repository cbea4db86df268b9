"""The report of a run: metrics.json, which is written and read here, and the table in the terminal."""

import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailtune.configs import CfgNode
from tailtune.datasets import DataBundle, DataInfo
from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.trainers.distributed import uses_cuda, world_size
from tailtune.trainers.methods.base import Method
from tailtune.trainers.storage.atomic_io import Damaged, Digest, write_json
from tailtune.trainers.storage.checkpoint import package_versions
from tailtune.trainers.storage.manifest import read_json

SCHEMA_VERSION = 2
"""Of metrics.json: which entries it has, and where they stand."""

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


@dataclass
class TrainReport:
    """What training took; survives an interruption."""

    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    images: int = 0
    bad_images: int = 0
    skipped_steps: int = 0
    """Updates that loss scaling left out because a gradient overflowed."""
    peak_memory_bytes: int | None = None


@dataclass(frozen=True)
class RunLabel:
    """What a run is called by."""

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
    """What is about to run, in two lines."""
    counts, params = data.info.class_counts, method.counts()
    sizes = f"{len(data.train):,} training images of {len(counts)} classes ({counts.max()} … {counts.min()} each)"
    trains = f"{params['tuner']:,} parameters of tuners and {params['trainable'] - params['tuner']:,} of the head"
    return (
        f"{label.data}: {sizes}, {len(data.test):,} test images\n"
        f"{label.model}: {label.backbone}, trains {trains} of {params['total']:,}"
    )


def summary(label: RunLabel, info: DataInfo, method: Method, train: TrainReport | None, prec_used: str) -> dict:
    """metrics.json of a trained run, without its evaluation and notes."""
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
    """With what it was computed."""
    return {"commit": commit(), "packages": package_versions(), "hardware": hardware()}


def write_metrics(folder: Path, result: dict[str, Any]) -> dict[Path, Digest]:
    """Write metrics.json.

    Args:
        folder: of the run, or of another evaluation of it.
        result: its content.

    Returns:
        The file → its digest.
    """
    path = folder / "metrics.json"
    return {path: write_json(path, result)}


def read_result(path: Path) -> dict[str, Any]:
    """A metrics.json, of this version or an earlier one.

    Raises:
        UserError: it is torn, or something else.
    """
    result = read_json(path)
    if not {"data", "model", "seed", "test"} <= result.keys():
        raise Damaged(path, "it is no result of a run")
    return upgraded(result)


def upgraded(result: dict[str, Any]) -> dict[str, Any]:
    """A result of any schema in the form of schema 2.

    In schema 1 the predictors of a distribution (`plain`, `sade`, `target_prior` …) stood beside its facts; schema 2
    has them in one mapping, `predictors`, in `distributions` and in `dirichlet`.
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
    """An entry of schema 1 in the form of schema 2; a predictor is what has an accuracy."""
    predictors = {name: value for name, value in entry.items() if isinstance(value, dict) and "accuracy" in value}
    facts = {name: value for name, value in entry.items() if name not in predictors}
    return {**facts, "predictors": predictors}


def train_facts(train: TrainReport) -> dict[str, Any]:
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
    """The result, a line for each evaluated split."""
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
    """The report for people, in one line."""
    shares = ", ".join(f"{number}: {share:.1f} %" for number, share in enumerate(used["all"], start=1))
    return (
        f"experts asked about an image  {shares}; {used['gflops_per_image']:.3f} of "
        f"{used['gflops_all_experts']:.3f} GFLOPs, {used['saved_percent']:.1f} % saved"
    )


def distribution_lines(distributions: dict[str, Any]) -> list[str]:
    """A table of the test distributions: by the mean of the experts, by adapted weights and for `target_prior`."""
    if not distributions:
        return []
    every = [result["predictors"] for result in distributions.values()]
    adapts = sorted({name for predictors in every for name in predictors} - {"plain", "target_prior"})
    weighs = [name for name in adapts if all("weights" in predictors[name] for predictors in every)]
    wide = max(max(map(len, distributions)), 12) + 1
    columns = ["all", "many", "medium", "few", "expected", *(text for name in adapts for text in (name, "gain"))]
    aims = [predictors["target_prior"]["kind"] for predictors in every if "target_prior" in predictors]
    columns += [f"for {Path(aims[0]).stem}", "gain", "KL"] if aims else []
    head = f"{'distribution':<{wide}}{'images':>8}" + "".join(f"{each:>{max(9, len(each) + 2)}}" for each in columns)
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
    """A table of the drawn test distributions: mean ± deviation over the draws of each component, and over all."""
    if not summary:
        return []
    titles = {name: COLUMNS[name] for name in ("accuracy", *SHOT_GROUPS)}
    wide = max(len(name) for part in summary.values() for name in ("draws", *part["predictors"])) + 2
    head = f"{'mean ± std':<12}{'draws':>5}  {'':<{wide}}" + "".join(f"{each:>15}" for each in titles.values())
    lines = ["", head, "─" * len(head)]
    single = len(summary) == 2  # then "all" says the same
    for component, part in list(summary.items())[: 1 if single else None]:
        first = f"{component:<12}{part['draws']:>5}"
        for name, values in part["predictors"].items():
            cells = (f"{number(values[metric]['mean'])} ± {number(values[metric]['std'])}" for metric in titles)
            lines.append(f"{first}  {name:<{wide}}" + "".join(f"{cell:>15}" for cell in cells))
            first = " " * 17
    return lines


def number(value: float | None, decimals: int = 2) -> str:
    """For people: two decimals, `n/a` for what could not be measured."""
    return "n/a" if value is None else f"{value:.{decimals}f}"


def commit() -> str | None:
    """The toolkit's git commit, `-dirty` with local changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        described = ["git", "-C", str(here), "describe", "--always", "--abbrev=40", "--dirty", "--exclude", "*"]
        found = subprocess.run(described, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def hardware() -> str:
    """What it ran on, in words."""
    times = f"{world_size()} × " if world_size() > 1 else ""
    if uses_cuda():
        return f"{times}{torch.cuda.get_device_name()}"
    return f"{times}CPU ({_cpu()}, {torch.get_num_threads()} threads)"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
