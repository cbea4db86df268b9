"""The memory of training that is counted on the meta device, without a GPU.

tests/test_costs.py has the memory of every shipped config, and the limit of a GPU of 20 GB.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tiers import slow_except
from torch import nn
from yacs.config import CfgNode

from tailtune.scripts.make_costs import counted
from tailtune.trainers.config_checks import outline
from tailtune.trainers.dry_run_report import ready_to_train
from tailtune.trainers.memory_estimate import SavedBytes, training_memory
from tailtune.trainers.methods import Method


@pytest.mark.parametrize(
    ("data", "model", "whole", "least"),
    slow_except(
        [("inat2018", "resnet50_sade", 512, 54)],
        [("places_lt", "resnet152_sade", 128, 45), ("inat2018", "resnet50_sade", 512, 54)],
    ),
)
def test_whole_batches_would_not_fit(data: str, model: str, whole: int, least: float) -> None:
    """What the largest two would need at once, in GiB."""
    row = counted(data, model, "micro_batch_size", str(whole))
    assert row["memory"] / 2**30 == pytest.approx(least, abs=1)


def test_the_count_is_right() -> None:
    """A linear layer keeps its input, a ReLU its result, a product both factors; weights are no activations."""
    layer = nn.Linear(8, 4, device="meta")
    images = torch.empty(16, 8, device="meta")
    keeps = SavedBytes(layer)
    with keeps:
        hidden = layer(images).relu()
        (hidden * layer(images)).sum()
    assert keeps.total == 4 * (16 * 8 + 2 * 16 * 4)


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_keeps_no_probabilities(masked: bool) -> None:
    """It keeps queries, keys, values, the result, a sum for each query, and a mask as numbers: fewer than N² a head."""
    q, k, v = (torch.empty(4, 2, 100, 8, device="meta", requires_grad=True) for _ in range(3))
    mask = torch.empty(100, 100, dtype=torch.bool, device="meta") if masked else None
    keeps = SavedBytes(nn.Identity())
    with keeps:
        F.scaled_dot_product_attention(q, k, v, mask)
    assert keeps.total / 4 == pytest.approx(4 * q.numel() + 8 * 100 + 10_000 * masked, rel=0.01)


def outlined(config: Callable[..., CfgNode], *words: str) -> Method:
    cfg = config("fake_lt", "tiny_clip_peft", "pretrained", "none", "adaptformer", False, *words)
    return ready_to_train(cfg, [outline(cfg)])[0]


def test_tuners_that_read_values_are_not_counted(config: Callable[..., CfgNode]) -> None:
    """LoHa reads a number, SHiRA is sparse: the estimate leaves the activations out."""
    for name in ("LoHa", "SHiRA"):
        assert training_memory(outlined(config, "peft", name), 32, copies=0).image is None


def test_an_error_of_the_code_is_seen(config: Callable[..., CfgNode], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for a tuner that needs values."""
    method = outlined(config, "lora", "True")
    monkeypatch.setattr(type(method), "forward", lambda self, batch: batch["image"] @ batch["label"])
    with pytest.raises(RuntimeError):
        training_memory(method, 32, copies=0)
