"""Wrong input ends in exit code 2 and one line that names culprit and remedy; what stood before still stands."""

import io
import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Cli, HasRun, offline
from filelock import FileLock
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tailtune import main
from tailtune.trainers.methods.base import Method
from tailtune.trainers.storage.atomic_io import Digest
from tailtune.trainers.storage.manifest import LOCK, Manifest
from tailtune.trainers.storage.tensor_files import read_folder, write_folder

FAKE = "-d fake_lt -m tiny_clip_peft pretrained none max_test_images 20"
SHORT = f"{FAKE} batch_size 32 max_steps 4 save_every 1 output_dir run"  # 10 steps would be two epochs
RUN = Path("output/run")


def one_line(done: subprocess.CompletedProcess[str], *parts: str) -> str:
    """Assert the contract of a refusal; returns the line."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.stdout
    for part in parts:
        assert part in lines[0]
    return lines[0]


@pytest.fixture
def refuses(launch: Cli) -> Callable[..., str]:
    """`refuses(words, *parts)`: the command is refused, the line holds the parts, and no run folder is left behind."""

    def call(words: str, *parts: str) -> str:
        before = tree(Path("output"))
        line = one_line(launch(words), *parts)
        assert tree(Path("output")) == before
        return line

    return call


def tree(folder: Path) -> dict[Path, bytes]:
    """Every file below a folder, but for logs, lock files and curves, which a refused command may touch."""
    passing = {"log.txt", ".tailtune.lock"}
    files = (each for each in folder.rglob("*") if each.is_file() and each.name not in passing)
    return {each: each.read_bytes() for each in files if each.parent.name != "tensorboard"}


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("", ["-d", "-m", "--list"]),
        ("-d fake_lt", ["-m"]),
        ("-d", ["-d", "--help"]),
        (f"{FAKE} --no-such-flag", ["--no-such-flag", "--help"]),
        (f"{FAKE} --dry", ["--dry", "--help"]),
        (f"{FAKE} lr", ["'lr' has no value"]),
        (f"{FAKE} batchsize 8", ["batchsize", "did you mean 'batch_size'"]),
        (f"{FAKE} run_name x", ["run_name"]),
        (f"{FAKE} after.lr 0.1", ["after.lr", "no stage before"]),
        ("-d fake_l -m tiny_clip", ["'fake_l'", "did you mean 'fake_lt'"]),
        ("-d fake_lt -m tiny_klip", ["'tiny_klip'", "did you mean 'tiny_clip"]),
        ("-d nowhere/my.yaml -m tiny_clip", ["nowhere/my.yaml", "does not exist"]),
        (f"{FAKE} tte maybe", ["tte", "True or False", "'maybe'"]),
        (f"{FAKE} num_epochs 2.5", ["num_epochs", "whole number", "'2.5'"]),
        (f"{FAKE} num_epochs -1", ["num_epochs", "at least 0", "-1"]),
        (f"{FAKE} num_epochs none", ["num_epochs", "whole number", "'none'"]),
        (f"{FAKE} lr fast", ["lr", "number", "'fast'"]),
        (f"{FAKE} lr nan", ["lr", "finite", "'nan'"]),
        (f"{FAKE} lr -1e-3", ["lr", "at least 0", "-0.001"]),
        (f"{FAKE} micro_batch_size some", ["micro_batch_size", "whole number", "auto", "'some'"]),
        (f"{FAKE} micro_batch_size 0", ["micro_batch_size", "at least 1"]),
        (f"{FAKE} partial first", ["partial", "[0,6]", "'first'"]),
        (f"{FAKE} prec fp8", ["prec", "'fp8'", "did you mean 'fp"]),
    ],
)
def test_words(refuses: Callable[..., str], words: str, parts: list[str]) -> None:
    refuses(words, *parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("loss_type LAX", ["loss_type", "'LAX'", "did you mean 'LA'"]),
        ("classifier CosinClassifier", ["classifier", "did you mean 'CosineClassifier'"]),
        ("backbone TinyKLIP", ["backbone", "did you mean 'TinyCLIP'"]),
        ("method clasify", ["method", "did you mean 'classify'"]),
        ("augment lifd", ["augment", "did you mean 'lift'"]),
        ("adapt_views sade_cifer", ["unknown adapt_views", "did you mean 'sade_cifar'"]),
        ("test_dists uniform,sideways5", ["test_dists", "'sideways5'", "backward<r>"]),
        ("test_dists dirichlet-sideways1", ["test_dists", "'dirichlet-sideways1'", "dirichlet-backward"]),
        ("prompt defalt", ["prompt", "did you mean 'default'"]),
        ("init_head text", ["init_head", "did you mean 'text_feat'"]),
        ("pretrained embeded", ["pretrained", "did you mean 'embedded'"]),
        ("dataset Fakes", ["dataset", "did you mean 'Fake'"]),
        ("batch_size 32 micro_batch_size 5", ["micro_batch_size 5", "does not divide", "try 4"]),
        ("vpt_shallow True vpt_deep True", ["vpt_shallow", "vpt_deep", "choose one"]),
        ("partial 99", ["partial 99"]),
        ("partial [2,99]", ["partial", "99"]),
        ("num_classes 12 dataset Digits", ["num_classes 12", "10"]),
        ("imb_factor 2", ["imb_factor 2", "at most 1"]),
        ("group_imb_factor 2", ["group_imb_factor 2", "at most 1"]),
        ("resolution 30", ["resolution 30", "multiple of 8"]),
        ("backbone IN21K-ViT-B/16 zero_shot True", ["zero_shot", "text encoder", "CLIP"]),
        ("zero_shot True", ["zero_shot", "adaptformer", "False"]),
        ("backbone IN21K-ViT-B/16 init_head text_feat", ["init_head", "text encoder", "class_mean"]),
        ("backbone IN21K-ViT-B/16 pretrained openai", ["pretrained", "openai"]),
        ("backbone CLIP-ViT-B/16 pretrained laion", ["pretrained", "laion"]),
        ("backbone CLIP-ViT-B/16 pretrained laion2b_s34b_b88k", ["laion2b_s34b_b88k", "choices", "openai"]),
        ("pretrained weights/none.safetensors", ["weights/none.safetensors", "does not exist"]),
        ("model_dir somewhere", ["model_dir", "test_only"]),
        ("model_dir somewhere test_only True zero_shot True", ["zero_shot", "model_dir somewhere"]),
    ],
)
def test_options(refuses: Callable[..., str], words: str, parts: list[str]) -> None:
    refuses(f"-d fake_lt -m tiny_clip_peft pretrained none {words}", *parts)


def test_starting_over_is_checked_before_the_old_run_goes(launch: Cli, has_run: HasRun) -> None:
    has_run(SHORT)
    one_line(launch(f"{SHORT} resume False export peft"), "export peft", "adaptformer")
    assert (RUN / "metrics.json").exists() and (RUN / "checkpoint").exists()


def test_an_error_leaves_the_folder_to_the_corrected_command(launch: Cli) -> None:
    one_line(launch(f"{SHORT} loss_type LAX"), "LAX")
    assert not RUN.exists()
    assert launch(SHORT).returncode == 0


def test_all_stages_are_checked_before_the_first_one_trains(refuses: Callable[..., str]) -> None:
    refuses(f"{FAKE} after tiny_clip loss_type LAX", "LAX")


# --- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with the user's YAML, lists and images: three classes of 4 training and 2 test images."""
    folder = tmp_path / "own"
    for split, count in (("train", 4), ("test", 2)):
        lines = []
        for label in range(3):
            for index in range(count):
                path = folder / "images" / split / f"{label}_{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (80 * label, 20 * index, 0)).save(path)
                lines.append(f"{split}/{path.name} {label}")
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    options = {"dataset": "ImageList", "root": "images", "train_list": "train.txt", "test_list": "test.txt"}
    (folder / "my.yaml").write_text("".join(f"{key}: {value}\n" for key, value in options.items()))
    return folder


