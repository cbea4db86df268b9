"""What measurements ask of the device. Everything that only CUDA can do is here; on a CPU it does nothing."""

import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tailtune.trainers.distributed import uses_cuda

PEAKS: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75},
    "GH200": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "H200": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "fp16": 835, "tf32": 417.5, "fp32": 60},
    "H100": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "A10G": {"bf16": 70, "fp16": 70, "tf32": 35, "fp32": 35},
    "A10": {"bf16": 125, "fp16": 125, "tf32": 62.5, "fp32": 31.2},
    "L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"bf16": 71, "fp16": 71, "tf32": 35.6, "fp32": 35.6},
    "V100": {"fp16": 125, "fp32": 15.7},
    "T4": {"fp16": 65, "fp32": 8.1},
}
"""Part of a device's name → peak of dense products with fp32 accumulation, in TFLOP/s, from NVIDIA's data sheets. The
first part that occurs counts."""


def device() -> torch.device:
    """The device that a run in this process would use."""
    return torch.device("cuda" if uses_cuda() else "cpu")


def peak_flops(name: str, arithmetic: str) -> float | None:
    """FLOP/s that a device can reach at most; None if `PEAKS` does not have it.

    Args:
        name: name of the device, as CUDA gives it.
        arithmetic: `bf16`, `fp16`, `tf32` or `fp32`.
    """
    peaks = next((each for part, each in PEAKS.items() if part in name), {})
    return 1e12 * peaks[arithmetic] if arithmetic in peaks else None


def finish() -> None:
    """Wait until the device has done all that was asked of it."""
    if uses_cuda():
        torch.cuda.synchronize()


def arithmetic() -> dict[str, Any]:
    """Whether products and convolutions of fp32 tensors use TF32. Empty on a CPU."""
    if not uses_cuda():
        return {}
    return {
        "tf32 in products": torch.backends.cuda.matmul.allow_tf32,
        "tf32 in convolutions": torch.backends.cudnn.allow_tf32,
    }


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collect the places at which Python waits for the device, as lines `file:line function`. Empty on a CPU.

    A clock does not show them: while the queue of the device is full, waiting costs nothing.
    """
    found: list[str] = []
    if not uses_cuda():
        yield found
        return

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            frames = [each for each in traceback.extract_stack()[:-1] if "benchmarks" not in each.filename]
            ours = [each for each in frames if "site-packages" not in each.filename] or frames
            found.append(f"{ours[-1].filename}:{ours[-1].lineno} {ours[-1].name}")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
