"""Our folders `datasets` and `models` have names of other packages; below `tailtune` both can live in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, offline
from tiers import slow_except

OTHERS = {"datasets": "class Dataset: ...\nclass IterableDataset: ...\nMINE = 1\n", "models": "MINE = 1\n"}
"""Packages of other people: of Hugging Face's `datasets` what Accelerate imports from it."""


BEFORE = {
    "main.py": "import runpy; runpy.run_path('main.py', run_name='main')",
    "a module of ours": "from tailtune.datasets.build_data import build_data",
    "tailtune": "import tailtune",
}
"""What is imported of ours → the code, which runs in the checkout, so that our folders would be found first."""


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code in the checkout."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=offline(**variables), capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("before", slow_except({"main.py"}, BEFORE))
def test_other_packages_of_these_names_are_found(before: str, tmp_path: Path) -> None:
    for name, text in OTHERS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    code = f"{BEFORE[before]}; import datasets, models; print(datasets.MINE + models.MINE)"
    done = python(code, PYTHONPATH=str(tmp_path))
    assert done.stdout.strip().endswith("2"), done.stderr


def test_a_spawned_process_imports_us() -> None:
    """Workers of a loader are spawned where the system does not fork; they import main.py again, and find our code."""
    done = python(
        "import tailtune, sys, multiprocessing\n"
        "from tailtune.configs.seeding import derive_seed\n"
        "sys.modules['__main__'].__file__ = 'main.py'\n"
        "child = multiprocessing.get_context('spawn').Process(target=derive_seed, args=(1, 'order'))\n"
        "child.start(); child.join(); sys.exit(child.exitcode)"
    )
    assert done.returncode == 0, done.stderr


def test_modules_have_one_name_only() -> None:
    """Nothing of ours was imported below its bare name, so no class exists twice."""
    assert "tailtune.datasets" in sys.modules
    found = {name for name in sys.modules if name.partition(".")[0] in ("configs", "datasets", "models", "trainers")}
    assert not found
