"""How the code hangs together: which package may import which, how long things get, what never appears."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainers.methods import METHODS

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "configs": {"configs"},
    "datasets": {"configs", "datasets"},
    "models": {"configs", "models"},
    "trainers": {"configs", "datasets", "models", "trainers"},
    "main": {"configs", "datasets", "models", "trainers"},
}
"""Package → what of ours it may import: configs ← datasets, models ← trainers ← main."""

FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")) + [ROOT / "main.py"]
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 260, 45
PICKLES = r"pickle\.(dump|load)|torch\.save\(|\.save_state\("
TRAPS = {
    r"(?<![\w.])eval\(": "a config string must never become code",
    r"(?<![\w.])exec\(": "a config string must never become code",
    r"\.cuda\(": "devices come from Accelerate; a loss gets tensors",
    PICKLES: "nothing is pickled: safetensors and JSON",
    r"weights_only=False": "a weights file could run code",
    r"from torchvision import datasets": "that name is our own package; write torchvision.datasets",
    r"^\s*import datasets\b(?!\.)": "reads as Hugging Face's package; import what is needed from it",
}
EXCEPTIONS = {("trainers/exchange/lift.py", PICKLES): "LIFT reads nothing but a pickle; it is one of plain tensors"}
NAMESAKES = {("adapt.py", "sade")}
"""Entries of other tables of trainers/ that are called like a method: SADE has both."""
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())


def imports(tree: ast.AST) -> Iterator[str]:
    """Top-level names of all imports, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            yield node.module.split(".")[0]


def test_the_files_are_found() -> None:
    assert len(FILES) > 30


@each_file
def test_dependencies_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    ours = set(imports(ast.parse(path.read_text(encoding="utf-8")))) & set(MAY_IMPORT)
    assert ours <= MAY_IMPORT[package], f"{package} must not import {ours - MAY_IMPORT[package]}"


@each_file
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {length} lines"


@each_file
@pytest.mark.parametrize("trap", TRAPS)
def test_traps(path: Path, trap: str) -> None:
    # Inference mode (`.eval()`) is a method call and no trap; docstrings may name what code must not do.
    tree = ast.parse(path.read_text(encoding="utf-8"))
    code = "\n".join(_without_docstrings(tree).splitlines())
    excepted = (path.relative_to(ROOT).as_posix(), trap) in EXCEPTIONS
    assert bool(re.search(trap, code, re.MULTILINE)) == excepted, TRAPS[trap]


@pytest.mark.parametrize("path", [p for p in FILES if p.parts[-2] == "trainers"], ids=lambda path: path.name)
def test_the_trainer_names_no_method(path: Path) -> None:
    """What a method needs stands in its file; the rest of trainers/ asks the method."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = node.value in METHODS and (path.name, node.value) not in NAMESAKES
            assert not named, f"line {node.lineno} names the method '{node.value}'"


def test_every_module_says_what_it_is_for() -> None:
    silent = [path for path in FILES if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    assert not silent


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)
