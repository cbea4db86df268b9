"""The Python API: `tailtune.train`, `tailtune.load` and `tailtune.build_model`, as a notebook uses them."""

import logging
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import offline
from PIL import Image
from safetensors.torch import load_file
from test_bad_input import signal_after

import tailtune
from tailtune import TrainedModel, TrainedRun, UserError, main
from tailtune.datasets.build_data import build_data
from tailtune.models import ClassificationModel

QUICK: dict[str, Any] = {"max_steps": 2, "num_workers": 0, "max_test_images": 60}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("api")


@pytest.fixture(scope="module")
def trained(home: Path) -> Iterator[TrainedRun]:
    """A run on digits with the embedded CLIP; the tests of this module do not change its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield tailtune.train("digits_lt", "tiny_clip_peft", **QUICK, output_dir="digits")


@pytest.fixture
def model(trained: TrainedRun, home: Path, monkeypatch: pytest.MonkeyPatch) -> TrainedModel:
    monkeypatch.chdir(home)
    return tailtune.load(trained.folder)


# --- the module ------------------------------------------------------------------------------------------------------


def test_the_names_of_the_module() -> None:
    assert dir(tailtune) == sorted(tailtune.__all__)
    assert {"load", "build_model", "train", "UserError", "__version__"} <= set(dir(tailtune))
    assert all(getattr(tailtune, name) is not None for name in tailtune.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        tailtune.lod  # noqa: B018


def test_importing_it_is_light() -> None:
    code = "import sys, tailtune; print({'torch', 'numpy', 'yaml'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], env=offline(PYTHONPATH=str(tailtune.ROOT)), capture_output=True)
    assert (done.stdout, done.stderr) == (b"set()\n", b"")


# --- load ------------------------------------------------------------------------------------------------------------


def test_logits_of_a_loaded_run_are_the_stored_ones(model: TrainedModel) -> None:
    test = build_data(model.config).test
    images = [test.source.load(int(index)) for index in test.indices]
    logits = model.predict_logits(torch.stack([model.preprocess(image) for image in images]))
    stored = load_file(model.folder / "logits.safetensors")
    assert stored["index"].tolist() == list(range(len(images)))
    expected = stored["logits"].float() + stored["row_max"].unsqueeze(-1)
    assert (logits.shape, logits.dtype, logits.requires_grad) == ((60, 10), torch.float32, False)
    torch.testing.assert_close(logits, expected.squeeze(1), atol=0.01, rtol=1e-3)  # stored in half precision
    assert model.features(torch.zeros(2, 3, 32, 32)).shape == (2, 128)


def test_what_a_loaded_run_knows(model: TrainedModel, trained: TrainedRun) -> None:
    assert model.class_names[:2] == ("digit zero", "digit one")
    assert list(model.class_counts) == trained.metrics["class_counts"]
    assert (model.config.adapter_dim, model.resolution, model.device) == (8, 32, torch.device("cpu"))
    assert not model.method.training and not any(each.requires_grad for each in model.method.parameters())
    assert "method=" not in repr(model)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_preprocess_takes_images_of_any_mode_and_size(model: TrainedModel, mode: str) -> None:
    grey = np.arange(40 * 50, dtype=np.uint16).reshape(40, 50)
    image = Image.fromarray(grey) if mode == "I;16" else Image.fromarray((grey % 256).astype(np.uint8)).convert(mode)
    done = pickle.loads(pickle.dumps(model.preprocess))(image)  # data loaders send it to other processes
    assert (done.shape, done.dtype) == ((3, 32, 32), torch.float32)
    assert done.min() >= -1 and done.max() <= 1, "the embedded CLIP expects (x − 0.5) / 0.5"


def test_a_run_is_found_by_its_name(model: TrainedModel, trained: TrainedRun) -> None:
    assert tailtune.load("digits").folder == trained.folder == trained.load("cpu").folder


def test_loading_a_run_needs_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split, label, number in [(s, k, i) for s in ("train", "test") for k in ("owl", "wren") for i in range(2)]:
        path = tmp_path / "birds" / split / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (90 * number, 0, 0)).save(path)
    (tmp_path / "mine.yaml").write_text(f"dataset: ImageFolder\nroot: {tmp_path}/birds\n")
    monkeypatch.chdir(tmp_path)
    run = tailtune.train(tmp_path / "mine.yaml", "tiny_clip_peft", **QUICK, batch_size=4)
    shutil.rmtree(tmp_path / "birds")
    (tmp_path / "mine.yaml").unlink()
    assert (run.load().class_names, run.load().class_counts) == (("owl", "wren"), (2, 2))


def test_a_zero_shot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tailtune.train("digits_lt", "zstiny_clip", **QUICK)
    stored = load_file(run.folder / "logits.safetensors")
    found = run.load()
    test = build_data(found.config).test
    images = torch.stack([found.preprocess(test.source.load(int(index))) for index in test.indices[:5]])
    expected = stored["logits"][:5, 0].float() + stored["row_max"][:5]
    torch.testing.assert_close(found.predict_logits(images), expected, atol=0.02, rtol=1e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: tailtune.load("nowhere"),
            "load: nowhere holds no checkpoint/; name the folder",
        ),
        (lambda model: tailtune.load(model.folder, "cuda:77"), "device 'cuda:77': "),
        (lambda model: tailtune.load(model.folder, "toaster"), "device 'toaster': "),
        (
            lambda model: model.predict_logits(torch.zeros(3, 32, 32)),
            r"\[N, 3, 32, 32\], not \[3, 32, 32\]",
        ),
        (lambda model: model.features(torch.zeros(1, 3, 32, 31)), r"not \[1, 3, 32, 31\]"),
    ],
)
def test_wrong_input_of_load(model: TrainedModel, call: Callable[[TrainedModel], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_checkpoint_of_another_project_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pth.tar").write_bytes(b"")
    with pytest.raises(UserError, match="a checkpoint of another project.*test_only True model_dir"):
        tailtune.load(tmp_path)


# --- train -----------------------------------------------------------------------------------------------------------


def test_train_is_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same run folder, so the command shows the result of the call."""
    monkeypatch.chdir(tmp_path)
    options = {"lr": 0.1, "bias_tuning": True, "lr_factors": {"tuner": 0.5}, "test_dists": ["uniform"]}
    options |= {"pretrained": None, "las.smooth_head": 0.3}
    run = tailtune.train("fake_lt", "tiny_clip_peft", **QUICK, **options)
    AcceleratorState._reset_state(reset_partial_state=True)
    capsys.readouterr()
    pairs = ["lr", "0.1", "bias_tuning", "True", "lr_factors", "{tuner: 0.5}", "test_dists", "uniform"]
    pairs += ["pretrained", "none", "las.smooth_head", "0.3"]
    words = [word for key, value in QUICK.items() for word in (key, str(value))]
    assert main.main(["-d", "fake_lt", "-m", "tiny_clip_peft", *words, *pairs]) == 0
    assert f"finished before; the result of {run.folder / 'metrics.json'}" in capsys.readouterr().out


