"""Every shipped config trains on one GPU of 20 GB, with the `micro_batch_size` that it names.

What training keeps is counted on the meta device, without a GPU: four bytes for each weight, and again for its gradient
and momentum where it trains, and what the backward pass of a micro-batch needs. That may be 16 GiB; the rest is for the
buffers of single layers, for CUDA itself and for what its allocator wastes.
"""

import pytest
import torch
from tiers import slow_except
from torch import nn

from tailtune.benchmarks.shipped import PAIRS
from tailtune.configs import load_configs
from tailtune.models import resolve
from tailtune.trainers.dry_run_report import memory_of
from tailtune.trainers.memory_estimate import SavedBytes
from tailtune.trainers.methods import Method
from tailtune.trainers.micro_batch_size import micro_batch_size
from tailtune.trainers.option_schema import declared
from tailtune.trainers.runs.load_run import outline

LIMIT = 16 * 2**30


def needed(data: str, model: str, *pairs: str) -> int:
    """Bytes that a config's training keeps at once."""
    methods: list[Method] = []
    for stage in load_configs(data, model, pairs, declared()):
        cfg, before = resolve(stage), methods[-1:]
        methods.append(outline(cfg))
        memory = memory_of(cfg, [*before, methods[-1]])
    assert memory.image is not None
    return memory.total(micro_batch_size(cfg, 1))


LARGEST = [
    ("imagenet_lt", "resnet50_ride_batchformer"),
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
