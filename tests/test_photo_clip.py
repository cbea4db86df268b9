"""`pretrain_tiny_clip.py --data`: a training that was interrupted, the model in TailTune, wrong input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file

from tailtune.scripts import _photo_clip, pretrain_tiny_clip
from tailtune.scripts._contrastive import ContrastiveTraining

DATA = "fake_lt"
SMALL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model and batches that train in a second."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"MODEL": SMALL, "BATCH": 8, "SAVE_EVERY": 2}.items():
        monkeypatch.setattr(_photo_clip, name, value)
    monkeypatch.setattr(pretrain_tiny_clip, "PHOTO_BATCH", 8)


def trained(out: str, *more: str) -> int:
    threads = torch.get_num_threads()
    try:
        return pretrain_tiny_clip.main(["--data", DATA, "--out", out, "--samples", "48", "--prec", "fp32", *more])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.usefixtures("small")
def test_an_interrupted_training_continues_bit_for_bit_and_tailtune_has_the_same_zero_shot(
    monkeypatch: pytest.MonkeyPatch, launch: Cli
) -> None:
    assert trained("whole") == 0
    with monkeypatch.context() as patch:
        update, calls = ContrastiveTraining.update, []

        def interrupted(self: Any, step: int, *batch: Any, **how: Any) -> float:
            calls.append(step)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return update(self, step, *batch, **how)

        patch.setattr(ContrastiveTraining, "update", interrupted)
        assert trained("cut") == 130
    assert calls == [0, 1, 2, 3] and not Path("cut/weights.safetensors").exists()
    assert trained("cut") == 0
    one, other = (load_file(f"{name}/weights.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    log = Path("cut/pretrain_log.txt").read_text()
    assert "--data fake_lt" in log and log.count("loss") == 3

    assert trained("cut") == 0
    assert Path("cut/pretrain_log.txt").read_text() == log, "nothing was left to do"

    own = "backbone open_clip:cut/photo_clip.json pretrained cut/weights.safetensors resolution 32"
    pixels = "pixel_mean [0.5,0.5,0.5] pixel_std [0.5,0.5,0.5]"
    done = launch(f"-d {DATA} -m zstiny_clip {own} {pixels} output_dir zero")
    assert done.returncode == 0, done.stdout + done.stderr
    accuracy = json.loads(Path("output/zero/metrics.json").read_text())["test"]["accuracy"]
    assert f"{accuracy:.2f} %" in log.splitlines()[-1]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--leave-out", "no class"], "--leave-out no class: the data has no such class"),
        (["--captions", "nope.json"], "--captions nope.json"),
        (["--captions", "list.json"], "--captions list.json"),
        (["--check-digits"], "--check-digits measures the model of characters"),
        (["--data", "nope"], "nope"),
    ],
)
def test_wrong_input_ends_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("list.json").write_text("[1]", encoding="utf-8")
    assert trained("wrong", *words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert message in said[-1] and not Path("wrong").exists()


@pytest.mark.usefixtures("small")
def test_a_folder_of_another_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert trained("once") == 0
    assert trained("once", "--seed", "1") == 2
    assert "is of another command" in capsys.readouterr().err


@pytest.mark.usefixtures("small")
def test_a_damaged_state_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert trained("once") == 0
    state = Path("once/state.pt")
    state.write_bytes(state.read_bytes()[:-100])
    assert trained("once") == 2
    assert "state.pt is damaged" in (said := capsys.readouterr().err) and "Traceback" not in said