OWN = "-d own/my.yaml -m tiny_clip_peft pretrained none num_epochs 1"


def test_the_data_themselves_are_good(launch: Cli, data: Path) -> None:
    assert launch(OWN).returncode == 0


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dataset: [ImageList\nroot: images\n", ["my.yaml", "line", "not valid YAML"]),
        ("dataset: 'ImageList\n", ["my.yaml", "not valid YAML"]),
        ("- dataset\n", ["my.yaml", "key: value"]),
        ("dataset: ImageList\ntrain_lst: a\n", ["my.yaml", "train_lst", "did you mean 'train_list'"]),
        ("dataset: ImageList\nnum_classes: few\n", ["my.yaml", "num_classes", "whole number"]),
        ("dataset: ImageList\nimb_factor: 1" + "0" * 400 + "\n", ["my.yaml", "imb_factor", "finite"]),
        ("dataset: ImageList\nroot: images\n", ["train_list"]),
        ("", ["dataset"]),
    ],
)
def test_yaml(refuses: Callable[..., str], data: Path, text: str, parts: list[str]) -> None:
    (data / "my.yaml").write_text(text)
    refuses(OWN, *parts)


def test_binary_yaml(refuses: Callable[..., str], data: Path) -> None:
    (data / "my.yaml").write_bytes(b"\x89PNG\xff\xfe\x00")
    refuses(OWN, "my.yaml", "not valid YAML")


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (lambda data: shutil.rmtree(data / "images"), ["images", "`root`"]),
        (lambda data: (data / "train.txt").unlink(), ["train.txt", "`lists`"]),
        (lambda data: (data / "train.txt").write_text(""), ["train.txt", "lists no image"]),
        (lambda data: (data / "train.txt").write_text("train/0_0.png\n"), ["train.txt line 1", "label"]),
        (lambda data: (data / "train.txt").write_text("train/0_0.png -1\n"), ["train.txt line 1", "label from 0"]),
        (lambda data: (data / "train.txt").write_bytes(b"\xff\xfe\x00"), ["train.txt", "UTF-8"]),
        (lambda data: add(data, "num_classes: 2"), ["train.txt line 9", "label 2", "num_classes"]),
        (lambda data: add(data, "num_classes: 5"), ["label 3", "no training image"]),
        (lambda data: add(data, "class_counts: train.txt"), ["class_counts", "train.txt", "JSON"]),
        (lambda data: add(data, "classnames: images/train/0_0.png"), ["0_0.png", "UTF-8"]),
        (lambda data: add(data, "classnames: test.txt"), ["names", "6", "3"]),
        (lambda data: (data / "images/train/0_0.png").unlink(), ["0_0.png", "line 1", "not found"]),
        (lambda data: (data / "images/train/0_0.png").write_bytes(b"no image"), ["0_0.png", "cannot read", "line 1"]),
        (lambda data: (data / "images/test/0_0.png").write_bytes(b""), ["test/0_0.png", "cannot read"]),
    ],
)
def test_data(launch: Cli, data: Path, spoil: Callable[[Path], object], parts: list[str]) -> None:
    spoil(data)
    one_line(launch(OWN), *parts)


