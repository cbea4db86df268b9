"""docs/parity.json: the report of parity_lift.py at the top level, those of the others below, each a part."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tailtune.trainers.runs.report import circumstances

PARITY = Path(__file__).parent.parent / "docs" / "parity.json"
EXPERTS = "experts"
DIRMIXE = "dirmixe"
H2T = "h2t"
MARK = "\x00"


def write(report: dict[str, Any], part: str | None = None, path: Path = PARITY) -> None:
    """Put a report in its place and leave the others'; one case a line, figures to two significant digits."""
    old = json.loads(path.read_text()) if path.exists() else {}
    others = {name: each for name, each in old.items() if isinstance(each, dict) and "cases" in each}
    whole = {**report, **others} if part is None else {**old, part: report}
    rows: list[str] = []

    def folded(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        lines = value.get("cases")
        if isinstance(lines, list):
            rows.append(",\n".join(f"  {json.dumps(_short(row))}" for row in lines))
            value = {**value, "cases": MARK}
        return {key: folded(each) for key, each in value.items()}

    text = json.dumps(folded(whole), indent=1)
    for lines in rows:
        text = text.replace(json.dumps(MARK), f"[\n{lines}\n ]", 1)
    path.write_text(text + "\n")


def run_original(script: str, words: list[str], checkout: Path, **environment: str) -> None:
    """Run a script of benchmarks/ in an original's checkout, in a process of its own and without a GPU."""
    command = [sys.executable, str(Path(__file__).parent / script), *words]
    surroundings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **environment}
    done = subprocess.run(command, cwd=checkout, env=surroundings, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the original stopped ({script} {' '.join(words[1:])}):\n{done.stderr[-3000:]}")


def circumstances_of_figures() -> dict[str, Any]:
    """With what figures were computed."""
    about = circumstances()
    return {"ours": about["commit"], "packages": about["packages"], "hardware": about["hardware"]}


def head(checkout: Path) -> str:
    """The commit of a checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _short(row: dict[str, Any]) -> dict[str, Any]:
    return {k: float(f"{v:.1e}") if isinstance(v, float) else v for k, v in row.items()}
