"""The examples of docs/contributing.md run as they stand there: in a copy of the project, one after another."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from guide import ROOT, Example, examples

MOST_LINES = 40
"""Of the example of a method, with its line in the table and its config."""
CONTRACTS = ("test_contract.py", "test_options.py", "test_shipped_configs.py")
"""Test files that run over the tables; the default tier runs wholly after the last example."""
KINDS = {each.kind: each for each in examples()}
RUNS = {
    "loss": "loss_type Poly poly.epsilon 2",
    "tuner": "scale_norm1 True",
    "head": "classifier PoweredClassifier poweredclassifier.tau 0.7 init_head none",
    "sampler": "sampler square_root",
    "test-time adaptation": "adapt tent tent.lr 0.01 test_dists uniform,backward5",
    "target prior": "target_prior square_root test_dists uniform,backward5",
}
"""Part → options with which a run uses it. The method has a config of its own, and the data set needs a download."""


def test_every_kind_has_an_example() -> None:
    assert KINDS.keys() == {*RUNS, "method", "data set"}


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_touches_the_files_that_the_page_names(kind: str) -> None:
    example = KINDS[kind]
    assert {block["file"] for block in example.blocks} == set(example.files)
    most = {"loss": 1, "tuner": 2, "sampler": 1, "target prior": 1}.get(kind, 2)
    assert len([file for file in example.files if not file.startswith("configs/")]) <= most


def test_the_example_of_a_method_is_short() -> None:
    assert sum(len(block["code"].splitlines()) for block in KINDS["method"].blocks) <= MOST_LINES


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project's files, without what git ignores."""
    root = tmp_path_factory.mktemp("guide") / "tailtune"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in files.splitlines():
        if (ROOT / file).is_file():
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, root / file)
    yield root
    shutil.rmtree(root)


def python(root: Path, *arguments: str) -> str:
    """Run Python in a copy; returns its output. The test fails with the output where the program does."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-6000:]}{done.stderr[-3000:]}"
    return done.stdout


def trained(root: Path, model: str, options: str) -> dict[str, object]:
    """Train for two steps in a copy; returns metrics.json."""
    quick = "max_steps 2 batch_size 16 micro_batch_size 16 num_workers 0 max_test_images 30 output_dir run"
    python(root, "main.py", "-d", "fake_lt", "-m", model, *options.split(), *quick.split())
    result: dict[str, object] = json.loads((root / "output" / "run" / "metrics.json").read_text())
    shutil.rmtree(root / "output" / "run")
    return result


def apply(root: Path, example: Example) -> None:
    """Add a part to a copy as a contributor does; nothing but the files that the page names changes."""
    example.apply(root)
    for script in ("make_options.py", "make_model_list.py", "make_composition.py"):  # what `make docs` runs
        python(root, f"scripts/{script}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_example_taken_literally(copy: Path, kind: str) -> None:
    """Each part in turn, beside those before it; the tests over the tables pass with it, and a run uses it."""
    apply(copy, KINDS[kind])
    python(copy, "-m", "pytest", "-q", *(f"tests/{name}" for name in CONTRACTS))
    if kind in RUNS:
        result = trained(copy, "tiny_clip_peft", RUNS[kind])
        assert result["train"]["steps"] == 2  # type: ignore[index]
    elif kind == "method":
        options = "spread.strongest 1.5 test_dists uniform,backward5 adapt_epochs 1 prec fp32"
        found = trained(copy, "resnet32_spread", options)["distributions"]
        assert len(found["backward5"]["predictors"]["sade"]["weights"]) == 3  # type: ignore[index]
    else:
        assert "10" in python(copy, "main.py", "-d", "fashion_mnist_ir100", "-m", "tiny_clip_peft", "--dry-run")


@pytest.mark.slow
def test_the_default_tests_pass_with_all_of_them(copy: Path) -> None:
    """The whole default tier, in the copy with every example."""
    python(copy, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")
