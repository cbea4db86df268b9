"""Reads metrics.json, the result of a run, and formats it as a table for the terminal.

No module that this one imports needs torch, so a finished run is shown quickly.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.trainers.storage.atomic_io import Damaged
from tailtune.trainers.storage.manifest import read_json

SCHEMA_VERSION = 2
"""Version of the layout of metrics.json: which entries the file has, and at which place."""
REPORTS = ("report.html", "predictions.csv", "figures")
"""Files and the folder of a report, beside metrics.json. They can be made again from the other files."""
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
