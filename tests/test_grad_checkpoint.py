"""`grad_checkpoint`: less memory, and the same step bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.models.backbones.recomputation import batch_norms
from tailtune.trainers.dry_run_report import memory_of
from tailtune.trainers.memory_estimate import SavedBytes
from tailtune.trainers.methods import Method
from tailtune.trainers.precision import PRECISIONS, cast_trainable
from tailtune.trainers.run import run
from tailtune.trainers.runs.load_run import make_method, outline

Config = Callable[..., CfgNode]
MIB = 2**20
CASES = {
    "adaptformer": ("tiny_clip_peft", ""),
    "lora": ("tiny_clip_peft", "adaptformer False lora True"),
    "vpt": ("tiny_clip_peft", "adaptformer False vpt_deep True"),
    "dropout": ("tiny_clip_peft", "adaptformer False clip_lora True clip_lora_dropout 0.5"),
    "peft": ("tiny_clip_peft", "adaptformer False peft LoRA peft_args {'lora_dropout':0.5}"),
    "last block": ("tiny_clip_peft", "partial 1"),
    "experts": ("tiny_clip_peft", "num_experts 2 expert_split 1"),
    "text": ("tiny_clip_peft", "classifier TextClassifier init_head none text_lora True text_memory 0"),
    "maple": (
        "tiny_clip_peft",
        "adaptformer False classifier TextClassifier init_head none context maple context_depth 2",
    ),
    "batch norms": ("resnet32_sade", ""),
    "timm": (
        "resnet32_sade",
        "backbone timm:resnet10t reduce_dimension False method classify num_experts 1 resolution 32 loss_type CE",
    ),
    "batchformer": ("resnet32_sade", "method batchformer batchformer.inner classify num_experts 1"),
}
"""Name → model config and options."""


def stepped(cfg: CfgNode) -> dict[str, Tensor]:
    """Loss, gradients and running statistics after one step of six images."""
    method = make_method(cfg, build_info(cfg))
    method.model.init = None
    precision = PRECISIONS[cfg.prec]
    method.model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    method.train().before_step(1)
    torch.manual_seed(0)
    for parameter in method.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # an update that starts as zero would hide its own gradients
    images = torch.randint(0, 256, (6, 3, cfg.resolution, cfg.resolution), dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(6) % 3, "weight": torch.ones(6)}
    loss = method(batch).loss_sum
    loss.backward()
    gradients = {name: each.grad for name, each in method.named_parameters() if each.grad is not None}
    statistics = {
        f"{i}.{name}": each for i, norm in enumerate(batch_norms(method)) for name, each in norm.named_buffers()
    }
    return {"loss": loss.detach(), **gradients, **statistics}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_the_same_bit_for_bit(case: str, config: Config) -> None:
    model, words = CASES[case]
    both = [
        stepped(config("fake_lt", model, "pretrained", "none", "prec", "fp32", *words.split(), "grad_checkpoint", flag))
        for flag in (False, True)
    ]
    assert both[0].keys() == both[1].keys() and len(both[0]) > 2
    assert not [name for name in both[0] if not torch.equal(both[0][name], both[1][name])]


@pytest.mark.parametrize("sam", ["sam", "focal"])
def test_a_run_is_the_same_with_sam(sam: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch norms, two passes of a step, two micro-batches: weights and statistics at the end."""
    monkeypatch.chdir(tmp_path)
    words = (
        "pretrained",
        "none",
        "method",
        "classify",
        "num_experts",
        1,
        "loss_type",
        "CE",
        "sam",
        sam,
        "batch_size",
        8,
    )
    words += ("micro_batch_size", 4, "max_steps", 2, "max_test_images", 4, "num_workers", 0, "reduce_dimension", False)
    paths = [
        run(config("fake_lt", "resnet32_sade", *words, "grad_checkpoint", flag, "output_dir", flag))
        for flag in (False, True)
    ]
    one, other = (load_file(each / "checkpoint" / "tensors.safetensors") for each in paths)
    assert any("running_var" in name for name in one) and one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def test_vit_b16_keeps_the_inputs_of_its_blocks(config: Config) -> None:
    """At most 4 MiB an image in bf16; its estimate has the activations of one block in addition."""
    kept, estimates = {}, {}
    for flag in (False, True):
        cfg = config("imagenet_lt", "clip_vit_b16_peft", "prec", "bf16", "grad_checkpoint", flag)
        estimates[flag] = memory_of(cfg, [method := outline(cfg)]).image
        kept[flag] = (saved(method, 4) - saved(method, 2)) / 2
    assert kept[True] <= 4 * MIB
    assert estimates[False] == kept[False] <= 34 * MIB
    assert 2 * MIB <= estimates[True] - kept[True] <= 3.5 * MIB


def saved(method: Method, count: int) -> int:
    """Bytes that autograd saves in a step of some images on the meta device."""
    keeps = SavedBytes(method)
    with torch.device("meta"), keeps:
        images = torch.empty(count, 3, 224, 224, dtype=torch.uint8)
        method({"image": images, "label": torch.empty(count, dtype=torch.int64), "weight": torch.empty(count)})
    return keeps.total


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("backbone timm:regnety_002", "has no blocks to compute again"),
        ("backbone CLIP-RN50 prec fp16", "does not go with prec fp16 on CLIP-RN50"),
    ],
)
def test_what_cannot_be_computed_again_is_refused(words: str, why: str, config: Config) -> None:
    with pytest.raises(UserError, match=why):
        outline(
            config("imagenet_lt", "clip_vit_b16_peft", "adaptformer", False, "grad_checkpoint", True, *words.split())
        )
