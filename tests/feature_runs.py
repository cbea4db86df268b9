"""Runs whose features are kept in the folder `kept`, and what they lead to; for the tests of `feature_cache`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

WORDS = "-d digits_lt -m tiny_clip augment whole subset_cap 20 batch_size 64 max_steps 4 max_test_images 70 "
WORDS += "feature_cache_dir kept"


@contextmanager
def counted(kind: type, name: str) -> Iterator[mock.Mock]:
    """Counts the calls of a method."""
    with mock.patch.object(kind, name, autospec=True, side_effect=getattr(kind, name)) as calls:
        yield calls


def outcome(run: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """What a run has trained, the logits of its test images, and its result."""
    folder = Path("output", run)
    head, logits = (load_file(folder / name) for name in ("checkpoint/tensors.safetensors", "logits.safetensors"))
    return head, logits, json.loads((folder / "metrics.json").read_text())


def assert_same(run: str, other: str, tolerance: float = 0.0) -> None:
    for found, wanted in zip(outcome(run)[:2], outcome(other)[:2], strict=True):
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert torch.allclose(tensor.double(), wanted[name].double(), rtol=0, atol=tolerance), name
