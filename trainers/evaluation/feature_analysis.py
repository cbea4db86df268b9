"""Analysis of features: class means, and distances of images from the mean of their class (LIFT, figures 3–5)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.view import View
from tailtune.trainers.methods import Method

GROUPS = {"many": "head: many-shot", "med": "medium-shot", "few": "tail: few-shot"}
COLOURS = {"train": "#1f6fb4", "test": "#e8710a"}
NAMED = 25
"""Largest number of classes for which a heat map shows the class names."""


@dataclass(frozen=True)
class SplitFeatures:
    """The features of a split's images, on the CPU."""

    features: Tensor
    """Features scaled to length 1 [N, D]. If E experts have separate features: [N, E·D], where the part of each expert
    has length 1/√E."""
    labels: Tensor
    """Label of each image [N]."""
    means: Tensor
    """Mean of the unscaled features of each class, then scaled as `features`: [C, D] or [C, E·D]. NaN for a class
    without images."""

    @cached_property
    def distances(self) -> Tensor:
        """1 − cos(μ_c, f_i), from each image to the mean of its class in this split [N]; a mean over the experts."""
        return 1 - (self.features * self.means[self.labels]).sum(-1)

    @cached_property
    def similarity(self) -> Tensor:
        """cos(μ_i, μ_j) of all pairs of class means [C, C]; a mean over the experts."""
        return self.means @ self.means.T


@torch.no_grad()
def split_features(
    method: Method, view: View, num_classes: int, device: torch.device, batch_size: int, num_workers: int | None
) -> SplitFeatures:
    """Compute the features of all images of a view. Images that could not be read are left out.

    Args:
        method: the trained method, in eval mode.
        view: the images and their transform.
        num_classes: number C of classes.
        device: device of the method.
        batch_size: number of images that are computed at once.
        num_workers: number of processes that decode images; None chooses it.
    """
    features, labels = [], []
    for batch in eval_loader(view, batch_size, num_workers, device=device, title="features"):
        real = batch["weight"] > 0
        features.append(method.model.features(batch["image"])[real].float().cpu())
        labels.append(batch["label"][real].cpu())
    raw, targets = torch.cat(features), torch.cat(labels)
    sums = torch.zeros(num_classes, *raw.shape[1:]).index_add_(0, targets, raw)
    counts = targets.bincount(minlength=num_classes).view(-1, *[1] * (raw.ndim - 1))
    return SplitFeatures(_rows(raw), targets, _rows(sums / counts))


def _rows(features: Tensor) -> Tensor:
    """Scale features so that the dot product of two rows is a cosine: [N, D] → [N, D], or [N, E, D] → [N, E·D].

    With separate features of E experts, the dot product is the mean of the cosines of the experts. The features
    themselves cannot be averaged, because the experts have no common feature space.
    """
    unit = F.normalize(features, dim=-1)
    return unit if unit.ndim == 2 else unit.flatten(1) / unit.shape[1] ** 0.5


def summary(splits: Mapping[str, SplitFeatures], groups: Mapping[str, Tensor]) -> dict[str, Any]:
    """Mean distances by split and group, and the mean cosine between the means of different classes.

    Args:
        splits: name of a split → its features.
        groups: `many`, `med`, `few` → class indices.
    """
    statistics: dict[str, Any] = {}
    for name, split in splits.items():
        similarity = split.similarity
        others = similarity[~torch.eye(len(similarity), dtype=torch.bool)]
        statistics[name] = {"mean_cosine_between_classes": _number(others[others.isfinite()])}
        for group in GROUPS:
            distances = _of(split, groups[group])
            statistics[name][group] = {"images": len(distances), "mean_distance": _number(distances)}
    return statistics


def _of(split: SplitFeatures, classes: Tensor) -> Tensor:
    """Distances of the images of some classes."""
    return split.distances[torch.isin(split.labels, classes)]


def _number(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def heat_map(splits: Mapping[str, SplitFeatures], counts: Tensor, names: tuple[str, ...], title: str) -> Figure:
    """Draw the cosines between class means, one panel for each split. Classes are sorted by `counts`, largest first.

    Args:
        splits: name of a split → its features.
        counts: number of training images of each class [C].
        names: names of the classes.
        title: title of the figure.
    """
    order = counts.argsort(descending=True, stable=True)
    figure = Figure(figsize=(5.6 * len(splits) + 1.2, 6.8 if len(order) <= NAMED else 5.8), layout="constrained")
    axes = figure.subplots(1, len(splits), squeeze=False)[0]
    for (name, split), panel in zip(splits.items(), axes, strict=True):
        shown = split.similarity[order][:, order].numpy()
        image = panel.imshow(shown, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest")
        panel.set_title(f"{name} images", fontsize=12, pad=10)
        if len(order) <= NAMED:
            labels = [f"{names[label]} ({counts[label]})" for label in order.tolist()]
            panel.set_xticks(range(len(order)), labels, rotation=90, fontsize=9)
            panel.set_yticks(range(len(order)), labels if panel is axes[0] else [], fontsize=9)
        panel.set_xlabel("classes by training images, head → tail", labelpad=8)
    figure.colorbar(image, ax=axes, shrink=0.8, label="cosine of two class means")
    figure.suptitle(title, fontsize=13)
    return figure


def histograms(splits: Mapping[str, SplitFeatures], groups: Mapping[str, Tensor], title: str) -> Figure:
    """Draw histograms of the distances to the class mean, one panel for each group that has classes.

    Args:
        splits: name of a split → its features.
        groups: `many`, `med`, `few` → class indices.
        title: title of the figure.
    """
    shown = [group for group in GROUPS if group != "med" or len(groups[group])]
    figure = Figure(figsize=(4.6 * len(shown), 4.0), layout="constrained")
    axes = figure.subplots(1, len(shown), sharex=True, squeeze=False)[0]
    farthest = max(float(split.distances.max()) for split in splits.values())
    bins = torch.linspace(0, farthest, 41).tolist()
    for group, panel in zip(shown, axes, strict=True):
        panel.set_title(f"{GROUPS[group]} ({len(groups[group])} classes)", fontsize=12, pad=10)
        for name, split in splits.items():
            values = _of(split, groups[group])
            if not len(values):
                continue
            mean = float(values.mean())
            label = f"{name}: mean {mean:.3f}, {len(values):,} images"
            panel.hist(values.tolist(), bins=bins, density=True, color=COLOURS[name], alpha=0.45, label=label)
            panel.axvline(mean, color=COLOURS[name], linewidth=1.8)
        panel.set_xlabel("1 − cosine to the mean of its class", labelpad=8)
        panel.set_yticks([])
        panel.spines[["left", "right", "top"]].set_visible(False)
        if panel.get_legend_handles_labels()[0]:
            panel.set_ylim(top=panel.get_ylim()[1] * 1.25)
            panel.legend(fontsize=9, frameon=False, loc="upper right")
    axes[0].set_ylabel("density")
    figure.suptitle(title, fontsize=13)
    return figure
