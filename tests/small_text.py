"""The text tower of the fixtures of the specification of text towers (§6.3), and CLIPs made of it."""

from collections.abc import Sequence
from typing import Any

import torch
from small import WIDTH, filled, fixture_net
from torch import Tensor

from tailtune.models.backbones import open_clip_files
from tailtune.models.backbones.class_texts import tokenized
from tailtune.models.backbones.text_tower import TextTower, load_text_tower
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.text_tuners import TEXT_TUNERS, TextTunerOptions, add_text_tuners

CLASSES = ("tench", "great white shark", "airplane_cabin")
CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
}


def tokenize(sentences: Sequence[str]) -> Tensor:
    return open_clip_files.tokenize(77, sentences)


def text_state() -> dict[str, Tensor]:
    """The weights of the tower, under OpenAI's names."""
    state = {
        "token_embedding.weight": filled((49408, 48), 101, 0.5),
        "positional_embedding": filled((77, 48), 102, 0.25),
        "ln_final.weight": filled((48,), 103, offset=1.0),
        "ln_final.bias": filled((48,), 104),
        "text_projection": filled((48, 32), 105, 0.2),
        "logit_scale": torch.tensor(100.0).log(),
    }
    for index in range(2):
        q, at = 110 + 30 * index, f"transformer.resblocks.{index}."
        tensors = {"attn.in_proj_weight": (144, 48), "attn.in_proj_bias": (144,)}
        tensors |= {"attn.out_proj.weight": (48, 48), "attn.out_proj.bias": (48,)}
        tensors |= {"ln_1.weight": (48,), "ln_1.bias": (48,), "ln_2.weight": (48,), "ln_2.bias": (48,)}
        for seed, (name, shape) in enumerate(tensors.items(), start=q):
            state[at + name] = filled(shape, seed, offset=1.0 if name.startswith("ln") and "weight" in name else 0.0)
        state[at + "mlp.c_fc.weight"], state[at + "mlp.c_fc.bias"] = filled((192, 48), q + 8), filled((192,), q + 20)
        state[at + "mlp.c_proj.weight"], state[at + "mlp.c_proj.bias"] = filled((48, 192), q + 9), filled((48,), q + 21)
    return state


def fixture_tower(fast: bool = True) -> TextTower:
    """The tower with the sentences "a photo of a {}." of CLASSES, without tuners."""
    tower = load_text_tower(CONFIG, text_state(), tokenize, fast)
    tower.set_texts(tokenized(tokenize, [[f"a photo of a {name.replace('_', ' ')}."] for name in CLASSES]))
    tower.set_precision()
    return tower


def fixture_images() -> Tensor:
    """Two normalised images."""
    return filled((2, 3, 16, 16), 0, 1.0)


def fixture_image_encoder() -> ViTEncoder:
    """The image encoder that ends in the shared space."""
    host = ViTEncoder(fixture_net(), filled((WIDTH, 32), 8, 0.2).T.contiguous())
    host.set_precision()
    return host


def put_text_tuners(tower: TextTower, names: Sequence[str], sizes: TextTunerOptions = TextTunerOptions()) -> None:  # noqa: B008
    """`add_text_tuners`, by names."""
    add_text_tuners(tower, {name: TUNERS[TEXT_TUNERS[name]].options for name in names}, sizes, len(CLASSES), 0)
