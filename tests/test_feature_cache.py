"""`feature_cache`: features of a frozen encoder are computed once, and a run ends with the same numbers."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from feature_runs import WORDS, assert_same, counted, outcome
from PIL import Image
from safetensors.torch import load_file
from yacs.config import CfgNode

from tailtune.datasets.build_data import build_data
from tailtune.datasets.feature_view import FeatureView
from tailtune.datasets.view import PADDING, View
from tailtune.models.backbones.clip_text_encoder import ClipTextEncoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.feature_store import NOTE, FeatureStore
from tailtune.trainers.methods import Method
from tailtune.trainers.precision import PRECISIONS
from tailtune.trainers.runs.load_run import make_method
from tailtune.trainers.storage.resume_states import ResumeStates

Config = Callable[..., CfgNode]
FOLDER = ("feature_cache_dir", "kept")


# --- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "entries"),
    [
        ("init_head class_mean", 2),  # the head and the training read the same entry
        pytest.param("init_head text_feat", 3, marks=pytest.mark.slow),
        pytest.param("init_head linear_probe prec bf16 image_backend pil", 3, marks=pytest.mark.slow),
        pytest.param("init_head 10_shot val_per_class 1 val_every 1 num_epochs 2", 4, marks=pytest.mark.slow),
    ],
)
def test_a_second_run_encodes_nothing_and_has_the_same_bits(words: str, entries: int, launch: Cli) -> None:
    calls = []
    for run in ("cold", "warm", "off"):
        with counted(ViTEncoder, "trunk") as images, counted(ClipTextEncoder, "class_features") as texts:
            done = launch(WORDS, words, "output_dir", run, "feature_cache", run != "off")
        assert done.returncode == 0, done.stderr
        calls.append(images.call_count + texts.call_count)
    assert calls[0] and not calls[1] and calls[2] > calls[0]
    assert len(list(Path("kept").iterdir())) == entries
    assert_same("warm", "cold")
    # Here the batches of the features are not those of the training, so a kernel may round otherwise.
    assert_same("off", "cold", 0.02 if "bf16" in words else 1e-4)
    notes = [outcome(run)[2]["notes"] for run in ("cold", "warm", "off")]
    assert notes[0] == notes[1] and NOTE in notes[0] and NOTE not in notes[2]


def test_tip_adapter_and_zero_shot_encode_nothing_again(launch: Cli) -> None:
    """Both run the same encoders, with the projection, so the second model finds what the first one has kept."""
    calls = []
    for run, model in (("first", "tiny_clip_tip"), ("second", "tiny_clip_tip"), ("other", "zstiny_clip")):
        with counted(ViTEncoder, "trunk") as images, counted(ClipTextEncoder, "class_features") as texts:
            done = launch("-d digits_lt -m", model, *FOLDER, "max_test_images 70 output_dir", run)
        assert done.returncode == 0, done.stderr
        calls.append(images.call_count + texts.call_count)
    assert calls[0] and not any(calls[1:])
    assert_same("first", "second")


@pytest.mark.parametrize(("tuner", "of_trained"), [("adapter False", 0), ("adapter True", 2)])
def test_an_ensemble_encodes_the_test_images_once_with_a_frozen_encoder(
    tuner: str, of_trained: int, launch: Cli
) -> None:
    """Each encoder has two batches of them. With an α of 1 the logits are those of the run."""
    words = f"{WORDS} {tuner} output_dir run"
    assert launch(words).returncode == 0
    calls = []
    for alpha in (0, 1):
        with counted(ViTEncoder, "trunk") as images:
            done = launch(words, "test_only True ensemble logits ensemble_alpha", alpha)
        assert done.returncode == 0, done.stderr
        calls.append(images.call_count)
    assert calls == [of_trained + 2, of_trained]
    newest = max(Path("output").glob("run/tests/*/logits.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    found, wanted = load_file(newest), load_file("output/run/logits.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_resumed_stage_has_the_features_of_its_own_encoder(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen encoder of a second stage is that of the first, which a resumed run knows from its state only."""
    experts = "adapter True num_experts 2 expert_split 1"
    earlier = " ".join(f"after.{word}" if number % 2 == 0 else word for number, word in enumerate(experts.split()))
    words = "-d digits_lt -m tiny_clip augment whole max_test_images 20 subset_cap 8 batch_size 32 lr 0.1"
    words += f" method crt {experts} max_steps 3 save_every 1"
    words += f" after tiny_clip {earlier} after.augment whole after.lr 0.5 after.max_steps 2"
    words += " after.subset_cap 8 after.batch_size 32"
    assert launch(words, "feature_cache_dir one output_dir whole").returncode == 0
    save = ResumeStates.save

    def killed(self: ResumeStates, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 2 and self.folder.parent.name == "killed":
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(ResumeStates, "save", killed)
        launch(words, "feature_cache_dir one output_dir killed")
    with counted(ViTEncoder, "branch") as encoded:
        done = launch(words, "feature_cache_dir other output_dir killed")  # nothing is kept here
    assert done.returncode == 0 and "resuming after step 2" in done.stderr + done.stdout and encoded.call_count
    assert_same("whole", "killed")


# --- what a feature depends on ---------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PNG file among those in class folders, for which there is a YAML in the working directory."""
    monkeypatch.chdir(tmp_path)
    for number in range(12):
        path = tmp_path / "images" / ("test" if number < 2 else "train") / ("bee", "ant")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((40, 36, 3), 20 * number, dtype=np.uint8)).save(path)
    Path("mine.yaml").write_text("dataset: ImageFolder\nroot: images\n")
    return path


