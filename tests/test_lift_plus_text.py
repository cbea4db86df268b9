"""LIFT+'s text tower: sizes and blocks of each tuner (`text_tuner_args`), `l.aft`, and its checkpoints with text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from small_text import fixture_tower, put_text_tuners

from tailtune.configs.errors import UserError
from tailtune.configs.lift_plus_words import translated
from tailtune.configs.value_parsers import as_mapping
from tailtune.models import build_model
from tailtune.models.tuners.text_tuners import TextTunerOptions
from tailtune.scripts import _grid
from tailtune.trainers.config_checks import check
from tailtune.trainers.foreign_checkpoints import lift_plus
from tailtune.trainers.foreign_checkpoints.checkpoint_file import LIFT_FILE, ForeignCheckpoint

LORA, PROMPTS, BLOCK = 4 * 512, 2 * 512, 3_152_384  # values of rank 1, of two prompts, of a block
ARGS: dict[str, tuple[dict[str, Any], int]] = {
    "l.lora True l.adapter True l.lora_dim 8 l.lora_layers 3": (
        {"text_lora": {"dim": 8, "layers": 3}, "text_adapter": {"dim": 4}},
        3 * 8 * LORA + 67_632,
    ),
    "l.lora True l.lora_layers [4,2]": ({"text_lora": {"layers": [2, 4]}}, 2 * 4 * LORA),
    "l.fft True l.pt True l.pt_layers [-1]": ({"text_vpt_deep": {"layers": [-1]}}, 12 * BLOCK + PROMPTS),
    "l.ssf True l.bitfit True l.ssf_layers [0,5]": (
        {"text_ssf_attn": {"layers": [0, 5]}, "text_ssf_mlp": {"layers": [0, 5]}},
        110_592 // 6 + 67_584,
    ),
    "l.aft True v.aft_seed 5": ({"text_aft": {"loc": "all", "seed": 0}}, 12 * (1065 + 2 + 355 + 1420 + 2 + 1420)),
    "l.aft True l.aft_loc attn l.aft_seed 3 l.aft_ratio 0.01 l.aft_layers 1": (
        {"text_aft": {"loc": "attn", "seed": 3, "ratio": 0.01}},
        7864 + 15 + 2621 + 5,
    ),
}
"""Keys of LIFT+ → our options of single tuners, and the values that train at 100 classes in CLIP ViT-B/16."""


@pytest.mark.parametrize("line", ARGS)
def test_tuners_of_the_text_tower_have_sizes_and_blocks_of_their_own(line: str) -> None:
    _, words = translated("clip_vit_b16", "lp", ["classifier", "None", *line.split()])
    args, count = ARGS[line]
    assert as_mapping(words[words.index("text_tuner_args") + 1]) == args
    words = f"-d cifar100_ir100 -b clip_vit_b16 -m lp classifier None pretrained none {line}".split()
    assert check(_grid.config(words)).counts()["trainable"] == count


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"text_adapter": {"dim": 2}}, "text_adapter is not on; turn it on"),
        ({"text_lora": 3}, "text_lora must be a mapping such as {layers: 3}, not '3'"),
        ({"text_lora": {"rank": 3}}, "unknown option of text_lora in text_tuner_args 'rank'"),
        ({"text_lora": {"dim": "x"}}, "text_lora: dim must be .*, not 'x'"),
        ({"text_lora": {"dim": 0}}, "text_lora: dim must be at least 1, not 0"),
        ({"text_lora": {"layers": [2]}}, "has only 2 blocks"),
    ],
)
def test_options_that_no_tuner_has_are_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        put_text_tuners(fixture_tower(), ["text_lora"], TextTunerOptions(args=args))


EVERYTHING = (
    "lift+ classifier None coop True coop_cls_pos middle clip_adapter True proj_tuning True l.pt True l.lora True "
    "l.adapter True l.ssf True l.aft True l.bitfit True l.lora_dim 2 l.lora_layers range(1)"
)


@pytest.mark.parametrize("line", ["coop", EVERYTHING, "lift+ classifier None l.fft True l.adaptformer True"])
def test_a_checkpoint_with_text_gives_equal_logits(line: str, tmp_path: Path) -> None:
    words, images = f"-d fake_lt -b tiny_clip -m {line} pretrained none".split(), torch.randn(2, 3, 32, 32)
    names = [f"class {number}" for number in range(4)]
    ours = build_model(_grid.config(words), names).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    tuners = [name for name in ("adaptformer",) if name in ours.encoder.tuners]
    named = {name.removeprefix("tuner."): place.read() for name, place in lift_plus.layout(ours, tuners).items()}
    assert all(name.startswith(("image_", "text_")) for name in named)
    torch.save({"tuner": {name: tensor.clone() for name, tensor in named.items()}}, tmp_path / LIFT_FILE)
    file, again = ForeignCheckpoint(tmp_path / LIFT_FILE), build_model(_grid.config(words), names).eval()
    assert lift_plus.is_lift_plus(file) and not torch.equal(again(images), ours(images))
    lift_plus.load(file, again, tuners)
    assert torch.equal(again(images), ours(images))


def test_a_run_evaluates_a_checkpoint_with_text(launch: Cli, tmp_path: Path) -> None:
    torch.save({"tuner": {"text_encoder.ctx": torch.zeros(4, 32)}}, tmp_path / LIFT_FILE)
    words = f"-d fake_lt -b tiny_clip -m coop max_test_images 20 test_only True model_dir {tmp_path} pretrained none"
    done = launch(words)
    assert done.returncode == 0 and "1 tensors, of the tuner text_encoder, ctx" in done.stdout, done.stderr
    torch.save({"tuner": {"text_encoder.ctx": torch.zeros(5, 32)}}, tmp_path / LIFT_FILE)
    wrong = launch(words)
    assert wrong.returncode == 2 and "text_encoder.ctx" in wrong.stderr


def test_what_lift_plus_does_not_have_is_refused(config: Any) -> None:
    for pairs, message in (
        (("context", "coop", "context_len", 2, "context_per_class", True), "none of each class"),
        (("context", "maple", "context_depth", 1), "no contexts of MaPLe"),
        (("clip_adapter", "original"), "clip_adapter residual only"),
        (("text_ln_tuning", True), "LIFT\\+ has no ln_tuning in a transformer"),
    ):
        model = build_model(config("fake_lt", "tiny_clip", "classifier", "TextClassifier", *pairs), ["a", "b"])
        with pytest.raises(UserError, match=message):
            lift_plus.layout(model, [])
