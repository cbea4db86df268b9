"""Start-up: which modules a command imports, the stored schema, and the parts of the embedded CLIP that are ours."""

import json
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from conftest import ROOT, Cli, offline
from PIL import Image
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn

from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones import open_clip_files
from tailtune.models.backbones.openai_clip import TextModel, image_encoder
from tailtune.models.backbones.table import TINY_CLIP
from tailtune.trainers import cached_schema as cached
from tailtune.trainers.option_schema import declared
from tailtune.trainers.processes import slow_start

LARGE = ("torch", "torchvision", "timm", "open_clip", "transformers", "accelerate", "sklearn", "scipy", "matplotlib")
PROGRAM = """
import json, sys
sys.path.insert(0, {root!r})
from tailtune.main import main
words = json.loads(sys.argv[1])
codes = [main(line.split()) for line in words]
print(json.dumps([codes, sorted(sys.modules)]))
"""


def modules_after(folder: Path, *lines: str) -> tuple[list[int], set[str]]:
    """Exit codes of commands that one new process runs in turn, and the names of the modules that it has then."""
    command = [sys.executable, "-c", PROGRAM.format(root=str(ROOT)), json.dumps(lines)]
    done = subprocess.run(command, cwd=folder, env=offline(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    codes, modules = json.loads(done.stdout.splitlines()[-1])
    return codes, set(modules)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run; the schema of the options is stored too."""
    folder = tmp_path_factory.mktemp("finished")
    (code, again), modules = modules_after(
        folder,
        "-d fake_lt -m tiny_clip_peft max_steps 1 num_workers 0 report none",
        "-d fake_lt -m tiny_clip_peft --dry-run",
    )
    assert code == again == 0
    assert not modules & {"timm", "open_clip", "transformers", "sklearn", "scipy", "matplotlib"}, "they are not needed"
    return folder


def test_what_is_refused_or_finished_imports_no_large_library(finished: Path) -> None:
    codes, modules = modules_after(
        finished,
        "--list",
        "-d fake_lt -m tiny_clip_peft learning_rat 1",
        "-d fake_lt -m tiny_clip_peft lr fast",
        "-d fake_lt -m tiny_clip_pet",
        "-d fake_lt -m tiny_clip_peft max_steps 1 num_workers 0",
        "report nothing",
    )
    assert codes == [0, 2, 2, 2, 0, 2]
    assert not modules & set(LARGE)


def test_the_commands_for_data_import_no_large_library(finished: Path) -> None:
    for number in range(6):
        image = finished / "images" / ("train" if number < 4 else "test") / "ab"[number % 2] / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (40 * number, 0, 0)).save(image)
    codes, modules = modules_after(finished, "data verify images --decode", "data verify cifar10", "data verify x.yaml")
    assert codes == [0, 1, 2]
    assert not modules & set(LARGE)


def test_a_dry_run_needs_no_library_of_networks(finished: Path) -> None:
    codes, modules = modules_after(finished, "-d digits_lt -m tiny_clip_peft --dry-run")
    assert codes == [0] and "torch" in modules
    assert not modules & {"torchvision", "timm", "open_clip", "transformers", "sklearn"}


# --- the stored schema ---------------------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of the stored schema, in a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached.cached_schema()
    (path,) = (tmp_path / "cache" / "tailtune").iterdir()
    return path


def test_the_stored_schema_is_the_declared_one(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tailtune.trainers.option_schema", None)  # importing it would raise
    schema, wanted = cached.cached_schema(), declared()
    assert schema.declarations == wanted.declarations and dict(schema) == dict(wanted)
    assert schema.aliases == wanted.aliases and schema.sections == wanted.sections
    for name in wanted.coupled:
        for value in ("sade", "CE", "LADE", "batchformer", {"lora_dropout": 0.1}, {}, True, False, None):
            if isinstance(value, dict) == (name == "peft_args"):
                values = {**dict.fromkeys(wanted.coupled), name: value}
                assert schema.couples(values) == wanted.couples(values), (name, value)


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"stamp": 1}', "flipped"])
def test_a_damaged_schema_is_built_again(damage: str, stored: Path) -> None:
    text = stored.read_text()
    stored.write_text(text.replace("Learning rate at", "Learning rats at") if damage == "flipped" else damage)
    assert cached.cached_schema().declarations == declared().declarations
    assert stored.read_text() == text


def test_a_changed_source_makes_a_new_schema(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    shutil.copytree(ROOT / "configs", package / "configs")
    monkeypatch.setattr(cached, "PACKAGE", package)

    def stamp() -> str:
        cached.cached_schema()
        (path,) = set(stored.parent.iterdir()) - {stored}  # another folder has another file
        return json.loads(path.read_text())["stamp"]

    before = stamp()
    assert stamp() == before
    (package / "configs" / "key.py").write_text("# another key")
    assert stamp() != before


def test_a_link_to_nowhere_among_the_sources(stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emacs makes such a link beside every file that is being edited."""
    package = tmp_path / "package"
    shutil.copytree(ROOT / "configs", package / "configs")
    (package / "configs" / ".#key.py").symlink_to("user@host.1")
    monkeypatch.setattr(cached, "PACKAGE", package)
    assert cached.cached_schema().declarations == declared().declarations


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cached.cached_schema().declarations == declared().declarations
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached.cached_schema()
    (path,) = (tmp_path / "tailtune").iterdir()
    path.unlink()
    path.mkdir()
    assert cached.cached_schema().declarations == declared().declarations
    assert [*path.parent.iterdir()] == [path], "no temporary file is left"


# --- ours beside the libraries' -------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [32, 48])
def test_the_embedded_clip_is_open_clips(resolution: int) -> None:
    """Bitwise: the text features, and the weights of timm's network at another resolution as well."""
    config = json.loads((TINY_CLIP / "tailtune-tiny.json").read_text())
    clip = open_clip.CLIP(**config).eval().requires_grad_(False)
    state = clip.state_dict()
    tokens = open_clip.SimpleTokenizer(context_length=16)(["a photo of a digit one.", "rare"])
    assert torch.equal(open_clip_files.tokenize(16, ["a photo of a digit one.", "rare"]), tokens)
    text = TextModel.of(state, config).eval().requires_grad_(False)
    assert torch.equal(text.encode_text(tokens), clip.encode_text(tokens))
    assert text.state_dict().keys() == {name for name in state if not name.startswith("visual.")}
    encoder, projection = image_encoder(state, config, resolution, project=False, fast=False)
    of_timm = timm.models.VisionTransformer(
        **{"img_size": resolution, "patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4, "num_classes": 0},
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
    )
    filtered = checkpoint_filter_fn(dict(state), of_timm)
    assert torch.equal(filtered.pop("head.weight"), projection)
    filtered.pop("head.bias")
    of_timm.load_state_dict(filtered)
    assert list(encoder.net.state_dict()) == list(of_timm.state_dict())
    assert all(torch.equal(tensor, of_timm.state_dict()[name]) for name, tensor in encoder.net.state_dict().items())
    images = torch.randn(3, 3, resolution, resolution)
    assert torch.allclose(encoder(images), of_timm.eval()(images), atol=1e-5)


def test_templates_are_open_clips() -> None:
    assert open_clip_files.imagenet_templates() == tuple(make("{}") for make in open_clip.OPENAI_IMAGENET_TEMPLATES)


def test_a_lazy_module_is_imported_when_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    module = lazy_module("colorsys")
    assert "colorsys" not in sys.modules
    assert module.rgb_to_hsv(1, 0, 0) == (0, 1, 1) and "colorsys" in sys.modules


class Terminal:
    """Stands for standard error."""

    def __init__(self, terminal: bool) -> None:
        self.terminal, self.text = terminal, ""

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


@pytest.mark.parametrize(
    "terminal, rank, late, says",
    [
        (True, "0", 0.0, "loading …\n"),
        (True, "0", 60.0, ""),
        (True, "1", 0.0, ""),
        (False, "0", 0.0, ""),
    ],
)
def test_loading_is_shown_on_a_terminal(
    terminal: bool, rank: str, late: float, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Terminal(terminal)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(slow_start, "LATE", late)
    for _ in range(2):
        with slow_start.loading_shown():
            for _ in range(200 if says else 1):  # at most two seconds
                if stderr.text:
                    break
                time.sleep(0.01)
    assert stderr.text == says, "once, in the first process"


# --- a finished run --------------------------------------------------------------------------------------------------


def test_a_value_that_was_given_is_not_taken_for_the_backbones(launch: Cli) -> None:
    """`expand` changes the evaluation only, so both commands have one folder; `resolution` changes the training."""
    words = "-d fake_lt -m tiny_clip_peft max_steps 1 num_workers 0 max_test_images 8 output_dir run"
    assert launch(f"{words} tte True expand 16").returncode == 0
    again = launch(f"{words} tte True")
    assert "finished before" not in again.stdout and "tests/" in again.stdout
    assert "finished before" in launch(f"{words} tte True").stdout
    assert "finished before" in launch(f"{words} tte True expand 16").stdout
    assert launch(f"{words.replace('run', 'other')} resolution 24").returncode == 0
    refused = launch(f"{words.replace('run', 'other')} resolution none")
    assert refused.returncode == 2 and "resolution is 24 there and 32 here" in refused.stderr


def test_images_are_compared_once(launch: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A new evaluation of a finished run reads the data as often as before: the quick look stops earlier."""
    words = "-d fake_lt -m tiny_clip_peft max_steps 1 num_workers 0 max_test_images 8 output_dir run"
    assert launch(words).returncode == 0
    looks = []
    monkeypatch.setattr("tailtune.trainers.stored_result.decide", lambda *_: looks.append("decide"))
    with pytest.raises(AttributeError):  # `run` decides by the same function, which gives nothing here
        launch(f"{words} test_only True few_below 3")
    assert looks == ["decide"]