def test_the_second_call_returns_the_result_of_the_first(
    trained: TrainedRun, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(home)
    again = tailtune.train("digits_lt", "tiny_clip_peft", **QUICK, output_dir="digits")
    assert "finished before" in capsys.readouterr().out
    assert (again.folder, again.metrics) == (trained.folder, trained.metrics)
    assert set(trained.metrics["test"]) >= {"accuracy", "few_acc"}


def test_metrics_are_those_of_the_evaluation_that_was_asked_for(
    trained: TrainedRun, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(home / trained.folder, tmp_path / trained.folder)
    monkeypatch.chdir(tmp_path)
    later = tailtune.train("digits_lt", "tiny_clip_peft", **QUICK, output_dir="digits", tte=True)
    assert later.folder == trained.folder
    assert (later.metrics["evaluation"]["tte"], trained.metrics["evaluation"]["tte"]) == (True, False)


def test_train_leaves_the_process_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Signals, the log and its handlers; a notebook has its own."""
    monkeypatch.chdir(tmp_path)
    log, own = logging.getLogger("tailtune"), logging.NullHandler()
    monkeypatch.setattr(log, "handlers", [own])
    monkeypatch.setattr(log, "propagate", True)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [*map(signal.getsignal, numbers), log.propagate, log.level, logging.raiseExceptions]
    tailtune.train("fake_lt", "tiny_clip_peft", **QUICK, pretrained=None)
    assert "run folder" in capsys.readouterr().out
    assert [*map(signal.getsignal, numbers), log.propagate, log.level, logging.raiseExceptions] == before
    assert log.handlers == [own]


def test_an_interrupted_call_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = {**QUICK, "max_steps": 4, "pretrained": None}
    with signal_after(2), pytest.raises(KeyboardInterrupt, match="the same call continues"):
        tailtune.train("fake_lt", "tiny_clip_peft", **options)
    assert tailtune.train("fake_lt", "tiny_clip_peft", **options).metrics["train"]["steps"] == 4


def test_train_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There Python lets nobody handle signals; a web server trains there."""
    monkeypatch.chdir(tmp_path)
    runs: list[TrainedRun] = []
    thread = threading.Thread(
        target=lambda: runs.append(tailtune.train("fake_lt", "tiny_clip_peft", **QUICK, pretrained=None))
    )
    thread.start()
    thread.join(120)
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lrr": 1}, "train: unknown option 'lrr'; did you mean 'lr'?"),
        ({"lr": "fast"}, "train: lr must be a number, not 'fast'"),
        ({"lr_factors": {"tuner": Path()}}, "lr_factors: .* must hold texts and numbers only"),
        ({"model": "tiny"}, "unknown model config 'tiny'"),
        ({"zero_shot": True}, "zero_shot trains nothing, so adaptformer would do nothing"),
    ],
)
def test_wrong_input_of_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        tailtune.train(**{"data": "fake_lt", "model": "tiny_clip_peft", **options})
    assert not list(tmp_path.iterdir())