def add(data: Path, line: str) -> None:
    """One more line of the user's YAML."""
    (data / "my.yaml").write_text((data / "my.yaml").read_text() + line + "\n")


def test_other_data_of_the_same_name(launch: Cli, data: Path) -> None:
    """Its options agree, so only the folder tells that the stored result is none of this data's."""
    assert launch(OWN).returncode == 0
    shutil.copytree(data, data.parent / "other")
    other = OWN.replace("own/", "other/")
    one_line(launch(other), "'my'", str(data), "output_dir")
    shutil.rmtree(data)  # now it may be the same data at a new place
    assert "finished before" in launch(other).stdout


def test_corrupt_image_in_a_worker_process(launch: Cli, data: Path) -> None:
    (data / "images/train/1_1.png").write_bytes((data / "images/train/1_2.png").read_bytes()[:60])
    line = one_line(launch(f"{OWN} num_workers 2"), "1_1.png", "line 6")
    assert len(line) < 400


def test_no_network_for_data(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    words = "-d cifar10_ir100 -m tiny_clip_peft pretrained none root empty"
    one_line(launch(words), "CIFAR10", "cannot be downloaded", "cifar-10-python.tar.gz", "`root`")


def test_no_network_for_weights(launch: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    done = launch("-d fake_lt -m clip_vit_b16_peft")
    one_line(done, "cannot be downloaded", "https://", "`pretrained /path/to/file`", "`pretrained none`")
    assert not any((tmp_path / "output").iterdir())


@pytest.mark.slow
def test_no_network_for_weights_in_a_shell(cli: Cli, tmp_path: Path) -> None:
    """As users see it: no warning and no progress bar around the line either."""
    home = tmp_path / "home"
    home.mkdir()
    nowhere = {"HOME": str(home), "HF_HOME": str(home), "https_proxy": "http://127.0.0.1:9", "TORCH_HOME": str(home)}
    nowhere["HF_HUB_OFFLINE"] = "0"  # the client has to find out
    done = cli("-d", "fake_lt", "-m", "clip_vit_b16_peft", **nowhere)
    one_line(done, "cannot be downloaded", "https://", "`pretrained /path/to/file`", "`pretrained none`")
    assert not any((tmp_path / "output").iterdir())


def test_no_network_for_timm(refuses: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    words = "-d fake_lt -m clip_vit_b16_peft backbone IN21K-ViT-B/16 init_head none"
    refuses(words, "cannot be downloaded", "https://huggingface.co/timm", "`pretrained /path/to/file`")


# --- weights files ---------------------------------------------------------------------------------------------------


def script_archive(path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)


def truncated(path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"weight": torch.zeros(1000)}, buffer)
    path.write_bytes(buffer.getvalue()[:2000])


class Harmful:
    """Unpickling one would make a file."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harmed"),)


@pytest.mark.parametrize(
    ("name", "write", "parts"),
    [
        ("w.safetensors", lambda path: save_file({"some.weight": torch.zeros(3)}, path), ["missing", "some.weight"]),
        ("w.safetensors", lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{"), ["cannot be read", "copy it again"]),
        ("w.safetensors", lambda path: path.write_bytes(b""), ["cannot be read"]),
        ("w.pt", lambda path: torch.save([1, 2], path), ["no state dict"]),
        ("w.pt", lambda path: torch.save({1: torch.zeros(2)}, path), ["no state dict"]),
        ("w.pt", lambda path: torch.save({"epoch": 3}, path), ["no state dict"]),
        ("w.pt", truncated, ["cannot be read", "copy it again"]),
        ("w.pt", script_archive, ["TorchScript", "safetensors"]),
        ("w.pt", lambda path: path.write_bytes(pickle.dumps(Harmful())), ["cannot be read"]),
        ("w.pt", lambda path: path.write_bytes(b"hello"), ["cannot be read"]),
        ("w.pt", lambda path: path.write_bytes(b"PK\x03\x04hello PK\x05\x06" + bytes(18)), ["cannot be read"]),
    ],
    ids=["other", "torn", "empty", "list", "keys", "numbers", "cut", "script", "harmful", "text", "zip"],
)
def test_weights_file(
    launch: Cli, name: str, write: Callable[[Path], object], parts: list[str], tmp_path: Path
) -> None:
    write(tmp_path / name)
    one_line(launch(f"-d fake_lt -m tiny_clip_peft pretrained ./{name}"), name, *parts)
    assert not Path("harmed").exists()


def test_weights_file_for_timm(launch: Cli, tmp_path: Path) -> None:
    words = "-d fake_lt -m tiny_clip_peft init_head none pretrained ./w.safetensors"
    words += " backbone timm:vit_tiny_patch16_224.augreg_in21k resolution 224"
    save_file({"some.weight": torch.zeros(3), "head.bias": torch.zeros(1000)}, tmp_path / "w.safetensors")
    one_line(launch(words), "w.safetensors", "150 missing", "1 unexpected (some.weight)")
    (tmp_path / "w.safetensors").write_bytes(b"hello")
    one_line(launch(words), "w.safetensors", "cannot be read")


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.main(SHORT.split()) == 0
    return folder / RUN


@pytest.fixture
def own_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it in this test's scratch folder."""
    shutil.copytree(trained, tmp_path / RUN)
    return tmp_path / RUN


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("lora True", ["another tuner", "lora"]),
        ("adaptformer False", ["another tuner", "adaptformer"]),
        ("adapter_dim 4", ["another shape", "adaptformer"]),
        ("classifier LinearClassifier", ["head.bias"]),
        ("num_classes 8", ["another shape", "head.weight"]),
        ("resolution 64", ["another base model", "pretrained"]),
        ("seed 1", ["another base model", "pretrained"]),
    ],
)
def test_checkpoint_of_something_else(launch: Cli, trained: Path, words: str, parts: list[str]) -> None:
    one_line(launch(f"{FAKE} {words} test_only True model_dir {trained}"), "checkpoint", *parts)


