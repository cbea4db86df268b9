"""Our folders `datasets` and `models` have names of other packages; below `tailtune` both can live in one process."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, offline

OTHERS = {"datasets": "class Dataset: ...\nclass IterableDataset: ...\nMINE = 1\n", "models": "MINE = 1\n"}
"""Packages of other people: of Hugging Face's `datasets` what Accelerate imports from it."""


@pytest.mark.parametrize("where", ["main.py", "a module of ours", pytest.param("python -c", marks=pytest.mark.slow)])
def test_other_packages_of_these_names_are_found(where: str, tmp_path: Path) -> None:
    packages, code = tmp_path / "packages", "import datasets, models; print(datasets.MINE + models.MINE)"
    for name, text in OTHERS.items():
        (packages / name).mkdir(parents=True)
        (packages / name / "__init__.py").write_text(text)
    words = {
        "main.py": ["-c", f"import runpy, sys; sys.argv = ['main.py', '--list']; sys.path[0] = {str(ROOT)!r}\n"
                          f"try: runpy.run_path({str(ROOT / 'main.py')!r}, run_name='main')\nfinally: pass\n{code}"],
        "a module of ours": ["-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
                                   f"from tailtune.datasets import build_data; {code}"],
        "python -c": ["-c", f"import tailtune; {code}"],
    }[where]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=offline(PYTHONPATH=str(packages)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip().endswith("2"), done.stderr


def test_modules_have_one_name_only() -> None:
    """Nothing of ours was imported below its bare name, so no class exists twice."""
    assert "tailtune.datasets" in sys.modules
    found = {name for name in sys.modules if name.partition(".")[0] in ("configs", "datasets", "models", "trainers")}
    assert not found
