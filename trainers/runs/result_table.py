"""Reads metrics.json, the result of a run, and formats it as a table for the terminal.

No module that this one imports needs torch, so a finished run is shown quickly.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tailtune.configs.console_text import Column, shortened, table_lines, wrapped
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
LEGEND = (
    "all: accuracy in %; mean: over the classes; many, medium, few: over classes with so many training images; worst: "
    "worst class; ECE: calibration error"
)
"""What the columns of the first table are."""


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
    """Format a metrics.json for the terminal: a row for each evaluated split, then the test distributions.

    No line has more than 80 columns. Results of older versions do not name the backbone.
    """
    split = "train" if metrics.get("evaluation", {}).get("test_train") else "test"
    rows = {title: metrics[name] for title, name in ((split, "test"), ("val", "val")) if name in metrics}
    about = [metrics["data"], metrics["model"], metrics.get("backbone"), f"seed {metrics['seed']}"]
    columns = [_column(title, [values[name] for values in rows.values()]) for name, title in COLUMNS.items()]
    lines = wrapped(" · ".join(filter(None, about)))
    lines += [*table_lines(Column("", list(rows)), [columns]), *wrapped(LEGEND)]
    if "experts_used" in metrics["test"]:
        lines += ["", *wrapped(usage_line(metrics["test"]["experts_used"]))]
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
    results = list(distributions.values())
    every = [result["predictors"] for result in results]
    plain = [predictors["plain"] for predictors in every]
    images = Column("images", [f"{result['n']:,}" for result in results])
    accuracies = [_column(COLUMNS[name], [values[name] for values in plain]) for name in ("accuracy", *SHOT_GROUPS)]
    groups = [[images, *accuracies, _column("expected", [result["expected_accuracy"] for result in results])]]
    legend = ["all … few: accuracy in % on these images", "expected: the mean of all over such test sets"]
    for name in sorted({name for predictors in every for name in predictors} - {"plain", "target_prior"}):
        adapted = [predictors[name] for predictors in every]
        groups.append([_column(name, [values["accuracy"] for values in adapted]), _gains(adapted)])
        legend.append(f"{name}: all, adapted to the images")
        if all("weights" in values for values in adapted):
            weights = zip(*(values["weights"] for values in adapted), strict=True)
            groups[-1] += [_column(f"w{number}", of_expert) for number, of_expert in enumerate(weights, start=1)]
            legend[-1] += " by the experts' weights w1 …"
    if any("target_prior" in predictors for predictors in every):
        aimed = [predictors["target_prior"] for predictors in every]
        title = shortened(f"for {Path(aimed[0]['kind']).stem}", 20)
        kl = _column("KL", [values["kl"] for values in aimed], decimals=4)
        groups.append([_column(title, [values["accuracy"] for values in aimed]), _gains(aimed), kl])
        legend.append(f"{title}: all, predicted for class frequencies")
        legend.append("KL: how far these are from the true ones (0: equal)")
    legend += ["gain: difference to all"] if len(groups) > 1 else []
    return ["", *table_lines(Column("distribution", list(distributions)), groups), *wrapped("; ".join(legend))]


def _column(title: str, values: Sequence[float | None], decimals: int = 2) -> Column:
    return Column(title, [number(value, decimals) for value in values])


def _gains(predictors: Sequence[Mapping[str, Any]]) -> Column:
    return _column("gain", [values["gain"] for values in predictors])


def dirichlet_lines(summary: dict[str, Any]) -> list[str]:
    """Lines of the table of test distributions that were drawn from Dirichlet distributions.

    Each cell is the mean ± standard deviation over the draws: of one component, or of all components.

    Args:
        summary: the entry `dirichlet` of metrics.json: component → result.
    """
    if not summary:
        return []
    single = len(summary) == 2  # then the entry "all" equals the entry of the only component
    rows: list[tuple[str, Mapping[str, Any]]] = []
    for component, part in list(summary.items())[: 1 if single else None]:
        rows.append((f"{component} ({part['draws']})", {}))
        rows += [(f"  {name}", values) for name, values in part["predictors"].items()]
    columns = [
        Column(COLUMNS[name], [_spread(values[name]) if values else "" for _, values in rows])
        for name in ("accuracy", *SHOT_GROUPS)
    ]
    lines = table_lines(Column("mean ± std", [title for title, _ in rows]), [columns])
    legend = "accuracy in %, mean ± standard deviation over randomly drawn test sets, whose number is in brackets"
    return ["", *lines, *wrapped(legend)]


def _spread(value: Mapping[str, float | None]) -> str:
    return f"{number(value['mean'])} ± {number(value['std'])}"


def number(value: float | None, decimals: int = 2) -> str:
    """A number as text with a fixed number of decimals; `n/a` for None, a value that could not be measured."""
    return "n/a" if value is None else f"{value:.{decimals}f}"