def test_checkpoint_of_other_classes(launch: Cli, trained: Path) -> None:
    words = "-d digits_lt -m tiny_clip_peft pretrained none test_only True"
    one_line(launch(f"{words} model_dir {trained}"), "other classes", "'class 0'")


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json"])
@pytest.mark.parametrize("words", ["", "model_dir output/run"])
def test_damaged_checkpoint(launch: Cli, own_run: Path, name: str, words: str) -> None:
    file = own_run / "checkpoint" / name
    file.write_bytes(file.read_bytes()[:-20])
    one_line(launch(f"{SHORT} test_only True tte True {words}"), "checkpoint", "run")


def test_foreign_checkpoint(launch: Cli, own_run: Path) -> None:
    file = own_run / "checkpoint" / "facts.json"
    file.write_text(json.dumps({"sha256": json.loads(file.read_text())["sha256"]}))
    one_line(launch(f"{SHORT} test_only True tte True"), "checkpoint")


def test_nothing_trained(refuses: Callable[..., str], tmp_path: Path) -> None:
    refuses(f"{FAKE} test_only True", "nothing is trained", "test_only", "model_dir")
    (tmp_path / "empty").mkdir()
    refuses(f"{FAKE} test_only True model_dir empty", "model_dir empty", "checkpoint")


