"""`Limits`: what a request may cost."""

from dataclasses import dataclass

from tailtune.configs.errors import UserError

PORTS = 2**16


@dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    files: int = 16
    """Most images in a request."""
    mebibytes: int = 20
    """Most MiB of an image."""
    places: int = 16
    """Most requests that are uploaded, wait or are computed at the same time. Others are refused."""
    seconds: float = 60.0
    """Longest time that an upload may take."""

    @property
    def file_bytes(self) -> int:
        """Most bytes of an image."""
        return self.mebibytes << 20

    @property
    def body_bytes(self) -> int:
        """Most bytes of a request: its images, and 64 KiB for what stands between them."""
        return self.files * self.file_bytes + (1 << 16)


def check_limits(limits: Limits, port: int) -> None:
    """Raise a `UserError` if a limit leaves nothing, or a port cannot exist.

    Args:
        limits: the limits.
        port: number of the port; 0 is a free one.
    """
    for flag, value in (("--max-files", limits.files), ("--max-mib", limits.mebibytes)):
        if value < 1:
            raise UserError(f"{flag} must be at least 1, not {value}")
    if not 0 <= port < PORTS:
        raise UserError(f"--port must be from 0 (a free port) to {PORTS - 1}, not {port}")
