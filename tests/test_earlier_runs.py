"""A run folder of an earlier version is shown, evaluated, exported and collected by this one.

`stored/run_cac7ef2` was made by commit cac7ef2, the last one before modules moved and metrics.json got schema 2, with
`COMMAND`; its TensorBoard files are left out. Pillow made all images then, and there was no option `image_backend`.
"""

import json
import shutil
from hashlib import sha256
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file

from tailtune.scripts.collect import main as collect
from tailtune.trainers.runs.result_table import read_result

STORED = Path(__file__).parent / "stored" / "run_cac7ef2"
SHORT = "max_steps 6 batch_size 16 num_workers 0 max_test_images 30"
COMMAND = f"-d fake_lt -m tiny_clip_peft {SHORT} test_dists uniform,backward5 adapter_dim 2 output_dir earlier"
COMMAND += " image_backend pil"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(STORED, tmp_path / "output" / "earlier"))


def succeeded(done: CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def files(folder: Path) -> dict[str, bytes]:
    """Name → content of the files that a run is made of."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("log.txt", ".tailtune.lock")
    }


def test_it_is_shown(launch: Cli, folder: Path) -> None:
    """The same command neither trains nor evaluates anew, and writes nothing."""
    before = files(folder)
    text = succeeded(launch(COMMAND))
    assert "23.33" in text and "epoch [" not in text
    assert files(folder) == before


def test_its_report_is_made(launch: Cli, folder: Path) -> None:
    """metrics.json of that version lacks metrics, which the logits give; the numbers that it has are shown."""
    succeeded(launch("report earlier"))
    html = (folder / "report.html").read_text("utf-8")
    assert "23.33" in html and "data:image/jpeg" in html and "backward5" in html
    assert (folder / "predictions.csv").read_text().count("\n") == 31


def test_it_is_evaluated_anew(launch: Cli, folder: Path) -> None:
    """The network is built again from the config and the checkpoint: it predicts as the earlier code did."""
    logits = load_file(folder / "logits.safetensors")["logits"]
    (folder / "logits.safetensors").unlink()
    text = succeeded(launch(f"{COMMAND} test_only True target_prior uniform"))
    assert "epoch [" not in text
    (again,) = folder.glob("tests/*/logits.safetensors")
    assert torch.allclose(load_file(again)["logits"], logits, atol=1e-4)
    (result,) = folder.glob("tests/*/metrics.json")
    stored = read_result(STORED / "metrics.json")["distributions"]
    for name, entry in json.loads(result.read_text())["distributions"].items():
        plain, before = entry["predictors"]["plain"], stored[name]["predictors"]["plain"]
        assert (plain["accuracy"], plain["macro_f1"]) == (before["accuracy"], before["macro_f1"])
        assert "target_prior" in entry["predictors"]


def test_another_folder_evaluates_and_exports_it(launch: Cli, folder: Path, tmp_path: Path) -> None:
    words = f"-d fake_lt -m tiny_clip_peft {SHORT} adapter_dim 2 output_dir other test_only True"
    words += f" model_dir {folder} image_backend pil"
    succeeded(launch(words))
    (file,) = (tmp_path / "output" / "other").rglob("metrics.json")
    result = json.loads(file.read_text())
    assert result["test"]["accuracy"] == read_result(STORED / "metrics.json")["test"]["accuracy"]
    succeeded(launch(f"{COMMAND} export lift"))
    assert (folder / "export" / "lift").is_dir()


def test_it_is_collected(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect([str(folder)]) == 0
    assert "23.3" in capsys.readouterr().out


def test_nobody_has_edited_the_folder() -> None:
    manifest = json.loads((STORED / "tailtune.json").read_text())
    stored = files(STORED)
    del stored["tailtune.json"]
    assert {name: sha256(content).hexdigest() for name, content in stored.items()} == {
        name: digest for name, (digest, _) in manifest["files"].items()
    }
