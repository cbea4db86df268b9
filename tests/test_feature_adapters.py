"""CLIP-Adapter and projection tuning: published logits of a small CLIP, starts, costs, exports."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from small import filled
from small_text import CLASSES, fixture_image_encoder, fixture_images, fixture_tower
from tiers import slow_except
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models import build_model
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.feature_adapters import FeatureAdapterOptions, add_feature_adapters
from tailtune.models.heads.text_classifier import TextClassifier

TEXT = "-d fake_lt -m tiny_clip classifier TextClassifier subset_cap 4 num_epochs 1 max_test_images 20"


def adapted(**options: Any) -> tuple[Any, TextClassifier, TextTower]:
    encoder, head, tower = fixture_image_encoder(), TextClassifier(32, 3, None), fixture_tower()
    head.attach(tower)
    add_feature_adapters(encoder, head, tower, FeatureAdapterOptions(**options), 0)
    return encoder, head, tower


def logits(encoder: Any, head: TextClassifier) -> Tensor:
    return head(encoder(fixture_images()))


@torch.no_grad()
def fill(adapter: nn.Module | None, index: int) -> None:
    """The bottleneck of the fixtures, with the seeds of a block."""
    assert adapter is not None
    seeds = {"ln.weight": 50, "ln.bias": 52, "down_proj.weight": 54, "down_proj.bias": 56}
    for name, seed in {**seeds, "up_proj.weight": 58, "up_proj.bias": 60}.items():
        parameter = adapter.get_parameter(name)
        parameter.copy_(filled(parameter.shape, seed + index, offset=1.0 if name == "ln.weight" else 0.0))


def test_the_original_adapter_gives_the_logits_of_its_authors() -> None:
    encoder, head, _ = adapted(adapter="original", dim=8)
    with torch.no_grad():
        head.adapter.down_proj.weight.copy_(filled((8, 32), 170, 0.3))
        head.adapter.up_proj.weight.copy_(filled((32, 8), 171, 0.3))
    wanted = [[-20.110882, -21.145168, -18.097786], [-22.091499, -23.678753, -20.094139]]
    assert torch.allclose(logits(encoder, head), torch.tensor(wanted), atol=1e-3)


def test_the_residual_adapter_gives_the_logits_of_lift_plus() -> None:
    encoder, head, tower = adapted(adapter="residual")
    start = logits(encoder, head)
    assert torch.allclose(start, logits(*adapted()[:2]), atol=1e-4), "it starts at zero-shot"
    fill(head.adapter, 0), fill(tower.adapter, 1)
    wanted = [[-19.038692, -21.740377, -17.266388], [-20.761715, -23.900282, -19.028641]]
    assert torch.allclose(logits(encoder, head), torch.tensor(wanted), atol=1e-3)


@pytest.mark.parametrize(
    ("pairs", "count"),
    [
        (("clip_adapter", "residual"), 11_272),
        (("clip_adapter", "original"), 131_072),
        (("projection_tuning", True), 655_360),
    ],
)
def test_numbers_of_parameters(pairs: tuple[object, ...], count: int, config: Any) -> None:
    with torch.device("meta"):
        model = build_model(config("fake_lt", "clip_vit_b16", "classifier", "TextClassifier", *pairs), CLASSES)
    assert model.counts()["trainable"] == count


def test_texts_run_through_frozen_blocks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, head, tower = adapted(adapter="residual", projection=True)
    runs = []
    original = TextTower.run_block
    monkeypatch.setattr(TextTower, "run_block", lambda *args, **more: runs.append(1) or original(*args, **more))
    for _ in range(3):
        head.zero_grad(), tower.zero_grad()
        logits(encoder.train(), head.train()).sum().backward()
        with torch.no_grad():
            tower.projection.add_(0.1)
    assert len(runs) == 2 * (1 + len(tower.batches))
    assert tower.projection.grad is not None and encoder.projection.grad is not None
    assert all(each.grad is None for each in tower.net.parameters())


@pytest.mark.parametrize("words", ["clip_adapter original", "clip_adapter residual projection_tuning True"])
def test_runs_train_and_no_head_holds_the_adapter(words: str, launch: Cli) -> None:
    done = launch(TEXT, words, "output_dir run")
    assert done.returncode == 0, done.stderr
    merged = launch(TEXT, words, "output_dir run export merged")
    assert merged.returncode == 2 and "clip_adapter acts between them" in merged.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", ["clip_adapter original", "clip_adapter residual projection_tuning True"])
def test_runs_are_exported(words: str, launch: Cli) -> None:
    assert launch(TEXT, words, "output_dir run export onnx").returncode == 0


@pytest.mark.parametrize("formats", slow_except(["merged peft"], ["merged peft", "onnx"]))
def test_trained_projections_are_exported_as_weights(formats: str, launch: Cli, tmp_path: Path) -> None:
    words = "projection_tuning True text_lora True lora True output_dir run"
    assert launch(TEXT, words).returncode == 0
    for name in formats.split():
        done = launch(TEXT, words, "export", name)
        assert done.returncode == 0, done.stderr


def test_what_does_not_go_together_is_refused(config: Any) -> None:
    words = ("projection_tuning", True, "classifier", "CosineClassifier")
    with pytest.raises(UserError, match="only classifier TextClassifier reads"), torch.device("meta"):
        build_model(config("fake_lt", "tiny_clip", *words), CLASSES)
