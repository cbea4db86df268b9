"""Tip-Adapter: published logits, what the cache holds, runs, exports, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Cli
from small import filled, head_context

from tailtune.configs.errors import UserError
from tailtune.models import build_model
from tailtune.models.heads.tip_adapter import TipAdapter

RUN = "-d fake_lt -m tiny_clip classifier TipAdapter num_epochs 0 tipadapter.shots 3 max_test_images 20 output_dir tip"


def cached(balanced: bool) -> TipAdapter:
    """The head of the fixture: six unit keys of three classes."""
    head = TipAdapter(5, 3, 3, 1.17, 1.0, balanced, 100.0)
    weight = F.normalize(filled((3, 5), 182, 1.0), dim=-1)
    keys, labels = filled((6, 5), 180, 1.0), torch.tensor([0, 0, 0, 1, 1, 2])
    head.prepare(weight, head_context(keys, labels, 3))
    return head


WANTED = {
    False: [[81.547272, 17.013096, -55.286674], [15.393013, -61.123974, 18.256771]],
    True: [[80.647964, 16.464952, -55.286674], [14.327723, -61.640308, 18.256771]],
}


@pytest.mark.parametrize("balanced", WANTED)
def test_logits_are_those_of_the_original_or_of_its_class_means(balanced: bool) -> None:
    queries = filled((2, 5), 181, 1.0)
    assert torch.allclose(cached(balanced)(queries), torch.tensor(WANTED[balanced]), atol=1e-3)


def test_the_cache_holds_some_images_of_each_class() -> None:
    head = TipAdapter(5, 4, 2, 1.0, 1.0, True, 100.0)
    features, labels = filled((9, 5), 3, 1.0), torch.tensor([0, 1, 0, 1, 0, 0, 1, 3, 0])
    head.prepare(torch.zeros(4, 5), head_context(features, labels, 4))
    assert head.share.tolist() == [[0.5, 0.5], [0.5, 0.5], [0, 0], [1, 0]]
    for label in (0, 1, 3):
        of_class = F.normalize(features[labels == label], dim=-1)
        for key, share in zip(head.keys[label], head.share[label], strict=True):
            assert share == 0 or (of_class - key).norm(dim=1).min() < 1e-6
    assert head(features).isfinite().all()


@pytest.mark.slow
def test_a_run_is_exported_to_onnx(launch: Cli) -> None:
    assert launch(RUN, "export onnx").returncode == 0


def test_a_run_is_evaluated_again_from_its_checkpoint_and_exported(launch: Cli, tmp_path: Path) -> None:
    assert launch(RUN).returncode == 0
    first = json.loads((tmp_path / "output/tip/metrics.json").read_text())
    assert first["params"]["trainable"] == 0
    for words in ("test_only True tte True", "export merged"):
        done = launch(RUN, words)
        assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "output/tip/export/merged/facts.json").read_text())
    assert facts["head"]["type"] == "TipAdapter" and "einsum" in facts["head"]["apply"]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("num_epochs", 1), "trains nothing; set num_epochs 0"),
        (("num_epochs", 0, "lora", True), "leave out lora"),
        (("num_epochs", 0, "num_experts", 2), "is the same for all experts"),
        (("num_epochs", 0, "init_head", "class_mean"), "consists of text features"),
        (("num_epochs", 0, "init_head", "none", "backbone", "ResNet-20"), "needs a text encoder"),
        (("num_epochs", 0, "context", "coop"), "only classifier TextClassifier reads"),
    ],
)
def test_what_does_not_go_together_is_refused(pairs: tuple[object, ...], message: str, config: Any) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_model(config("fake_lt", "tiny_clip", "classifier", "TipAdapter", *pairs), ["a", "b"])
