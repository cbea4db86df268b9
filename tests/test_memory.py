"""Every shipped config trains on one GPU of 20 GB, with the `micro_batch_size` that it names.

What training keeps is counted on the meta device, without a GPU: four bytes for each weight, and again for its gradient
and momentum where it trains, and what the backward pass of a micro-batch needs. That may be 16 GiB; the rest is for the
buffers of single layers, for CUDA itself and for what its allocator wastes.
"""

from typing import Any
from unittest import mock

import pytest
import torch
from shipped import PAIRS
from tiers import slow_except
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs import load_configs
from tailtune.datasets import build_info
from tailtune.models import build_model, resolve
from tailtune.models.backbones.generic import GenericEncoder
from tailtune.trainers.methods import Earlier, Method, build_method, declared
from tailtune.trainers.optim import micro_batch_size
from tailtune.trainers.precision import PRECISIONS, RESIDUAL, cast_trainable
from tailtune.trainers.storage.checkpoint import trained_state

LIMIT = 16 * 2**30
FEW, MANY = 2, 4
"""Images of two steps, whose difference is what images add."""


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps: unique storages, weights and buffers left out."""

    def __init__(self, module: nn.Module) -> None:
        known = {_storage(each) for each in [*module.parameters(), *module.buffers()]}
        self.kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in known:
                self.kept[_storage(tensor)] = tensor.untyped_storage()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(each.nbytes() for each in self.kept.values())


def _storage(tensor: Tensor) -> int:
    """What tells storages apart where they have no addresses."""
    return int(tensor.untyped_storage()._cdata)


def built(cfg: CfgNode, earlier: Method | None) -> tuple[Method, list[Method]]:
    """The method as it trains on a GPU, on the meta device, and what it keeps beside itself: its teacher."""
    kept: list[Method] = []

    def lend() -> Method:
        assert earlier is not None
        kept.append(earlier)
        return earlier

    info = build_info(cfg)
    with torch.device("meta"):
        model = build_model(cfg, info.class_names, pixels=(info.mean, info.std))
        method = build_method(cfg, model, info).to("meta")
        if earlier is not None:
            method.after(Earlier(True, lambda: trained_state(earlier), lend))
        # Autocast does not know this device: what it would run is counted in fp32, which is more. So is attention,
        # of which the fused kernels of a GPU keep no matrix.
        precision = PRECISIONS["fp32" if isinstance(model.encoder, GenericEncoder) else cfg.prec]
        with mock.patch("torch.Tensor.cpu", lambda tensor: tensor):  # the full-precision copy that stays aside
            model.set_precision(precision.compute, RESIDUAL[cfg.residual_dtype])
        cast_trainable(method, precision.trainable)
    return method.train(), kept


def saved(method: Method, resolution: int, count: int) -> int:
    """Bytes that a step of so many images keeps for its backward pass."""
    keeps = SavedBytes(method)
    with torch.device("meta"):
        batch: dict[str, Any] = {name: torch.empty(count, dtype=torch.int64) for name in ("label", "index")}
        batch["image"] = batch["partner"] = torch.empty(count, 3, resolution, resolution, dtype=torch.uint8)
        batch["weight"] = torch.empty(count)
        with keeps:
            step = method(batch)
    assert step.loss_sum.requires_grad
    return keeps.total


def needed(data: str, model: str, *pairs: str) -> int:
    """Bytes that a config's training keeps at once."""
    method, kept = None, []
    for stage in load_configs(data, model, pairs, declared()):
        cfg = resolve(stage)
        method, kept = built(cfg, method)
    assert method is not None
    weights = [each for module in [method, *kept] for each in module.parameters()]
    trains = sum(each.numel() for each in method.parameters() if each.requires_grad)
    total = sum(each.numel() * each.element_size() for each in weights) + 2 * 4 * trains
    if trains:
        few, many = (saved(method, cfg.resolution, count) for count in (FEW, MANY))
        total += (many - few) // (MANY - FEW) * micro_batch_size(cfg, 1)
    return total


LARGEST = [
    ("imagenet_lt", "resnext50_ride_distill"),
    ("imagenet_lt", "resnet50_ride_batchformer"),
    ("inat2018", "resnet50_h2t"),
    ("places_lt", "resnet152_mixup"),
    ("inat2018", "clip_vit_b16_peft"),
    ("inat2018", "clip_vit_b16_sade"),
]
"""A config of each large network, and of the methods that keep a second one or mix images."""


@pytest.mark.parametrize(("data", "model"), slow_except(LARGEST, PAIRS))
def test_a_config_fits_a_gpu_of_20_gb(data: str, model: str) -> None:
    assert needed(data, model) < LIMIT


@pytest.mark.parametrize(
    ("data", "model", "whole", "least"),
    slow_except(
        [("inat2018", "resnet50_sade", 512, 54)],
        [("places_lt", "resnet152_sade", 128, 45), ("inat2018", "resnet50_sade", 512, 54)],
    ),
)
def test_whole_batches_would_not(data: str, model: str, whole: int, least: float) -> None:
    """What the largest two would need at once, in GiB."""
    assert needed(data, model, "micro_batch_size", str(whole)) / 2**30 == pytest.approx(least, abs=1)


def test_the_count_is_right() -> None:
    """A linear layer keeps its input, a ReLU its result, a product both factors; weights are no activations."""
    layer = nn.Linear(8, 4, device="meta")
    images = torch.empty(16, 8, device="meta")
    keeps = SavedBytes(layer)
    with keeps:
        hidden = layer(images).relu()
        (hidden * layer(images)).sum()
    assert keeps.total == 4 * (16 * 8 + 2 * 16 * 4)
