"""What a step costs the host, and what happens when it does not fit."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiers import slow_except
from yacs.config import CfgNode

from tailtune.benchmarks.steps.host_syncs import HostSyncs, syncs_of_step
from tailtune.configs import load_configs
from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.trainers import micro_batch_probe
from tailtune.trainers.config_checks import outline
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import METHODS, Method
from tailtune.trainers.option_schema import declared
from tailtune.trainers.processes.peak_memory import Peak
from tailtune.trainers.run import run
from tailtune.trainers.runs.load_run import make_method

Config = Callable[..., CfgNode]
GIB = micro_batch_probe.GIB


def of_method(name: str) -> str:
    """What a run of a method asks for."""
    more = {"glmc": " pair_sampler shuffle", "h2t": " pair_sampler shuffle h2t.shift_bn False"}.get(name, "")
    more += " num_experts 3" if name in ("ride_ea", "reslt") else ""
    after = " after tiny_clip_peft" + (" after.num_experts 3" if name == "ride_ea" else "")
    return f"method {name} loss_type CE{more}" + (after if METHODS[name].continues_from_earlier_run else "")


@pytest.mark.parametrize(
    "name", slow_except(["classify", "ride_ea", "mixup"], [name for name in METHODS if name != "tau_norm"])
)
def test_no_method_waits_for_the_device_in_a_step(name: str) -> None:
    """One whole step of the trainer on the meta device, which stands for a GPU. (tau_norm trains nothing.)"""
    assert syncs_of_step(load_configs("fake_lt", "tiny_clip_peft", of_method(name).split(), declared())) == []


MORE = {
    "full_tuning": "adaptformer False full_tuning True optimizer adamw",
    "text": "classifier TextClassifier init_head none text_lora True",
    "batch norms": "backbone ResNet-32 pretrained none init_head none adaptformer False full_tuning True bn_tuning 1",
    "peft": "adaptformer False peft LoRA",
    "sam": "sam sam",
    "focal": "sam focal",
    "gnm": "sam gnm",
    "recomputed": "grad_checkpoint True",
}


@pytest.mark.parametrize("name", slow_except(["recomputed"], MORE))
def test_nothing_else_waits_for_the_device(name: str) -> None:
    assert syncs_of_step(load_configs("fake_lt", "tiny_clip_peft", MORE[name].split(), declared())) == []


@pytest.mark.parametrize("name", slow_except([], LOSSES))
def test_no_loss_waits_for_the_device(name: str) -> None:
    assert syncs_of_step(load_configs("fake_lt", "tiny_clip_peft", ["loss_type", name], declared())) == []


@pytest.mark.parametrize(
    ("waits", "operation"),
    [
        (True, lambda x: x.sum().item()),
        (True, lambda x: bool(x.any())),
        (True, lambda x: x.cpu()),
        (True, lambda x: x.tolist()),
        (True, lambda x: torch.ones(3).to(x.device)),
        (True, lambda x: x.copy_(torch.ones(3))),
        (True, lambda x: torch.tensor([1.0], device=x.device)),
        (True, lambda x: x.new_tensor([1.0])),
        (True, lambda x: x[[0, 1]]),
        (True, lambda x: x[torch.tensor([0, 1])]),
        (False, lambda x: torch.ones(3).to(x.device, non_blocking=True)),
        (False, lambda x: x.masked_fill_(x > 0, 1.0)),
        (False, lambda x: x.__setitem__(x > 0, 1.0)),
        (False, lambda x: x.new_full((2,), 3.0) + torch.tensor(2.0)),
        (False, lambda x: x[torch.zeros(2, dtype=torch.int64, device=x.device)]),
        (False, lambda x: torch.tensor([1.0]).item()),
    ],
)
def test_what_counts_as_waiting(waits: bool, operation: Callable[[torch.Tensor], Any]) -> None:
    with HostSyncs() as syncs:
        operation(torch.empty(3, device="meta"))
    assert bool(syncs.found) is waits, syncs.found


def test_a_mask_as_an_index_counts() -> None:
    """The meta device cannot go on after it, so that it also raises."""
    x = torch.empty(3, device="meta")
    with HostSyncs() as syncs, pytest.raises(NotImplementedError):
        x[x > 0]
    assert syncs.found


def test_loss_scaling_waits_once_in_a_step() -> None:
    """PyTorch's GradScaler reads whether the gradients are finite (`prec amp` on a GPU)."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([weight], lr=0.1), torch.amp.GradScaler("cpu")
    with HostSyncs(torch.device("cpu")) as syncs:
        scaler.scale(weight.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert len(syncs.found) == 1


def test_no_host_sync_between_prints(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer epoch costs not one wait more."""
    monkeypatch.chdir(tmp_path)
    counts = []
    for steps in (20, 25):  # long enough that every shot group has been seen
        # The transforms read values too, so they run in another process. The second run must not find features.
        words = f"pretrained none num_epochs 1 batch_size 4 micro_batch_size 2 max_steps {steps} print_freq 1000"
        words += " max_test_images 8"
        cfg = config("fake_lt", "tiny_clip_peft", *words.split(), "num_workers", 1, "feature_cache", False)
        with HostSyncs(torch.device("cpu")) as syncs:
            run(cfg)
        counts.append(len(syncs.found))
    assert counts[0] == counts[1] > 0


Steps = list[int]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """The numbers of images of all forward passes so far; a GiB of memory for each image of the last one, and one more.

    Above 16 images memory is not enough, whatever the budget is.
    """
    original, tried = Method.forward, Steps()

    def forward(self: Method, batch: dict[str, Any]) -> Any:
        tried.append(len(batch["label"]))
        if len(batch["label"]) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, batch)

    class Memory(Peak):
        def read(self) -> int:
            return GIB * (1 + tried[-1]) + GIB * (tried[-1] == 8)  # eight images need more than the others let expect

    monkeypatch.setattr(Method, "forward", forward)
    monkeypatch.setattr(micro_batch_probe, "Peak", Memory)
    return tried


@pytest.mark.parametrize(
    ("budget", "tried", "line"),
    [
        (100, [2, 4, 32, 16], "16 images at once (17 of 100 GiB)"),
        (10.5, [2, 4, 8], "8 images at once (10 of 10.5 GiB)"),
        (9.5, [2, 4, 8, 4], "4 images at once (5 of 9.5 GiB)"),
        (2.5, [2, 4, 1], "1 images at once (2 of 2.5 GiB)"),
    ],
)
def test_auto_takes_as_many_images_as_fit(
    budget: float, tried: Steps, line: str, steps: Steps, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    method = make_method(cfg := config("fake_lt", "tiny_clip_peft", "pretrained", "none"), build_info(cfg))
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), gather=lambda each: each)
    with caplog.at_level("INFO", "tailtune"):
        micro_batch_probe.largest_micro_batch(method, accelerator, 32, cfg.resolution, int(budget * GIB))
    assert steps == tried and line in caplog.text


def test_auto_measures_and_changes_nothing(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, too, memory is measured; the result is that of all images at once."""
    monkeypatch.chdir(tmp_path)
    words = ("pretrained", "none", "num_epochs", 1, "batch_size", 32, "max_steps", 2)
    whole = run(config("fake_lt", "tiny_clip_peft", *words, "output_dir", "whole"))
    words = (*words, "micro_batch_size", "auto")
    auto = run(config("fake_lt", "tiny_clip_peft", *words, "output_dir", "auto"))
    assert re.search(
        r"micro_batch_size auto: 32 images at once \([0-9.]+ of [0-9.]+ GiB\)", (auto / "log.txt").read_text()
    )
    one, other = (load_file(each / "checkpoint" / "tensors.safetensors") for each in (whole, auto))
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)


def test_not_even_one_image_fits(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("pretrained", "none", "max_steps", 1, "micro_batch_size", "auto", "memory_budget_gb", 0.01)
    with pytest.raises(UserError, match="not even one image fits into 0.01 GiB"):
        run(config("fake_lt", "tiny_clip_peft", *words))
    with pytest.raises(UserError, match="only `micro_batch_size auto` reads it"):
        outline(config("fake_lt", "tiny_clip_peft", "memory_budget_gb", 4))


@pytest.mark.parametrize("refused", ["STATUS", "CLEAR"])
def test_a_system_that_does_not_tell_the_memory(refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers with another kernel, or with a read-only /proc."""
    monkeypatch.setattr(f"tailtune.trainers.processes.peak_memory.{refused}", tmp_path / "none" / "file")
    peak = Peak(torch.device("cpu"))
    assert peak.before is None and peak.read() is None and peak.above() is None
