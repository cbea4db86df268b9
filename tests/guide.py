"""The examples of docs/contributing.md, taken literally: parsed, and applied to a copy of the project."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "contributing.md"
_BLOCK = re.compile(
    r"^```\w+\n# (?P<file>[\w/.]+), "
    r"(?P<place>a new file|at the end|before (?P<before>\w+)|in (?P<into>\w+))\n(?P<code>.*?)^```",
    re.DOTALL | re.MULTILINE,
)
_ROW = re.compile(r"^\| ([\w -]+) \| (`\S+/.*?) \|", re.MULTILINE)


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
    touched = {row[1]: tuple(re.findall(r"`([^`]+)`", row[2])) for row in _ROW.finditer(text)}
    found = []
    for heading, section in re.findall(r"^## An? ([\w -]+)\n(.*?)(?=^## |\Z)", text, re.S | re.M):
        blocks = tuple(_BLOCK.finditer(section))
        if blocks:
            found.append(Example(heading, touched[heading], blocks))
    return found


def _inserted(text: str, block: re.Match[str]) -> str:
    """A module with a block in it. Its imports follow the module's; `make format` sorts them."""
    lines, body = text.splitlines(), ast.parse(text).body
    code = block["code"].splitlines()
    imports = [line for line in code if line.startswith(("import ", "from "))]
    code = "\n".join(line for line in code if line not in imports).strip().splitlines()
    if block["into"]:
        table = _table(body, block["into"])
        indent = " " * _keys_of(table)[-1].col_offset
        assert table.end_lineno is not None
        place = table.end_lineno - 1  # before the closing brace
        code = [indent + line for line in code]
    elif block["before"]:
        place = _assignment(body, block["before"]).lineno - 1
        code = [*code, "", ""] if code else []
    else:
        place = len(lines)
        code = ["", "", *code]
    lines[place:place] = code
    last = max(node.end_lineno or 0 for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    lines[last:last] = imports
    return "\n".join(lines) + "\n"


def _assignment(body: list[ast.stmt], name: str) -> ast.Assign | ast.AnnAssign:
    """The statement that defines a table."""
    for node in body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node
    raise AssertionError(f"no table {name}")


def _table(body: list[ast.stmt], name: str) -> ast.Dict:
    return next(node for node in ast.walk(_assignment(body, name)) if isinstance(node, ast.Dict))


def _keys_of(table: ast.Dict) -> list[ast.expr]:
    return [key for key in table.keys if key is not None]
