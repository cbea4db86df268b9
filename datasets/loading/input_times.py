"""Where the time of a loader goes, for the option `profile_data`."""

from dataclasses import dataclass, field

import numpy as np

from tailtune.datasets.view import STAGES

SHORT_WAIT = 0.05
"""Share of the time that training may wait for images before the log advises something."""


@dataclass
class InputTimes:
    """Seconds that loading took since the last report."""

    workers: int
    """Worker processes of the loader."""
    processors: int
    """Processors that they may use."""
    images: int = 0
    waited: float = 0.0
    """Time that the main process waited for batches."""
    finished: float = 0.0
    """Time of the changes on the device, as far as the main process noticed it."""
    stages: np.ndarray = field(default_factory=lambda: np.zeros(len(STAGES)))
    """Time of each of `STAGES`, summed over all processes that load."""

    def report(self, epoch: int, seconds: float) -> str:
        """A line for the log about an epoch; afterwards all times are 0 again.

        Args:
            epoch: number of the epoch, from 1.
            seconds: duration of the epoch.
        """
        share = (self.waited + self.finished) / max(seconds, 1e-9)
        images = max(self.images, 1)
        parts = ", ".join(f"{name} {1e3 * each / images:.3f}" for name, each in zip(STAGES, self.stages, strict=True))
        where = f"in {self.workers} worker processes" if self.workers else "in the main process"
        text = (
            f"data of epoch {epoch}: {share:.1%} of {seconds:.1f} s went by in waiting for images; one image takes, in "
            f"ms, {parts} {where}, and {1e3 * self.finished / images:.3f} on the device: {self._advice(share)}"
        )
        self.images, self.waited, self.finished = 0, 0.0, 0.0
        self.stages[:] = 0
        return text

    def _advice(self, share: float) -> str:
        if share <= SHORT_WAIT:
            return "faster loading would hardly help"
        longest = STAGES[int(self.stages.argmax())]
        if self.workers < self.processors and longest != "read" and self.stages[:2].any():
            return f"try num_workers {self.processors}"
        if longest == "transform":
            return "the augmentation takes longest"
        return f"to {longest} takes longest: try cache ram or cache disk"
