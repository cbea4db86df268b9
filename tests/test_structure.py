"""How the code hangs together: which package may import which, how long things get, what never appears."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tailtune.trainers.methods import METHODS

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "configs": set(),
    "datasets": {"configs"},
    "models": {"configs"},
    "trainers": {"configs", "datasets", "models"},
    "main": {"configs", "datasets", "trainers"},
}
"""Package → which others it may import: configs ← datasets, models ← trainers ← main."""
ROOMS = {
    "datasets": {
        "images": set(),
        "sources": {"images", "long_tail"},
        "splits": {"images", "sources", "long_tail", "data_settings"},
        "loading": {"view"},
        "commands": {"images", "sources", "splits", "long_tail", "data_settings", "table"},
        "test_distributions": {"data_bundle", "sources", "long_tail", "data_settings"},
    },
    "models": {"backbones": set(), "heads": {"backbones"}, "tuners": {"backbones"}},
    "trainers": {
        "storage": set(),
        "processes": set(),
        "methods": {"storage", "losses"},
        "foreign_checkpoints": {"methods", "storage"},
        "export": {"foreign_checkpoints", "methods", "storage"},
        "report": {"export", "runs", "storage"},
        "runs": {
            "distributed",
            "export",
            "feature_store",
            "foreign_checkpoints",
            "head_preparation",
            "methods",
            "storage",
        },
        "comparison": {"evaluation", "methods", "runs", "storage"},
        "evaluation": {
            "distributed",
            "feature_store",
            "head_preparation",
            "methods",
            "precision",
            "progress",
            "report",
            "runs",
            "storage",
        },
        "prediction": {"evaluation", "storage"},
        "serving": set(),
    },
}
"""Package → room (a folder of it) → which rooms and modules of the same package it may import."""
PACKAGES = tuple(MAY_IMPORT)

FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py")) + [ROOT / "main.py"]
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 300, 45
PICKLES = r"pickle\.(dump|load)|torch\.save\(|\.save_state\("
TRAPS = {
    r"(?<![\w.])eval\(": "a config string must never become code",
    r"(?<![\w.])exec\(": "a config string must never become code",
    r"\.cuda\(": "devices come from Accelerate; a loss gets tensors",
    PICKLES: "nothing is pickled: safetensors and JSON",
    r"weights_only=False": "a weights file could run code",
}
EXCEPTIONS = {"trainers/export/lift_format.py": "LIFT reads nothing but a pickle; it is one of plain tensors"}
NAMESAKES = {("adaptation_table.py", "sade")}
"""Entries of other tables of trainers/ that are called like a method: SADE has both."""


@cache
def tree_of(path: Path) -> ast.Module:
    """The syntax tree of a file, which nobody may change."""
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, without `tailtune.`, those inside functions too."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            assert name.split(".")[0] not in PACKAGES, f"{path} imports {name}: write tailtune.{name}"
            if name.startswith("tailtune."):
                yield name.removeprefix("tailtune.")


def test_the_files_are_found() -> None:
    assert len(FILES) > 100


def test_imports_between_packages_point_one_way() -> None:
    for path in FILES:
        package = path.relative_to(ROOT).parts[0].removesuffix(".py")
        ours = {name.split(".")[0] for name in imports(path)} - {package}
        assert ours <= MAY_IMPORT[package], f"{path}: {package} must not import {ours - MAY_IMPORT[package]}"


def test_imports_between_rooms_point_one_way() -> None:
    for package, rooms in ROOMS.items():
        found = {path.name for path in (ROOT / package).iterdir() if (path / "__init__.py").exists()}
        assert found == rooms.keys()
        for room, may in rooms.items():
            for path in (ROOT / package / room).rglob("*.py"):
                inner = {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.")} - {room}
                assert inner <= may, f"{path}: {package}/{room} must not import {inner - may}"


def test_only_the_builder_of_the_data_sees_the_config() -> None:
    """The builder takes the config, and `of` of the settings reads it; no other module of datasets/ does."""
    allowed = {
        "datasets/build_data.py",
        "datasets/build_records.py",
        "datasets/data_settings.py",
        "datasets/run_transforms.py",
        "datasets/test_distributions/settings.py",
    }
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
    assert {name for name, text in files.items() if name.startswith("datasets/") and "CfgNode" in text} == allowed


def test_the_table_of_rooms_has_no_circle() -> None:
    for rooms in ROOMS.values():
        TopologicalSorter(rooms).prepare()  # raises CycleError


def test_files_and_functions_stay_short() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MOST_LINES, path
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                assert length <= MOST_LINES_OF_A_FUNCTION, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("trap", TRAPS)
def test_traps(trap: str) -> None:
    # Inference mode (`.eval()`) is a method call and no trap; docstrings may name what code must not do.
    found = {path.relative_to(ROOT).as_posix() for path in FILES if re.search(trap, code_of(path), re.MULTILINE)}
    assert found == (EXCEPTIONS.keys() if trap == PICKLES else set()), TRAPS[trap]


def test_the_trainers_name_no_method() -> None:
    """What a method needs stands in its file; the rest of trainers/ asks the method."""
    for path in (path for path in FILES if path.is_relative_to(ROOT / "trainers") and path.parent.name != "methods"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = node.value in METHODS and (path.name, node.value) not in NAMESAKES
                assert not named, f"{path} line {node.lineno} names the method '{node.value}'"


SEES_THE_CONFIG = {
    **dict.fromkeys(("run.py", "export_run.py", "dry_run.py", "config_checks.py"), "an entry: it calls the builders"),
    "dry_run_report.py": "it prints what a config says",
    **dict.fromkeys(("python_api.py", "trained_model.py", "labeller.py"), "an entry: it calls the builders"),
    "methods/__init__.py": "build_method, a builder",
    "optimizers_and_schedules.py": "Plan.of and the checks of its options",
    "flat_minima.py": "the checks of its options",
    "micro_batch_size.py": "it is computed from three options and the number of processes",
    "more_epochs.py": "it makes a digest of all training options",
    "runs/files_read.py": "it finds the files that options name",
    "runs/longer_run.py": "it compares a command with a stored config",
    "runs/kept_epoch.py": "it puts the kept epoch into the config of a run",
    "runs/load_run.py": "it builds the models of finished runs",
    "runs/class_prior.py": "it builds the models of finished runs without weights",
    "runs/run_folder.py": "it writes config.yaml and compares a command with it",
    "stored_result.py": "an entry: it shows the result of a finished run",
    "export/run_command.py": "it writes a config as a command",
    "evaluation/zero_shot_ensembles.py": "it builds the zero-shot classifier of a run's config",
}
"""File of trainers/ whose functions may take a whole config → why. Elsewhere only a dataclass's `of` reads one."""


