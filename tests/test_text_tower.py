"""The text tower as a host of tuners: published features of a small CLIP, and what must not change them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import fill_tuners
from small_text import CLASSES, fixture_image_encoder, fixture_images, fixture_tower, text_state, tokenize
from torch import Tensor

from tailtune.models.backbones.class_texts import ClassTexts, tokenized
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.tuners.text_tuners import TextTunerOptions, add_text_tuners


def tuned(names: list[str], partial: Any = None, fast: bool = True) -> TextTower:
    tower = fixture_tower(fast)
    add_text_tuners(tower, names, TextTunerOptions(partial=partial), 3, 0)
    fill_tuners(tower)
    tower.set_precision()
    return tower


def before_projection(tower: TextTower) -> Tensor:
    """The features of the three classes before the projection [3, 48]."""
    tower.projection = torch.nn.Parameter(torch.eye(48), requires_grad=False)
    found = []
    normalize = F.normalize
    F.normalize = lambda x, dim: found.append(x) or normalize(x, dim=dim)
    try:
        tower.class_features()
    finally:
        F.normalize = normalize
    return found[0][tower.rows]


def logits(tower: TextTower) -> Tensor:
    head = TextClassifier(32, 3, None)
    head.attach(tower)
    return head(fixture_image_encoder()(fixture_images()))


def test_the_token_ids_are_those_of_clip() -> None:
    assert tokenize(["a photo of a tench."])[0, :9].tolist() == [49406, 320, 1125, 539, 320, 1149, 634, 269, 49407]


FEATURES = {
    (): ((1.126043, 0.027224, 0.058674, -0.056878), 0.476957, 12.415503),
    ("text_lora",): ((1.127343, 0.027749, 0.058187, -0.060226), 0.490207, 12.417608),
    ("text_adapter",): ((1.314426, 0.010869, 0.116256, -0.031199), 0.777506, 12.412051),
    ("text_adaptformer",): ((1.248836, 0.056465, 0.031140, -0.074081), 0.707502, 12.403155),
    ("text_ssf_attn", "text_ssf_mlp"): ((0.551219, 0.107312, 0.249277, 0.302151), 0.392239, 12.339877),
    ("text_vpt_deep",): ((0.976516, -0.122962, 0.340812, 0.285579), 0.295900, 12.400440),
    ("text_vpt_shallow",): ((0.995823, -0.189454, 0.317290, 0.215632), 0.219633, 12.400598),
}
"""Tuners → first four numbers of the feature of tench, sum and length of all three features."""
LOGITS = {
    (): ((-18.910881, -20.162291, -16.766956), (-20.960575, -22.673466, -18.906744)),
    ("text_lora",): ((-18.873966, -19.974718, -16.772394),),
    ("text_adaptformer",): ((-15.958233, -16.876379, -13.856708),),
    ("text_vpt_deep",): ((-19.744350, -21.780424, -17.743834),),
}


@pytest.mark.parametrize("names", FEATURES)
def test_features_are_those_of_the_original(names: tuple[str, ...]) -> None:
    first, total, length = FEATURES[names]
    found = before_projection(tuned(list(names)))
    assert torch.allclose(found[0, :4], torch.tensor(first), atol=2e-4)
    assert found.sum().item() == pytest.approx(total, abs=2e-3) and found.norm().item() == pytest.approx(length, abs=1e-4)
    if not names:
        assert found[0].norm().item() == pytest.approx(7.197477, abs=1e-5)


@pytest.mark.parametrize("names", LOGITS)
def test_logits_are_those_of_the_original(names: tuple[str, ...]) -> None:
    found = logits(tuned(list(names)))
    assert torch.allclose(found[: len(LOGITS[names])], torch.tensor(LOGITS[names]), atol=1e-3)