def encoded(
    config: Config, *words: object, change: Callable[[Method], object] = lambda method: None
) -> FeatureView | None:
    """The features of the training images; None if the images are encoded again and again."""
    cfg = config("mine.yaml", "tiny_clip", "pretrained", "none", "augment", "whole", *FOLDER, *words)
    data, accelerator = build_data(cfg), make_accelerator(Devices.of(cfg))
    method = make_method(cfg, data.info)
    method.model.set_precision(PRECISIONS[cfg.prec].compute)
    change(method)
    found = FeatureStore.of(cfg, accelerator).view_of(method, data.train)
    return found if isinstance(found, FeatureView) else None


def scale(method: Method) -> None:
    next(method.model.encoder.parameters()).data.mul_(1.5)


def other_heads(method: Method) -> None:
    """As many weights, and another function."""
    method.model.encoder.net.blocks[0].attn.num_heads = 1


def test_every_change_of_what_a_feature_depends_on_makes_another_entry(photographs: Path, config: Config) -> None:
    entries = 0

    def assert_new(new: bool, *words: object, change: Callable[[Method], object] = lambda method: None) -> None:
        nonlocal entries
        assert encoded(config, *words, change=change) is not None
        entries += new
        assert len(list(Path("kept").iterdir())) == entries, (words, change)

    assert_new(True)
    assert_new(False)
    assert_new(False, "lr", 3, "seed", 0, "init_head", "none", "batch_size", 5)
    assert_new(True, change=scale)
    assert_new(True, change=other_heads)
    for words in (("prec", "bf16"), ("prec", "fp64"), ("test_batch_size", 3), ("pixel_mean", "[0.1,0.2,0.3]")):
        assert_new(True, *words)
    for words in (("augment", "none"), ("interpolation", "bicubic"), ("image_backend", "pil"), ("resolution", 40)):
        assert_new(True, *words)
    assert_new(True, "data_fingerprint", "content")
    before = photographs.stat()
    Image.fromarray(np.full((40, 36, 3), 181, dtype=np.uint8)).save(photographs)
    assert_new(True)
    os.utime(photographs, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert photographs.stat().st_size == before.st_size
    assert_new(True, "data_fingerprint", "content")  # the same size and the same time
    torch.set_num_threads(2)
    assert_new(True)
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "words",
    [
        ("augment", "lift"),
        ("augment", "digits"),
        ("augment", "lift", "image_backend", "pil"),
        ("adapter", True),
        ("bias_tuning", True),
        pytest.param(
            ("peft", "IA3", "peft_args", "{target_modules: [proj], feedforward_modules: []}"), marks=pytest.mark.slow
        ),
        ("method", "mixup"),
        ("method", "glmc", "pair_sampler", "shuffle"),
        ("classifier", "TextClassifier", "context", "maple", "context_len", 2, "context_depth", 2),
        ("feature_cache", False),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_images_that_have_to_be_encoded_again(words: tuple[object, ...], photographs: Path, config: Config) -> None:
    assert encoded(config, *words) is None
    assert not Path("kept").exists()


@pytest.mark.parametrize(
    "words", [("context", "coop", "context_len", 2), ("clip_adapter", "residual"), ("text_lora", True)]
)
def test_images_are_encoded_once_where_only_texts_train(
    words: tuple[object, ...], photographs: Path, config: Config
) -> None:
    assert encoded(config, "classifier", "TextClassifier", *words) is not None


@torch.no_grad()
def test_a_batch_has_the_features_of_its_images(photographs: Path, config: Config) -> None:
    """In any order, in pairs, and with black images of weight 0."""
    methods: list[Method] = []
    view = encoded(config, change=methods.append)
    assert view is not None
    images = View(view.source, view.indices, view.transform)
    for keys in ([4, 4, 9, PADDING], [(3, 1, 0, 8, -1), (9, 1, 2, 0, -1)]):
        found, wanted = view.batch(keys), images.batch(keys)
        assert found.keys() == wanted.keys()
        for name in found.keys() - {"image", "partner"}:
            assert torch.equal(found[name], wanted[name]), name
        for name in found.keys() & {"image", "partner"}:
            real = wanted["weight"] > 0
            assert torch.allclose(found[name][real], methods[0].model.features(wanted[name])[real], atol=1e-5)
            assert methods[0].model.features(found[name]) is found[name], "features pass"


def test_an_unreadable_image_has_no_weight_and_nothing_is_kept(photographs: Path, config: Config) -> None:
    """It may be readable in the next run."""

    def cut_off(method: Method) -> None:  # after the files have been checked
        photographs.write_bytes(photographs.read_bytes()[:60])

    view = encoded(config, "on_bad_image", "skip", change=cut_off)
    assert view is not None and view.batch([*range(10)])["weight"].sum() == 9
    assert not Path("kept").exists()


def test_features_that_do_not_fit_into_memory(
    photographs: Path, config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailtune.trainers.feature_store.free_memory", lambda: 100)
    with caplog.at_level(logging.WARNING, "tailtune"):
        assert encoded(config) is None
    assert "every image is encoded again" in caplog.text


@pytest.mark.parametrize("fits", [True, False])
def test_images_are_cached_where_their_features_do_not_fit(
    fits: bool, photographs: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fits:
        monkeypatch.setattr("tailtune.trainers.feature_store.free_memory", lambda: 100)
    words = "-d mine.yaml -m tiny_clip pretrained none init_head none augment whole max_steps 1 batch_size 4 cache ram"
    done = launch(words, *FOLDER, "output_dir run")
    assert done.returncode == 0 and ("cache ram: 10 images" in done.stdout) is not fits, done.stdout