def test_a_config_is_seen_by_few() -> None:
    trainers, seen = ROOT / "trainers", set()
    for path in (path for path in FILES if path.is_relative_to(trainers)):
        name = path.relative_to(trainers).as_posix()
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef):
                kinds = [ast.unparse(each.annotation) for each in node.args.args if each.annotation is not None]
                if "CfgNode" in kinds and node.name != "of":
                    seen.add(name)
    assert seen == SEES_THE_CONFIG.keys()


def test_every_module_says_what_it_is_for() -> None:
    silent = [path for path in FILES if not ast.get_docstring(tree_of(path))]
    assert not silent


@cache
def code_of(path: Path) -> str:
    """The code of a file, without docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))  # it is changed
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            kept = [each for each in body if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


def private_names() -> set[str]:
    """Names with an underscore that our packages define: functions, classes, constants, attributes of an object."""
    found = set()
    for node in (node for path in FILES for node in ast.walk(tree_of(path))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if re.match(r"_[a-zA-Z]", name)}


def test_no_test_reads_a_private_name() -> None:
    """What cannot be seen by public names may change without a test. Names of other packages are not ours."""
    ours = private_names()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                assert node.attr not in ours or own, f"{path.name}:{node.lineno}: {node.attr}"
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tailtune"):
                names = {alias.name for alias in node.names}
                assert not names & ours, f"{path.name}:{node.lineno}: {names & ours}"
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("tailtune."):
                assert node.value.rpartition(".")[2] not in ours, f"{path.name}:{node.lineno}: {node.value}"
