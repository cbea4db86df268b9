"""infer.py beside each export, run as a user would: in another process, on an image file, without TailTune."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import offline
from PIL import Image
from small import SIDE
from test_exchange import resnet, subject, timm_vit, trained
from test_literal import adapted
from tiers import slow_except
from tqdm import tqdm

from tailtune.datasets.images.image_files import load_rgb
from tailtune.datasets.images.transforms import eval_side, eval_transform
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.trainers.export import ExportedModel, export

Exports = Callable[[str], tuple[ExportedModel, Path]]
BLOCKED = {"onnx": ["tailtune", "torch", "torchvision", "timm", "open_clip", "peft"]}
"""Format → packages that its infer.py must not import. All others must do without TailTune alone."""
RUN_SCRIPT = """
import json, runpy, sys
blocked, sys.argv = json.loads(sys.argv[1]), sys.argv[2:]
sys.modules.update(dict.fromkeys(blocked))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def shown_on(stream: io.StringIO) -> Iterator[None]:
    """Within the block, standard error is this stream, of 80 columns, and bars appear at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stderr", stream)
        patch.setenv("COLUMNS", "80")
        for module in ("merged_format", "onnx_format"):
            shown = lambda *given, **more: tqdm(*given, **{**more, "delay": 0, "mininterval": 0})  # noqa: E731
            patch.setattr(f"tailtune.trainers.export.{module}.tqdm", shown)
        yield


def photograph(path: Path) -> Path:
    """A smooth picture with noise, taken with the camera turned: a JPEG with an EXIF orientation."""
    y, x = np.mgrid[0:90, 0:130] / 130
    waves = np.stack([np.sin(7 * x + 3 * y), np.cos(5 * y - x), x * y], -1) * 90 + 120
    pixels = waves + np.random.default_rng(0).normal(0, 12, waves.shape)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(path, quality=90, exif=exif)
    return path


def printed(script: Path, *words: object, without: list[str]) -> subprocess.CompletedProcess[str]:
    """The output of infer.py in an interpreter that knows no module of the checkout."""
    command = [sys.executable, "-I", "-c", RUN_SCRIPT, json.dumps(without), str(script), *map(str, words)]
    return subprocess.run(command, cwd=script.parents[1], env=offline(), capture_output=True, text=True, timeout=300)


def with_facts(made: ExportedModel, augment: str = "lift", **more: Any) -> ExportedModel:
    return dataclasses.replace(
        made,
        resize=eval_side(made.resolution, augment),
        interpolation="bicubic",
        class_counts=[9, 5, 3, 2, 1],
        temperature=1.7,
        **more,
    )


def ours(made: ExportedModel, path: Path) -> np.ndarray:
    """The logits of the model that is exported."""
    image = eval_transform(made.resolution, made.interpolation, "lift")(load_rgb(path))
    with torch.no_grad():
        return made.method.predict(image[None])[0].numpy()


def convnet() -> WholeNetworkEncoder:
    torch.manual_seed(3)
    return WholeNetworkEncoder(timm.create_model("test_resnet", num_classes=0), 96)


CASES = {
    "onnx": lambda: subject(timm_vit(), ["adapter", "vpt_deep"]),
    "peft": lambda: adapted(timm_vit(), "qkv", SIDE),
    "merged": lambda: subject(convnet(), ["bias_tuning"], "LinearClassifier"),
}


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Format → a model and the folder of its export; each is exported once, on a terminal that shows `bar.txt`."""

    @cache
    def of(name: str) -> tuple[ExportedModel, Path]:
        made, folder = with_facts(trained(CASES[name]())), tmp_path_factory.mktemp(name) / "out"
        with shown_on(screen := Terminal()):
            export(made, name, folder)
        (folder.parent / "bar.txt").write_text(screen.getvalue())
        return made, folder

    return of