# --- the run folder --------------------------------------------------------------------------------------------------


def test_folder_that_cannot_be_made(launch: Cli, tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "file").write_text("")
    one_line(launch(f"{FAKE} output_dir file/run"), "output/file/run", "output_dir")
    one_line(launch(f"{FAKE} output_dir file"), "output/file", "output_dir")


def test_other_options_in_the_same_folder(launch: Cli, own_run: Path) -> None:
    before = tree(own_run)
    one_line(launch(f"{SHORT} lr 0.3"), "output/run", "lr is 0.2 there and 0.3 here", "output_dir", "resume False")
    assert tree(own_run) == before


@pytest.mark.parametrize("content", ["", "lr: [", "- a\n", None])
def test_damaged_config(launch: Cli, own_run: Path, content: str | None) -> None:
    """The checkpoint knows its options by their hash; the file is written again where the command has them."""
    whole = (own_run / "config.yaml").read_text()
    (own_run / "config.yaml").write_text(whole.replace("lr: 0.2", "lr: 0.3") if content is None else content)
    one_line(launch(f"{SHORT} lr 0.3"), "config.yaml", "resume False")
    assert launch(SHORT).returncode == 0
    one_line(launch(f"{FAKE} test_only True model_dir run ensemble wise"), "config.yaml", "damaged")
    assert launch(f"{SHORT} test_only True").returncode == 0
    assert (own_run / "config.yaml").read_text() == whole


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_result_is_made_again(launch: Cli, own_run: Path, content: str) -> None:
    whole = json.loads((own_run / "metrics.json").read_text())
    (own_run / "metrics.json").write_text(content)
    done = launch(SHORT)
    assert done.returncode == 0 and "metrics.json is damaged" in done.stdout
    again = json.loads((own_run / "metrics.json").read_text())
    assert again["test"] == whole["test"] and again["train"] == whole["train"]


def test_damaged_logits_are_computed_again(launch: Cli, own_run: Path) -> None:
    (own_run / "logits.safetensors").write_bytes(b"torn")
    done = launch(f"{SHORT} test_only True many_above 5")
    assert done.returncode == 0
    assert "using the logits" not in done.stdout


@contextmanager
def signal_after(step: int, number: int = signal.SIGINT) -> Iterator[None]:
    """The process gets a signal in the middle of a step of training."""
    original = Method.after_step

    def after_step(self: Method, done: int) -> None:
        original(self, done)
        if done == step:
            signal.raise_signal(number)

    Method.after_step = after_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        Method.after_step = original  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that was interrupted after three, with its last two states; not to be changed."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, signal_after(3):
        patch.chdir(folder)
        assert main.main(SHORT.split()) == 130
    assert [path.name for path in states(folder / RUN)] == ["00000002", "00000003"]
    return folder / RUN


@pytest.fixture
def unfinished(interrupted: Path, tmp_path: Path) -> Path:
    """A copy of it in this test's scratch folder."""
    shutil.copytree(interrupted, tmp_path / RUN)
    return tmp_path / RUN


def reseal(*paths: Path) -> None:
    """Make the run's marker agree with files that were changed."""
    found = Manifest.read(paths[0].parents[2])
    assert found is not None
    found.seal({path: Digest.of(path.read_bytes()) for path in paths})


def states(run: Path) -> list[Path]:
    return sorted(each for each in (run / "state").iterdir() if not each.name.startswith("."))


@pytest.mark.parametrize("name", ["tensors.safetensors", "facts.json"])
def test_torn_state_goes_back_to_the_one_before(launch: Cli, unfinished: Path, name: str) -> None:
    file = states(unfinished)[-1] / name
    file.write_bytes(file.read_bytes()[:-9])
    done = launch(SHORT)
    assert done.returncode == 0
    assert done.stdout.count(f"00000003/{name} is damaged") == 1
    assert "resuming after step 2" in done.stdout
    assert json.loads((unfinished / "metrics.json").read_text())["train"]["steps"] == 4


