"""Running loss and accuracy. They are counted on the device and read only for a log line, so that no step waits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tailtune.datasets.long_tail import SHOT_GROUPS

DECAY = 0.9
"""Weight of the old value in an exponential average."""


class TrainingMeters:
    """LIFT's meters: exponential averages of loss and accuracy over steps, and of each class's accuracy over samples.

    After k new samples with mean accuracy a, the average of a class is 0.9^k · average + (1 − 0.9^k) · a, in any order
    of the samples.

    Args:
        num_classes: number C of classes.
        groups: `many`, `med`, `few` → class indices.
        device: where to count.
    """

    def __init__(self, num_classes: int, groups: Mapping[str, Tensor], device: torch.device) -> None:
        self.groups = {name: classes.to(device) for name, classes in groups.items()}
        self.hits = torch.zeros(num_classes, device=device)
        self.seen = torch.zeros(num_classes, device=device)
        self.pending: list[Tensor] = []  # one [loss, accuracy] a step
        self.class_average = torch.full((num_classes,), torch.nan, device=device)
        self.average: list[float] | None = None  # loss, accuracy

    def add(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Count a micro-batch.

        Args:
            logits: [B, C].
            labels: [B].
            weights: [B]; images of weight 0 are not counted.
        """
        real = (weights > 0).float()
        self.hits.index_add_(0, labels, (logits.detach().argmax(-1) == labels).float() * real)
        self.seen.index_add_(0, labels, real)

    def end_step(self, loss: Tensor, accuracy: Tensor) -> None:
        """Note a step.

        Args:
            loss: mean loss of the whole batch, a scalar on the device.
            accuracy: its accuracy in %, a scalar on the device.
        """
        self.pending.append(torch.stack([loss.float(), accuracy.float()]))

    def read(self, reduce: Any) -> tuple[list[dict[str, float]], dict[str, float | None]]:
        """Read everything that was counted since the last call. This waits for the device.

        Args:
            reduce: sums a tensor over the processes.

        Returns:
            Loss and accuracy of each step (`loss`, `loss_avg`, `acc`, `acc_avg`), and the mean of the class
            averages over all classes and over each group, in %; None for a group of which no sample was seen.
        """
        hits, seen = reduce(torch.stack([self.hits, self.seen]))
        old_share = torch.where(self.class_average.isnan(), 0.0, DECAY**seen)
        mean = 100 * hits / seen.clamp_min(1)
        updated = old_share * self.class_average.nan_to_num() + (1 - old_share) * mean
        self.class_average = torch.where(seen > 0, updated, self.class_average)
        self.hits.zero_()
        self.seen.zero_()
        steps = [self._advance(*values) for values in torch.stack(self.pending).tolist()] if self.pending else []
        self.pending.clear()
        averages: dict[str, str | None] = {"mean_acc": None, **SHOT_GROUPS}
        return steps, {name: self._mean(group) for name, group in averages.items()}

    def state(self) -> dict[str, Tensor]:
        """All counts and averages, for the state of a run."""
        pending = torch.stack(self.pending) if self.pending else torch.empty(0, 2)
        average = torch.tensor(self.average or [], dtype=torch.float64)
        counters = {"hits": self.hits, "seen": self.seen, "class_average": self.class_average}
        return {**counters, "pending": pending, "average": average}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state` returned."""
        device = self.hits.device
        self.hits, self.seen = state["hits"].to(device), state["seen"].to(device)
        self.class_average = state["class_average"].to(device)
        self.pending = list(state["pending"].to(device).unbind())
        self.average = state["average"].tolist() or None

    def _advance(self, loss: float, accuracy: float) -> dict[str, float]:
        values, average = [loss, accuracy], self.average
        if average is None:
            self.average = values
        else:
            self.average = [DECAY * old + (1 - DECAY) * new for old, new in zip(average, values, strict=True)]
        return {"loss": loss, "loss_avg": self.average[0], "acc": accuracy, "acc_avg": self.average[1]}

    def _mean(self, group: str | None) -> float | None:
        values = self.class_average if group is None else self.class_average[self.groups[group]]
        return None if values.isnan().all() else float(values.nanmean())


COUNTS = ("hits", "seen")
"""What a process has counted alone. All other entries of a state are equal in all processes."""


def joined(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The state of one process that has counted what several processes have counted.

    Args:
        states: `TrainingMeters.state` of each process.
    """
    return {**states[0], **{name: torch.stack([state[name] for state in states]).sum(0) for name in COUNTS}}


def without_counts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a further process, which has counted nothing yet."""
    return {**state, **{name: torch.zeros_like(state[name]) for name in COUNTS}}