@pytest.mark.parametrize("name", slow_except(["onnx", "peft"], CASES))  # test_share.py runs that of a merged network
def test_the_script_gives_the_logits_of_the_model(name: str, exports: Exports) -> None:
    made, folder = exports(name)
    path, blocked = photograph(folder.parent / "a photo.jpg"), BLOCKED.get(name, ["tailtune"])
    done = printed(folder / "infer.py", "--logits", "a photo.jpg", without=blocked)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["path"] == "a photo.jpg"
    wanted = ours(made, path)
    assert np.ptp(wanted) > 0.05 and np.abs(np.array(found["logits"]) - wanted).max() < 1e-3


def test_the_script_can_be_cut_short(exports: Exports, tmp_path: Path) -> None:
    """As `infer.py IMAGES | head -1` does."""
    script, path = exports("onnx")[1] / "infer.py", photograph(tmp_path / "photo.jpg")
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-I", str(script), *([str(path)] * 3)]
    done = subprocess.run(command, env=offline(), stdout=writes, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(writes)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_script_prints_calibrated_probabilities_and_refuses_in_one_line(exports: Exports, tmp_path: Path) -> None:
    made, folder = exports("onnx")
    path, script = photograph(tmp_path / "photo.jpg"), folder / "infer.py"
    first, *_ = printed(script, path, without=BLOCKED["onnx"]).stdout.splitlines()
    cells = first.split("\t")
    shares = torch.from_numpy(ours(made, path) / 1.7).softmax(0)
    assert cells[0] == str(path) and len(cells) == 6
    name, share = cells[1].split()
    assert name == f"c{shares.argmax()}" and abs(float(share) - float(shares.max())) < 1e-3
    (tmp_path / "text.jpg").write_text("no image")
    Image.fromarray(np.full((40, 40), 40_000, "uint16")).save(tmp_path / "deep.png")
    for wrong, says in (("text.jpg", "cannot identify"), ("deep.png", "8 bits"), ("missing.jpg", "No such file")):
        done = printed(script, tmp_path / wrong, without=BLOCKED["onnx"])
        assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
    done = printed(script, "--top", "-1", path, without=BLOCKED["onnx"])
    assert done.returncode == 2 and "--top: it must be at least 1" in done.stderr


def test_the_script_prints_any_name_and_refuses_huge_images_in_one_line(exports: Exports, tmp_path: Path) -> None:
    """A class may be called after a folder whose name is no text, and a terminal may know ASCII only."""
    home = shutil.copytree(exports("onnx")[1], tmp_path / "copy")
    facts = json.loads((home / "facts.json").read_text())
    facts["class_names"] = [f"gu\udcea{number}鳥" for number in range(len(facts["class_names"]))]
    (home / "facts.json").write_text(json.dumps(facts))
    path = photograph(tmp_path / "photo.jpg")
    command = [sys.executable, str(home / "infer.py"), str(path)]
    for encoding in ("ascii:strict", "utf-8:strict"):
        environment = offline() | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, env=environment, capture_output=True, timeout=300)
        assert done.returncode == 0 and b"gu\\udcea" in done.stdout, done.stderr
    Image.new("1", (15_000, 15_000)).save(tmp_path / "huge.png")
    done = printed(home / "infer.py", tmp_path / "huge.png", without=BLOCKED["onnx"])
    assert done.returncode == 1 and "exceeds limit" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_onnx_carries_all_facts_and_takes_any_batch(exports: Exports, tmp_path: Path) -> None:
    import onnx
    import onnxruntime

    made, folder = exports("onnx")
    folders = {"full": folder, "half": tmp_path / "half"}
    with shown_on(screen := io.StringIO()):
        export(dataclasses.replace(made, half=True), "onnx", folders["half"])
    assert not screen.getvalue(), "a bar is shown on a terminal only"
    images = made.images(5).numpy()
    wanted = made.method.predict(made.images(5)).detach().numpy()
    for name, tolerance in (("full", 1e-4), ("half", 2e-2)):
        path = folders[name] / "model.onnx"
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
        facts = json.loads((folders[name] / "facts.json").read_text())
        assert about.items() <= facts.items()
        assert about["class_names"] == made.class_names and about["class_counts"] == [9, 5, 3, 2, 1]
        assert about["temperature"] == 1.7
        steps = about["preprocessing"]
        assert (steps["resize_shorter_side"], steps["center_crop"], steps["interpolation"]) == (
            SIDE * 8 // 7,
            SIDE,
            "bicubic",
        )
        assert about["normalised_inside"]["mean"] == pytest.approx([0.4, 0.5, 0.6])
        assert about["normalised_inside"]["std"] == pytest.approx([0.2, 0.3, 0.25])
        for batch in (1, 5):
            (logits,) = session.run(["logits"], {"image": images[:batch]})
            assert (
                logits.dtype == np.float32 and np.abs(logits - wanted[:batch]).max() < tolerance * np.abs(wanted).max()
            )
        opset = next(each.version for each in onnx.load(path).opset_import if each.domain == "")
        assert facts["opset"] == opset and facts["computes_in"] == {"full": "float32", "half": "float16"}[name]
    sizes = [(each / "model.onnx").stat().st_size for each in folders.values()]
    assert sizes[1] < 0.7 * sizes[0]


