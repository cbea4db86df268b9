"""What a step costs the host, and what happens when it does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.trainers.methods import Method
from tailtune.trainers.run import run

Config = Callable[..., CfgNode]


class CountSyncs(TorchDispatchMode):
    """Counts the operations that make the host wait for the device: reading a value, or a size that depends on one."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal.default", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(name in str(func) for name in self.WAITS)
        return func(*args, **(kwargs or {}))


def test_no_host_sync_between_prints(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer epoch costs not one wait more."""
    monkeypatch.chdir(tmp_path)
    counts = []
    for steps in (20, 40):  # long enough that every shot group has been seen
        words = ("pretrained", "none", "num_epochs", 1, "batch_size", 4, "max_steps", steps, "print_freq", 1000)
        # The transforms read values too, so they run in another process.
        cfg = config("fake_lt", "tiny_clip_peft", *words, "micro_batch_size", 2, "num_workers", 1)
        with CountSyncs() as syncs:
            run(cfg)
        counts.append(syncs.count)
    assert counts[0] == counts[1] > 0


def test_auto_micro_batch_halves_until_it_fits(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory above 8 images: 32 is cut to 8, and the result is that of 32 at once."""
    monkeypatch.chdir(tmp_path)
    original, tried = Method.forward, []

    def forward(self: Method, batch: dict[str, Any]) -> Any:
        tried.append(len(batch["label"]))
        if len(batch["label"]) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    words = ("pretrained", "none", "num_epochs", 1, "batch_size", 32, "max_steps", 2)
    whole = run(config("fake_lt", "tiny_clip_peft", *words, "output_dir", "whole"))
    monkeypatch.setattr(Method, "forward", forward)
    auto = run(config("fake_lt", "tiny_clip_peft", *words, "micro_batch_size", "auto", "output_dir", "auto"))
    assert tried[:3] == [32, 16, 8] and max(tried[3:]) == 8
    one, other = (load_file(each / "checkpoint" / "tensors.safetensors") for each in (whole, auto))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_not_even_one_image_fits(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Method, batch: dict[str, Any]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Method, "forward", forward)
    with pytest.raises(UserError, match="not even one image"):
        run(config("fake_lt", "tiny_clip_peft", "pretrained", "none", "max_steps", 1, "micro_batch_size", "auto"))
