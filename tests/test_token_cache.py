"""`feature_cache` where only the last blocks of a ViT train: the tokens before them are computed once."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import Cli
from test_feature_cache import WORDS, Config, assert_same, encoded, outcome, photographs
from tiers import slow_except

from tailtune.datasets.images.tensor_transforms import TENSOR_AUGMENTS
from tailtune.datasets.images.transforms import FIXED
from tailtune.datasets.view import View
from tailtune.models.backbones.transformer_encoder import TransformerEncoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.trainers.methods import Method
from tailtune.trainers.token_store import TOKENS_NOTE

__all__ = ["photographs"]
TOKENS = Path("kept/tokens")
TOP = ("adaptformer", True, "partial", 2)
"""The embedded CLIP has six blocks."""


@contextmanager
def blocks_run() -> Iterator[set[int]]:
    """The blocks of images that run."""
    found: set[int] = set()
    run = TransformerEncoder.run_block

    def noted(self: TransformerEncoder, x: torch.Tensor, index: int, *rest: object) -> torch.Tensor:
        found.update({index} if isinstance(self, ViTEncoder) and not x.is_meta else ())
        return run(self, x, index, *rest)  # type: ignore[arg-type]

    with mock.patch.object(TransformerEncoder, "run_block", noted):
        yield found


# --- runs ----------------------------------------------------------------------------------------------------------

RUNS = [
    "adaptformer True partial 2 val_per_class 1 val_every 1 num_epochs 2",
    "full_tuning True partial 1 prec bf16 residual_dtype fp32",
    "adapter True partial 2 num_experts 2 expert_split 1 method ride",
    "clip_lora True clip_lora_layers 2 micro_batch_size 16",
    "lora True partial 2 bias_tuning True grad_checkpoint True",
    "peft LoRA partial 2",
    "vpt_deep True partial 3 init_head class_mean method batchformer",
]


@pytest.mark.parametrize("words", slow_except(RUNS[:1], RUNS))
def test_a_second_run_starts_at_the_first_block_that_trains(words: str, launch: Cli) -> None:
    ran = {}
    for run in ("cold", "warm", "off"):
        with blocks_run() as ran[run]:
            done = launch(WORDS, words, "output_dir", run, "feature_cache", run != "off")
        assert done.returncode == 0, done.stderr
    assert ran["cold"] == ran["off"] == {*range(6)} and ran["warm"] <= {3, 4, 5}
    assert_same("warm", "cold")
    # Here the batches of the tokens are not those of the training, so a kernel may round otherwise.
    assert_same("off", "cold", 0.02 if "bf16" in words else 1e-4)
    notes = [outcome(run)[2]["notes"] for run in ("cold", "warm", "off")]
    assert notes[0] == notes[1] and TOKENS_NOTE in notes[0] and TOKENS_NOTE not in notes[2]


# --- which tokens are kept -------------------------------------------------------------------------------------------


def first_block(method: Method) -> None:
    method.model.encoder.blocks[0].get_submodule("norm1").get_parameter("weight").data.mul_(1.5)


def last_block(method: Method) -> None:
    method.model.encoder.blocks[-1].get_submodule("norm1").get_parameter("weight").data.mul_(1.5)


def test_an_entry_belongs_to_the_blocks_below(photographs: Path, config: Config) -> None:
    def entries(*words: object, change: Callable[[Method], object] = lambda method: None) -> int:
        view = encoded(config, *words, change=change)
        assert view is not None and view.batch([3, 0, -1])["image"].shape[1:] == (1, 17, 128)
        return len(list(TOKENS.glob("*.safetensors")))

    assert entries(*TOP) == 1
    assert entries(*TOP, change=last_block) == 1
    assert entries("lora", True, "partial", 2, "lr", 3, "batch_size", 5) == 1, "other tuners of the same blocks"
    assert entries("partial", 2, "ln_tuning", True, "method", "ride", "num_experts", 2) == 1
    assert entries("peft", "LoRA", "partial", 2) == 1
    assert entries(*TOP, change=first_block) == 2
    assert entries("adaptformer", True, "partial", 3) == 3
    assert entries(*TOP, "prec", "bf16") == 4
    assert entries(*TOP, "augment", "none") == 5
    assert not [path for path in TOKENS.iterdir() if path.suffix not in (".safetensors", ".json")]


@torch.no_grad()
@pytest.mark.parametrize("words", [TOP, ("classifier", "TextClassifier", "projection_tuning", True)])
def test_a_batch_has_the_tokens_of_its_images(words: tuple[object, ...], photographs: Path, config: Config) -> None:
    """In any order; where only the projection trains, one token of an image is enough."""
    methods: list[Method] = []
    view = encoded(config, *words, change=methods.append)
    assert view is not None
    model, keys = methods[0].model.eval(), [(4, 1), (4, 0), (9, 2)]
    images = View(view.source, view.indices, view.transform)
    found, wanted = (each.batch(keys)["image"] for each in (view, images))
    assert torch.allclose(model.features(found), model.features(wanted), atol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ("adaptformer", True, "partial", 4),
        ("adaptformer", True, "partial", "[0,2]"),
        ("vpt_deep", True, "partial", 2, "ln_tuning", True, "ln_tuning_layers", "[0]"),
        (*TOP, "augment", "lift"),
        (*TOP, "method", "mixup"),
        (*TOP, "classifier", "TextClassifier", "context", "maple", "context_len", 2, "context_depth", 2),
        (*TOP, "feature_cache_gb", 0),
        (*TOP, "feature_cache", False),
    ],
    ids=lambda words: " ".join(map(str, words)),
)
def test_runs_that_encode_images(words: tuple[object, ...], photographs: Path, config: Config) -> None:
    assert encoded(config, *words) is None and not TOKENS.exists()


def test_without_room_a_run_encodes_images(
    photographs: Path, config: Config, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit holds for all entries together, and a disk that is nearly full gets none."""
    size = 10 * 17 * 128 * 4
    with caplog.at_level(logging.WARNING, "tailtune"):
        assert encoded(config, *TOP, "feature_cache_gb", 1.5 * size / 1e9) is not None and not caplog.records
        assert encoded(config, *TOP, "augment", "none", "feature_cache_gb", 1.5 * size / 1e9) is None
        assert "feature_cache_gb leaves" in caplog.text and "every image is encoded again" in caplog.text
        monkeypatch.setattr("shutil.disk_usage", lambda _: mock.Mock(free=size))
        assert encoded(config, *TOP, "augment", "none") is None
    assert len(caplog.messages) == 2 and "are free" in caplog.messages[1] and "\n" not in "".join(caplog.messages)
    assert len(list(TOKENS.iterdir())) == 2


