"""docs/parity.json: the report of `lift` at the top level, each other report below its subject's name."""

import json
import subprocess
from pathlib import Path
from typing import Any

from tailtune.configs.errors import UserError
from tailtune.trainers.runs.metrics_file import circumstances

PARITY = Path(__file__).resolve().parent.parent / "docs" / "parity.json"
TOP = "lift"
"""The subject whose report is not below a name of its own."""
MARK = "\x00"
"""Stands for a list of cases while the rest is formatted."""


def write(report: dict[str, Any], subject: str, path: Path = PARITY) -> None:
    """Put the report of a subject into the file and leave the others as they are.

    Args:
        report: what the subject's part of the file should hold; `cases` is the list of rows.
        subject: name of the subject.
        path: the file; it need not exist.
    """
    old = json.loads(path.read_text()) if path.exists() else {}
    others = {name: part for name, part in old.items() if isinstance(part, dict) and "cases" in part}
    path.write_text(formatted({**report, **others} if subject == TOP else {**old, subject: report}))


def formatted(reports: dict[str, Any]) -> str:
    """JSON with one case a line and figures to two significant digits."""
    lists: list[str] = []

    def without_cases(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        cases = value.get("cases")
        if isinstance(cases, list):
            lists.append(",\n".join(f"  {json.dumps(_rounded(row))}" for row in cases))
            value = {**value, "cases": MARK}
        return {name: without_cases(part) for name, part in value.items()}

    text = json.dumps(without_cases(reports), indent=1)
    for lines in lists:
        text = text.replace(json.dumps(MARK), f"[\n{lines}\n ]", 1)
    return text + "\n"


def about_our_side() -> dict[str, Any]:
    """Our commit, the packages and the hardware that the figures were computed with."""
    facts = circumstances()
    return {"ours": facts["commit"], "packages": facts["packages"], "hardware": facts["hardware"]}


def commit_of(checkout: Path) -> str:
    """The commit of a checkout.

    Raises:
        UserError: the folder is no git repository.
    """
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{checkout} is no git repository; name the commit of its code with --commits")
    return done.stdout.strip()


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.1e}") if isinstance(value, float) else value for name, value in row.items()}
