"""`Peak`: the largest memory of this process since a moment: allocated memory of its GPU, resident memory on a CPU.

Nothing else resets or reads the peak. A device has one: a second `Peak` lets the first one count from there on.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""What Linux wants to be written to `CLEAR` (proc_pid_clear_refs(5))."""


class Peak:
    """The memory since this object was made. What the C library or the allocator of a GPU keeps is given back first.

    Args:
        device: the device of the computation.

    Attributes:
        before: bytes that were in use when the object was made; None on a system that does not tell.
    """

    before: int | None

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, None
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        elif _resident("VmHWM") is not None:
            libc = ctypes.CDLL(None)
            if hasattr(libc, "malloc_trim"):
                libc.malloc_trim(0)
            with suppress(OSError):  # some containers do not let a process reset its peak
                CLEAR.write_text(RESET_PEAK)
                self.before = _resident("VmRSS")

    def read(self) -> int | None:
        """The largest number of bytes so far; None on a system that does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return None if self.before is None else _resident("VmHWM")

    def of_gpu(self) -> dict[str, int]:
        """`allocated`: bytes of tensors at their peak; `reserved`: bytes that the allocator held. Empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        found = {"allocated": torch.cuda.max_memory_allocated, "reserved": torch.cuda.max_memory_reserved}
        return {name: peak(self.device) for name, peak in found.items()}

    def above(self) -> int | None:
        """The largest number of bytes so far above those before."""
        now = self.read()
        return None if now is None or self.before is None else now - self.before


def _resident(name: str) -> int | None:
    """A line of the process's status, in bytes; None on a system that does not have it."""
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)