@pytest.mark.slow
def test_a_run_warns_once_for_each_split(launch: Cli) -> None:
    words = "val_per_class 1 val_every 1 num_epochs 3 batch_size 330 feature_cache_gb 1e-6 output_dir limited"
    done = launch(WORDS, *TOP, words)
    assert done.returncode == 0 and len(outcome("limited")[2]["train"]["validations"]) == 3
    assert (done.stdout + done.stderr).count("are not kept") == 3


def test_a_frozen_encoder_has_no_dropout(photographs: Path, config: Config) -> None:
    methods: list[Method] = []
    assert encoded(config, "clip_lora", True, "clip_lora_layers", 2, change=methods.append) is not None
    encoder = methods[0].model.encoder
    assert isinstance(encoder, ViTEncoder) and encoder.constant_blocks == 4
    methods[0].freeze_trained(encoder)
    methods[0].train()
    assert not any(module.training for module in encoder.tuners.modules())
    assert encoder.constant_blocks == encoder.depth and encoder.is_constant


def test_a_damaged_entry_is_written_again(photographs: Path, config: Config, caplog: pytest.LogCaptureFixture) -> None:
    first = encoded(config, *TOP)
    (path,) = TOKENS.glob("*.safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "tailtune"):
        assert first is not None and encoded(config, *TOP) is not None
    assert len(caplog.records) == 1 and "it is computed again" in caplog.text and path.read_bytes() == content


def test_images_of_which_one_cannot_be_read(photographs: Path, config: Config) -> None:
    def cut_off(method: Method) -> None:  # after the files have been checked
        photographs.write_bytes(photographs.read_bytes()[:60])

    assert encoded(config, *TOP, "on_bad_image", "skip", change=cut_off) is None
    assert not [*TOKENS.iterdir()]


def test_the_augmentations_without_draws() -> None:
    made = {name: make(32, "bicubic") for name, make in TENSOR_AUGMENTS.items()}
    assert {name for name, each in made.items() if each.cut is None and not each.finish} == {*FIXED}