def test_all_states_damaged(launch: Cli, unfinished: Path) -> None:
    for state in states(unfinished):
        (state / "tensors.safetensors").write_bytes(b"")
    one_line(launch(SHORT), "every state", "resume False")
    assert launch(f"{SHORT} resume False").returncode == 0


def test_state_of_another_run(launch: Cli, unfinished: Path) -> None:
    for state in states(unfinished):
        facts = json.loads((state / "facts.json").read_text())
        facts["identity"]["config"] = "0123456789abcdef"
        (state / "facts.json").write_text(json.dumps(facts))
        reseal(state / "facts.json")
    before = tree(unfinished)
    one_line(launch(SHORT), "another run", "0123456789abcdef", "resume False", "output_dir")
    assert tree(unfinished) == before


def test_state_with_other_tensors(launch: Cli, unfinished: Path) -> None:
    """Whole, and of this run by its own account, but it does not fit."""
    for state in states(unfinished):
        tensors, facts = read_folder(state)
        write_folder(state, {name: each for name, each in tensors.items() if "head" not in name}, facts)
        reseal(state / "facts.json", state / "tensors.safetensors")
    one_line(launch(SHORT), "state", "missing", "head.weight", "resume False")


def test_disk_full(launch: Cli, unfinished: Path) -> None:
    """The limit on file sizes stands for it. What was saved stays whole; with space again the run goes on."""
    before = tree(unfinished)
    with files_of_at_most(max(map(len, before.values())) // 2):
        one_line(launch(SHORT), "cannot write", "00000004", "free the space", "output_dir")
    assert tree(unfinished) == before
    done = launch(SHORT)
    assert done.returncode == 0
    assert "resuming after step 3" in done.stdout


@pytest.mark.parametrize("size", [0, pytest.param(100, marks=pytest.mark.slow), 3000, 9000])
def test_disk_full_from_the_start(launch: Cli, size: int) -> None:
    """Not even log, config and curves can be written."""
    with files_of_at_most(size):
        one_line(launch(SHORT), "cannot write", "free the space")
    assert launch(SHORT).returncode == 0


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_another_process_holds(launch: Cli) -> None:
    RUN.mkdir(parents=True)
    with FileLock(RUN / LOCK):
        one_line(launch(SHORT), "output/run", "in use", "output_dir")
        one_line(launch(SHORT, "resume False"), "in use")
    assert launch(SHORT).returncode == 0


@pytest.mark.slow
def test_two_launches_in_one_folder(launch: Cli, tmp_path: Path) -> None:
    words = f"{FAKE} num_epochs 100000 save_every 1 output_dir run".split()
    command = [sys.executable, str(ROOT / "main.py"), *words]
    first = subprocess.Popen(command, cwd=tmp_path, env=offline(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: (tmp_path / RUN / "state").is_dir() and bool(states(tmp_path / RUN)), first)
        one_line(launch(*words), "output/run", "in use", "output_dir")
        one_line(launch(*words, "resume False"), "in use")
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 130
    finally:
        first.kill()
        first.communicate()
    assert states(tmp_path / RUN)


def wait_for(there: Callable[[], bool], process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


# --- numbers that are none -------------------------------------------------------------------------------------------


def test_loss_that_is_not_finite(launch: Cli) -> None:
    words = SHORT.replace("max_steps 4", "num_epochs 2")
    done = launch(f"{words} lr 1e30")
    one_line(done, "not finite", "lower lr")
    for state in states(RUN):
        kept = {name: each for name, each in read_folder(state)[0].items() if name.startswith("method.")}
        assert all(bool(each.isfinite().all()) for each in kept.values())


def test_weights_that_are_not_finite_after_the_last_step(launch: Cli) -> None:
    """The loss of the only step is finite; what the step makes of the weights is not, or gives no finite logits."""
    one_line(launch(f"{FAKE} max_steps 1 lr 1e38 output_dir run"), "not finite", "lower lr")
    assert not (RUN / "metrics.json").exists()


def test_empty_group(launch: Cli) -> None:
    done = launch(f"{SHORT} many_above 1000")
    assert done.returncode == 0
    assert json.loads((RUN / "metrics.json").read_text())["test"]["many_acc"] is None
    assert "n/a" in done.stdout
    assert "nan" not in done.stdout
