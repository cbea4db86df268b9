"""The examples of docs/contributing.md, taken literally: parsed, and applied to a copy of the project."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "contributing.md"
PLACES = ("a new file", "at the end", "before", "in")
_BLOCK = re.compile(
    r"^```\w+\n# (?P<file>[\w/.]+), (?P<place>a new file|at the end|before (?P<before>\w+)|in (?P<into>\w+))\n(?P<code>.*?)^```",
    re.S | re.M,
)


@dataclass(frozen=True)
class Example:
    """A part of a kind that a contributor adds."""

    kind: str
    """As the table of the page calls it."""
    files: tuple[str, ...]
    """Which files the table of the page says it touches."""
    blocks: tuple[re.Match[str], ...]

    def apply(self, root: Path) -> None:
        """Write every block to its place in a copy of the project."""
        for block in self.blocks:
            path = root / block["file"]
            if block["place"] == "a new file":
                assert not path.exists(), path
                path.write_text(block["code"], encoding="utf-8")
            else:
                text = path.read_text(encoding="utf-8")
                path.write_text(_inserted(text, block), encoding="utf-8")


def examples() -> list[Example]:
    """The examples of the page, in its order."""
    text = PAGE.read_text(encoding="utf-8")
    touched = {
        row[1]: tuple(re.findall(r"`([^`]+)`", row[2]))
        for row in re.finditer(r"^\| ([\w -]+) \| (`\S+/.*?) \|", text, re.M)
    }
    found = []
    for heading, section in re.findall(r"^## An? ([\w -]+)\n(.*?)(?=^## |\Z)", text, re.S | re.M):
        blocks = tuple(_BLOCK.finditer(section))
        if blocks:
            found.append(Example(heading, touched[heading], blocks))
    return found


def _inserted(text: str, block: re.Match[str]) -> str:
    """A module with a block in it. Imports go to the others; what they import may be sorted by ruff later."""
    lines = text.splitlines()
    code = block["code"].splitlines()
    imports = [line for line in code if line.startswith(("import ", "from "))]
    code = [line for line in code if line not in imports]
    body = ast.parse(text).body
    if block["into"]:
        place, column = _end_of_table(body, block["into"])
        lines[place:place] = [" " * column + line for line in code]
    else:
        place = len(lines) if block["place"] == "at the end" else _statement(body, block["before"]).lineno - 1
        lines[place:place] = (
            [*[""] * 2 * (place == len(lines)), *"\n".join(code).strip().splitlines(), *[""] * 2 * (place < len(lines))]
            if any(code)
            else []
        )
    last = max((node.end_lineno or 0) for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    lines[last:last] = imports
    return "\n".join(lines) + "\n"


def _statement(body: list[ast.stmt], name: str) -> ast.stmt:
    """The statement that assigns a table."""
    for node in body:
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return node
    raise AssertionError(f"no table {name}")


def _end_of_table(body: list[ast.stmt], name: str) -> tuple[int, int]:
    """Behind which line a new entry goes, and its indentation."""
    table = next(node for node in ast.walk(_statement(body, name)) if isinstance(node, ast.Dict))
    key = table.keys[-1]
    assert key is not None and table.values[-1].end_lineno is not None
    return table.values[-1].end_lineno, key.col_offset
