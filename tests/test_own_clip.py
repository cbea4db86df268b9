"""`backbone open_clip:FILE.json`: a model config of one's own."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.models.backbones.table import TINY_CLIP, find_backbone
from tailtune.trainers.config_checks import outline

Config = Callable[..., CfgNode]
OWN = json.loads((TINY_CLIP / "tailtune-tiny.json").read_text(encoding="utf-8"))


def written(folder: Path, content: Any) -> str:
    path = folder / "own.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"open_clip:{path}"


def test_features_are_those_of_the_same_model_in_the_table(tmp_path: Path) -> None:
    """Of images and of texts, from the weights of the embedded CLIP."""
    weights = str(TINY_CLIP / "weights.safetensors")
    one, other = (find_backbone(name).build(weights, 32, 0, True) for name in ("TinyCLIP", written(tmp_path, OWN)))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    sentences, cpu = [["a cat"], ["a dog"]], torch.device("cpu")
    assert one.text_encoder is not None and other.text_encoder is not None
    assert torch.equal(one.encoder.eval()(images), other.encoder.eval()(images))
    assert torch.equal(
        one.text_encoder.class_features(sentences, cpu), other.text_encoder.class_features(sentences, cpu)
    )


def without(part: str, key: str) -> dict[str, Any]:
    return {**OWN, part: {name: value for name, value in OWN[part].items() if name != key}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "lacks embed_dim"),
        (without("vision_cfg", "layers"), r"lacks vision_cfg\.layers"),
        ({**OWN, "text_cfg": {**OWN["text_cfg"], "hf_tokenizer_name": "bert"}}, "tokenizer of the Hugging Face hub"),
        ({**OWN, "vision_cfg": {**OWN["vision_cfg"], "widht": 3}}, "widht"),
    ],
)
def test_a_config_that_describes_no_clip_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        find_backbone(written(tmp_path, content)).build(None, 32, 0, True)


def test_a_missing_file_and_missing_weights_are_named(config: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"open_clip:nope\.json.*No such file"):
        outline(config("fake_lt", "tiny_clip", "backbone", "open_clip:nope.json"))
    with pytest.raises(UserError, match="name a file with `pretrained /path/to/file`"):
        outline(config("fake_lt", "tiny_clip", "backbone", written(tmp_path, OWN)))
