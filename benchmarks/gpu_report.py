"""`Report`: the results of `benchmarks/gpu.py` as JSON and as a Markdown page, written again after each row."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tailtune.benchmarks.gpu_steps import GIB, Facts
from tailtune.trainers.storage.atomic_io import write_bytes, write_json


def _number(key: str, format: str, scale: float = 1.0) -> Callable[[Facts], str]:
    return lambda facts: "" if facts.get(key) is None else f"{facts[key] * scale:{format}}"


def _memory(facts: Facts) -> str:
    return " / ".join(f"{facts[key] / GIB:.2f}" for key in ("allocated", "reserved") if facts.get(key) is not None)


def _outcome(facts: Facts) -> str:
    """The status where nothing was measured; the missed targets."""
    found = [facts["status"]] if facts["status"] != "measured" else []
    if "passed" in facts:
        found.append(f"{facts['passed']} passed, {len(facts['failed'])} failed, {facts['skipped']} skipped")
        found.append(f"{facts['tests_took']:.0f} s{'' if facts['complete'] else ', then stopped'}")
    return "; ".join([*found, *([facts["why"]] if "why" in facts else []), *facts.get("missed", [])]).replace("|", "/")


COLUMNS: Mapping[str, Callable[[Facts], str]] = {
    "batch": _number("batch", ".0f"),
    "ms": _number("seconds", ".1f", 1e3),
    "images/s": _number("images_per_second", ".0f"),
    "GiB allocated / reserved": _memory,
    "GFLOPs of a step": _number("flops", ".1f", 1e-9),
    "MFU %": _number("mfu", ".1f", 100),
    "original": lambda facts: facts.get("original") or "",
    "images/s of it": _number("original_images_per_second", ".0f"),
    "GiB of it": _number("original_allocated", ".2f", 1 / GIB),
    "ratio": _number("ratio", ".2f"),
    "waits": lambda facts: str(len(facts["waits"])) if "waits" in facts else "",
    "outcome": _outcome,
}
"""Title of a column → its text for the facts of a row."""


class Report:
    """What was measured so far.

    Args:
        path: the JSON file. The page is beside it, with the ending `.md`.
        facts: how it was measured.
        names: all rows, which are "not run" at first.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any], names: Sequence[str]) -> None:
        self.path, self.page, self.facts = path, path.with_suffix(".md"), facts
        self.rows: dict[str, Facts] = {name: {"status": "not run"} for name in names}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, name: str, facts: Facts) -> None:
        """Note the facts of a row, print them, and write both files."""
        self.rows[name] = facts
        self._write()
        cells = {title: text(facts) for title, text in COLUMNS.items()}
        print(f"{name}: " + ", ".join(f"{title} {cell}" for title, cell in cells.items() if cell), flush=True)

    def misses(self) -> bool:
        """Whether a row has failed or missed a target."""
        return any(facts["status"] == "failed" or facts.get("missed") for facts in self.rows.values())

    def _write(self) -> None:
        write_json(self.path, {**self.facts, "rows": self.rows})
        write_bytes(self.page, self._markdown().encode())

    def _markdown(self) -> str:
        lines = [f"`python benchmarks/gpu.py {self.facts['command']}`; commit {self.facts['commit']};"]
        lines += [f"{self.facts['hardware']}; torch {self.facts['torch']}.", ""]
        lines += [f"| row | {' | '.join(COLUMNS)} |", "|" + "---|" * (len(COLUMNS) + 1)]
        for name, facts in self.rows.items():
            lines.append(f"| {name} | {' | '.join(text(facts) for text in COLUMNS.values())} |")
        waiting = {name: facts["waits"] for name, facts in self.rows.items() if facts.get("waits")}
        for name, places in waiting.items():
            lines += ["", f"{name} waits for the GPU at:", *(f"- `{place}`" for place in dict.fromkeys(places))]
        return "\n".join(lines) + "\n"