def test_a_tower_of_open_clip_has_a_script_too(tmp_path: Path) -> None:
    """Its code is complete Python; running it would build a ResNet-50."""
    export(with_facts(trained(subject(resnet(), ["bias_tuning"]))), "merged", tmp_path)
    text = (tmp_path / "infer.py").read_text()
    compile(text, "infer.py", "exec")
    assert "open_clip.create_model" in text and "It needs numpy, open_clip, safetensors, torch and Pillow" in text


def test_code_of_peft_loads_the_weights_below_the_adapter(exports: Exports) -> None:
    """The network of facts.json is the pre-trained one. With random weights, an adapter classifies at chance."""
    _, folder = exports("peft")
    facts = json.loads((folder / "facts.json").read_text())
    assert "load_state_dict(load_file('base.safetensors'))" in facts["network"]["code"]
    assert json.loads((folder / "adapter_config.json").read_text())["auto_mapping"] is None


def test_a_published_base_with_other_weights_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that the adapter was trained on are then written beside it."""
    from tailtune.models.backbones.backbone_types import PublishedWeights

    host = convnet()
    made = trained(adapted(host, "layer1.0.conv1", 64))
    made = dataclasses.replace(made, base=PublishedWeights("timm", "test_resnet.r160_in1k"))
    real = timm.create_model

    def published(name: str, pretrained: bool = False, **named: Any) -> Any:
        return real(name, **named)  # random weights: others than those of the host

    monkeypatch.setattr(timm, "create_model", published)
    export(made, "peft", tmp_path / "other")
    assert json.loads((tmp_path / "other" / "facts.json").read_text())["base"] == "base.safetensors"

    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no network")

    open_clip_base = dataclasses.replace(made, base=PublishedWeights("open_clip", "RN50-quickgelu", "openai"))
    monkeypatch.setattr("open_clip.create_model", unreachable)
    monkeypatch.setattr("tailtune.trainers.export.peft_format.clip_resolution", lambda _: 64)
    export(open_clip_base, "peft", tmp_path / "offline")
    assert json.loads((tmp_path / "offline" / "facts.json").read_text())["base"] == "base.safetensors"


def shows_a_bar(written: str, title: str) -> bool:
    """Whether a bar of this title came to its end, within the width of the terminal."""
    lines = written.replace("\r", "\n").splitlines()
    return any(line.startswith(f"{title}: 100%") for line in lines) and all(len(line) <= 80 for line in lines)


def test_the_bar_of_onnx_is_shown_on_a_terminal(exports: Exports) -> None:
    """Elsewhere not: see above."""
    _, folder = exports("onnx")
    assert shows_a_bar((folder.parent / "bar.txt").read_text(), "export onnx")


@pytest.mark.parametrize("screen", [Terminal, io.StringIO])
def test_the_bar_of_merging_is_shown_on_a_terminal_only(screen: type[io.StringIO], tmp_path: Path) -> None:
    with shown_on(stream := screen()):
        export(trained(subject(timm_vit(), ["lora"])), "merged", tmp_path / "out")
    assert shows_a_bar(stream.getvalue(), "merging") if stream.isatty() else not stream.getvalue()
