"""Draws each figure of a report. matplotlib's style and the colour of the text are set by `figures.py`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from tailtune.datasets.commands.class_curve import COLORS, LABELS
from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.trainers.report.curves import Curve, read_curves
from tailtune.trainers.report.subject import Subject

SERIES = ("#3b82c4", "#c2528b", "#b08a2e", "#4fa3a5", "#8a6bbf")
"""Predictors and curves. The groups of classes have the colours of `class_curve`."""
EXPERTS = ("#5b7db1", "#7fb3a6", "#d9b44a", "#a8749c", "#8f7560")
GREY = "#8a8f98"
SIZE = (4.6, 3.1)
"""Inches. On the page of a phone, the letters are then about as large as small print."""
MOST_CLASSES = 40
"""Classes in the picture of the confusion matrix."""
MOST_POINTS = 1500
"""Points of a scatter plot that are drawn as vectors; more of them become pixels, which take less space."""


def _axes(size: tuple[float, float] = SIZE, rows: int = 1, **ratios: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, 1, sharex=rows > 1, **ratios)


def accuracy_by_frequency(subject: Subject) -> Figure:
    """Accuracy of each class against its number of training images, with the groups shaded and their means."""
    figure, axes = _axes()
    counts = np.maximum(1, np.array(subject.result["class_counts"], dtype=float))
    values = subject.result["test"]["per_class_acc"]
    accuracies = np.array([np.nan if value is None else value for value in values])
    present = [(name, classes) for name, classes in subject.groups.items() if len(classes)]
    large = len(counts) > MOST_POINTS
    for name, classes in present:
        low, high = counts[classes].min() / 1.06, counts[classes].max() * 1.06
        axes.axvspan(low, high, color=COLORS[name], alpha=0.12, linewidth=0)
        size, alpha = (3, 0.35) if large else (22, 0.75)
        axes.scatter(
            counts[classes],
            accuracies[classes],
            size,
            COLORS[name],
            alpha=alpha,
            linewidths=0,
            rasterized=large,
            label=f"{LABELS[name]} ({len(classes)})",
        )
        mean = subject.result["test"][{group: metric for metric, group in SHOT_GROUPS.items()}[name]]
        if mean is not None:
            axes.plot([low, high], [mean, mean], color=COLORS[name], linewidth=1.8)
    axes.set(xscale="log", xlabel="training images of the class", ylabel="accuracy (%)", ylim=(-3, 103))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if counts.max() < 200 * counts.min() else (1,)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    scale = 2.5 if large else 1
    title = {"title": "group (number of classes)", "alignment": "left", "title_fontsize": 8}
    figure.legend(loc="outside upper left", ncols=3, handletextpad=0.2, columnspacing=1, markerscale=scale, **title)
    return figure


def accuracy_by_class(subject: Subject) -> Figure:
    """Accuracy of each class in the colour of its group, the most frequent class first; with names if there is room."""
    counts, values = np.array(subject.result["class_counts"]), subject.result["test"]["per_class_acc"]
    order = np.argsort(-counts, kind="stable")
    heights = np.array([np.nan if value is None else value for value in values], dtype=float)[order]
    groups = np.array(subject.group_of)[order]
    named = len(order) <= MOST_CLASSES
    figure, axes = _axes((max(SIZE[0], 0.22 * len(order)), 3.6) if named else (7, SIZE[1]))
    for name in subject.groups:
        places = np.flatnonzero(groups == name)
        if len(places) and named:
            axes.bar(places, heights[places], color=COLORS[name])
        elif len(places):  # bars of thousands of classes would take seconds
            axes.vlines(places, 0, heights[places], COLORS[name], linewidth=max(0.3, 400 / len(order)))
    if named:
        _name_places(axes, [_short(subject.names[label]) for label in order])
    else:
        axes.set(xlabel="classes, the most frequent first")
    axes.grid(False, axis="x")
    axes.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(-0.6, len(order) - 0.4))
    present = [name for name, classes in subject.groups.items() if len(classes)]
    handles = [Patch(color=COLORS[name], label=LABELS[name]) for name in present]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def reliability(subject: Subject) -> Figure:
    """The reliability diagram: accuracy in each bin of confidence, above the number of images in the bin."""
    figure, (upper, lower) = _axes(rows=2, height_ratios=(3, 1))
    found = subject.result["test"]["calibration"]
    width = 100 / found["bins"]
    centres = width * (np.arange(found["bins"]) + 0.5)
    known = [number for number, value in enumerate(found["accuracy"]) if value is not None]
    accuracy, confidence = (np.array([found[key][number] for number in known]) for key in ("accuracy", "confidence"))
    upper.bar(centres[known], accuracy, 0.9 * width, color=SERIES[0], alpha=0.85, label="accuracy")
    ends = centres[known] - 0.45 * width, centres[known] + 0.45 * width
    upper.hlines(confidence, *ends, color=SERIES[1], linewidth=2, label="mean confidence")
    upper.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1)
    upper.set(ylabel="accuracy (%)", ylim=(0, 100), xlim=(0, 100))
    lower.bar(centres, found["counts"], 0.9 * width, color=GREY, alpha=0.7)
    lower.set(xlabel="confidence (%)", ylabel="images")
    lower.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def confusion_block(subject: Subject) -> Figure | None:
    """The confusion matrix of all classes, or of those that are confused most; similar classes side by side."""
    labels, guesses, sizes = subject.confusions
    wrong = labels != guesses
    if not wrong.any():
        return None
    worst = np.flatnonzero(wrong)[np.argsort(-sizes[wrong], kind="stable")]  # the pairs with most mistakes first
    ends = np.stack([labels[worst], guesses[worst]], 1).ravel()
    chosen = np.sort(list(dict.fromkeys([*ends.tolist(), *range(len(subject.class_names))]))[:MOST_CLASSES])
    rows, columns = np.searchsorted(chosen, labels), np.searchsorted(chosen, guesses)
    inside = np.isin(labels, chosen) & np.isin(guesses, chosen)
    matrix = np.zeros((len(chosen), len(chosen)))
    matrix[rows[inside], columns[inside]] = sizes[inside]
    tested = np.bincount(subject.predicted.labels, minlength=len(subject.class_names))[chosen]
    matrix = 100 * matrix / np.maximum(1, tested)[:, None]
    order = _similar(matrix)
    side = max(4.6, 0.17 * len(chosen) + 1.6)
    figure, axes = _axes((side + 0.7, side))
    image = axes.imshow(matrix[np.ix_(order, order)], _clear_to(SERIES[0]), vmin=0, vmax=100, interpolation="nearest")
    shown = [_short(subject.names[chosen[place]]) for place in order]
    size = 8 if len(chosen) <= 20 else 6.5
    axes.set_xticks(range(len(shown)), shown, rotation=90, fontsize=size)
    axes.set_yticks(range(len(shown)), shown, fontsize=size)
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02, label="% of the true class")
    bar.outline.set_visible(False)
    return figure


def _similar(matrix: np.ndarray) -> np.ndarray:
    """An order in which classes that are confused with each other are side by side (hierarchical clustering)."""
    if len(matrix) < 3:
        return np.arange(len(matrix))
    likeness = matrix + matrix.T
    distance = likeness.max() - likeness
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(distance, checks=False), "average", optimal_ordering=True))


def _clear_to(color: str) -> LinearSegmentedColormap:
    """From transparent to a colour, so that the map is right on a light and on a dark page. Small values are seen."""
    stops = [(0, (*_rgb(color), 0.0)), (0.001, (*_rgb(color), 0.12)), (1, (*_rgb(color), 1.0))]
    return LinearSegmentedColormap.from_list("clear", stops, N=1024)


def _rgb(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return red, green, blue


def _short(name: str, most: int = 24) -> str:
    """A name without its middle, because names of similar classes often differ at the end."""
    return name if len(name) <= most else f"{name[: most - 11]}…{name[-10:]}"


def accuracy_by_distribution(subject: Subject) -> Figure | None:
    """Accuracy of every predictor on every test distribution."""
    results: Mapping[str, Any] = subject.result.get("distributions", {})
    if not results:
        return None
    figure, axes = _axes()
    names = list(dict.fromkeys(name for entry in results.values() for name in entry["predictors"]))
    places = np.arange(len(results))
    for name, color, marker in zip(names, SERIES, "osD^v", strict=False):
        values = [entry["predictors"].get(name, {}).get("accuracy") for entry in results.values()]
        heights = [np.nan if value is None else value for value in values]
        axes.plot(places, heights, color=color, marker=marker, markersize=4, linewidth=1.4, label=name)
    _name_places(axes, list(results))
    axes.set(ylabel="accuracy (%)")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def expert_weights(subject: Subject) -> Figure | None:
    """The weights of the experts that an adaptation has learnt on each test distribution."""
    results: Mapping[str, Any] = subject.result.get("distributions", {})
    weights = {
        title: next((values["weights"] for values in entry["predictors"].values() if "weights" in values), None)
        for title, entry in results.items()
    }
    known = {title: value for title, value in weights.items() if value is not None}
    if not known:
        return None
    figure, axes = _axes()
    bottom = np.zeros(len(known))
    for expert, heights in enumerate(np.array(list(known.values())).T):
        color = EXPERTS[expert % len(EXPERTS)]
        axes.bar(range(len(known)), heights, 0.8, bottom, color=color, alpha=0.85, label=f"expert {expert + 1}")
        bottom += heights
    _name_places(axes, list(known))
    axes.set(ylabel="weight", ylim=(0, 1))
    figure.legend(loc="outside upper left", ncols=5)
    return figure


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")


def training_curves(subject: Subject) -> Figure | None:
    """Loss, accuracy and learning rate over the steps of the training, as far as they were recorded.

    With `keep`, a line is where the weights that were kept are from.
    """
    curves = read_curves(subject.events)
    panels = {"loss": _losses(curves), "accuracy (%)": _accuracies(curves), "learning rate": _rates(curves)}
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        return None
    figure, axes = _axes((4.6, 1.5 + 1.35 * len(panels)), len(panels))
    train = subject.result.get("train") or {}
    steps_of = {each["epoch"]: each["step"] for each in train.get("validations", [])}
    kept = steps_of.get(train.get("kept_epoch"))
    for panel, (title, found) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for name, (steps, values) in found.items():
            color = COLORS.get(name, SERIES[name.startswith("validation")])
            panel.plot(steps, values, color=color, linewidth=1.2, label=LABELS.get(name, name))
        panel.set(ylabel=title)
        if kept is not None:
            panel.axvline(kept, color=GREY, linestyle="--", linewidth=1, label="kept epoch")
        if len(found) > 1:
            place = {"loc": "lower left", "bbox_to_anchor": (-0.13, 0.98)}  # above, where no curve is
            panel.legend(ncols=3, handlelength=1.4, columnspacing=1.2, **place)
    np.atleast_1d(axes)[-1].set(xlabel="step")
    return figure


def _losses(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    names = {"train/loss_avg": "running mean", "val/loss": "validation", "val/nll": "validation NLL"}
    return {title: curves[tag] for tag, title in names.items() if tag in curves}


def _accuracies(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    names = {"train/mean_acc": "class mean", **{f"train/{metric}": group for metric, group in SHOT_GROUPS.items()}}
    names |= {"val/mean_acc": "validation, class mean"}
    return {title: curves[tag] for tag, title in names.items() if tag in curves}


def _rates(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    return {"learning rate": curves["train/lr"]} if "train/lr" in curves else {}
