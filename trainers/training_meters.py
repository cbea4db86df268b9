"""Running loss and accuracy without a host sync: counted on the device, read when a line is printed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tailtune.datasets.long_tail import GROUPS

DECAY = 0.9


class Meters:
    """LIFT's meters: exponential averages of loss and accuracy per step, and of accuracy per class and sample.

    The per-class average of k new samples of mean a is 0.9^k·avg + (1 − 0.9^k)·a, whatever their order.

    Args:
        groups: `many`, `med`, `few` → class indices.
    """

    def __init__(self, num_classes: int, groups: Mapping[str, Tensor], device: torch.device) -> None:
        self.groups = {name: classes.to(device) for name, classes in groups.items()}
        self.hits = torch.zeros(num_classes, device=device)
        self.seen = torch.zeros(num_classes, device=device)
        self.pending: list[Tensor] = []  # one [loss, accuracy] a step
        self.class_average = torch.full((num_classes,), torch.nan, device=device)
        self.average: list[float] | None = None  # loss, accuracy

    def add(self, logits: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Count a micro-batch: [B, C], [B], [B]; weight 0 is left out."""
        real = (weights > 0).float()
        self.hits.index_add_(0, labels, (logits.detach().argmax(-1) == labels).float() * real)
        self.seen.index_add_(0, labels, real)

    def end_step(self, loss: Tensor, accuracy: Tensor) -> None:
        """Mean loss and accuracy (%) of the whole batch, as scalars on the device."""
        self.pending.append(torch.stack([loss.float(), accuracy.float()]))

    def read(self, reduce: Any) -> tuple[list[dict[str, float]], dict[str, float | None]]:
        """The steps since the last call, and the class averages now. Syncs with the host.

        Args:
            reduce: sum of a tensor over the processes.
        """
        hits, seen = reduce(torch.stack([self.hits, self.seen]))
        keep = torch.where(self.class_average.isnan(), 0.0, DECAY**seen)
        mean = 100 * hits / seen.clamp_min(1)
        updated = keep * self.class_average.nan_to_num() + (1 - keep) * mean
        self.class_average = torch.where(seen > 0, updated, self.class_average)
        self.hits.zero_()
        self.seen.zero_()
        steps = [self._advance(*values) for values in torch.stack(self.pending).tolist()] if self.pending else []
        self.pending.clear()
        averages: dict[str, str | None] = {"mean_acc": None, **GROUPS}
        return steps, {name: self._mean(group) for name, group in averages.items()}

    def state(self) -> dict[str, Tensor]:
        pending = torch.stack(self.pending) if self.pending else torch.empty(0, 2)
        average = torch.tensor(self.average or [], dtype=torch.float64)
        counters = {"hits": self.hits, "seen": self.seen, "class_average": self.class_average}
        return {**counters, "pending": pending, "average": average}

    def load(self, state: Mapping[str, Tensor]) -> None:
        device = self.hits.device
        self.hits, self.seen = state["hits"].to(device), state["seen"].to(device)
        self.class_average = state["class_average"].to(device)
        self.pending = list(state["pending"].to(device).unbind())
        self.average = state["average"].tolist() or None

    def _advance(self, loss: float, accuracy: float) -> dict[str, float]:
        new = [loss, accuracy]
        old = self.average
        self.average = new if old is None else [DECAY * a + (1 - DECAY) * b for a, b in zip(old, new, strict=True)]
        return {"loss.val": loss, "loss.avg": self.average[0], "acc.val": accuracy, "acc.avg": self.average[1]}

    def _mean(self, group: str | None) -> float | None:
        values = self.class_average if group is None else self.class_average[self.groups[group]]
        return None if values.isnan().all() else float(values.nanmean())