# --- build_model -----------------------------------------------------------------------------------------------------


def test_a_built_model_is_where_a_run_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tuners, and the head that is made of the class names."""
    monkeypatch.chdir(tmp_path)
    net = tailtune.build_model("tiny_clip_peft", "digits_lt")
    run = tailtune.train("digits_lt", "tiny_clip_peft", **QUICK, num_epochs=0)
    untrained = run.load().method.model.state_dict()
    assert isinstance(net, ClassificationModel) and net.state_dict().keys() == untrained.keys()
    assert all(torch.equal(tensor, untrained[name]) for name, tensor in net.state_dict().items())
    trains = {name.partition(".")[0] for name, each in net.named_parameters() if each.requires_grad}
    assert trains == {"encoder", "head"} and net.counts()["trainable"] == 15_926
    zero_shot = tailtune.build_model("zstiny_clip", "digits_lt")
    assert not any(each.requires_grad for each in zero_shot.parameters())


def test_a_model_for_given_classes() -> None:
    net = tailtune.build_model("tiny_clip", class_names=["zero", "one", "two"], lora=True)
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 3) and net.init is None
    assert net.counts()["tuner"] > 0
    experts = tailtune.build_model("tiny_clip_sade", class_names=["zero", "one"], pretrained=None)
    assert experts(torch.zeros(2, 3, 32, 32)).shape == (2, 3, 2)
    scratch = tailtune.build_model("resnet32_ce", num_classes=7)
    assert scratch(torch.zeros(2, 3, 32, 32)).shape == (2, 1, 7)
    assert tailtune.build_model("resnet32_ce", "fake_lt", num_classes=5).head.weight.shape[0] == 5


def test_a_head_that_needs_images_stays_random(caplog: pytest.LogCaptureFixture) -> None:
    net = tailtune.build_model("tiny_clip", num_classes=3, init_head="class_mean")
    assert "init_head class_mean reads training images, so the classifier stays random" in caplog.text
    assert net.init is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give either data, class_names or num_classes"),
        ({"data": "digits_lt", "class_names": ["a", "b"]}, "give either data, class_names or num_classes"),
        ({"num_classes": 3}, "made from the names of the classes: give class_names"),
        ({"class_names": ["one"]}, "at least two classes, not 1"),
        ({"class_names": ["a", "b"], "lorra": True}, "build_model: unknown option 'lorra'"),
    ],
)
def test_wrong_input_of_build_model(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tailtune.build_model("tiny_clip", **given)


@pytest.mark.parametrize(
    "named, says",
    [
        ({"num_classes": "3"}, "num_classes must be a whole number, not '3'"),
        ({"num_classes": True}, "num_classes must be a whole number, not 'True'"),
        ({"class_names": "abc"}, "a list of names, not one text"),
        ({"class_names": ["a", "b"], "num_classes": 2}, "either data, class_names or num_classes"),
    ],
)
def test_classes_that_cannot_be_meant(named: dict[str, Any], says: str) -> None:
    with pytest.raises(tailtune.UserError, match=says):
        tailtune.build_model("tiny_clip", init_head=None, pretrained=None, **named)


def test_names_that_look_like_placeholders_are_names() -> None:
    model = tailtune.build_model("tiny_clip", class_names=["class 0", "class 1"], init_head="text_feat")
    assert len(model.head.get_parameter("weight")) == 2


def test_numbers_within_mappings_and_lists() -> None:
    """Small numbers stay numbers (YAML takes 1e-05 for a text), and those of NumPy are numbers too."""
    names = ["a", "b"]
    tailtune.build_model(
        "tiny_clip", class_names=names, peft="LoRA", peft_args={"lora_dropout": 1e-5, "r": np.int64(2)}
    )
    with pytest.raises(tailtune.UserError, match="adam_betas"):
        tailtune.build_model("tiny_clip", class_names=names, adam_betas=[object()])


def test_load_refuses_what_predicts_nothing(trained: TrainedRun, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    for device in ("meta", 3.5):
        with pytest.raises(tailtune.UserError, match="device"):
            tailtune.load(trained.folder, device)  # type: ignore[arg-type]


def test_a_run_loads_the_model_that_was_evaluated(
    trained: TrainedRun, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(home)
    words = {**QUICK, "test_only": True, "few_below": 3}
    other = tailtune.train(
        "digits_lt", "tiny_clip_peft", **words, output_dir="elsewhere", model_dir=str(trained.folder)
    )
    assert other.folder != trained.folder and other.load().folder == trained.folder
    mixed = tailtune.train("digits_lt", "tiny_clip_peft", **words, output_dir="digits", ensemble="wise")
    with pytest.raises(tailtune.UserError, match="of an ensemble"):
        mixed.load()
