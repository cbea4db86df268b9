"""Draws how many training images each class has, from the most to the least frequent one."""

import io

import numpy as np

from tailtune.datasets.long_tail import shot_masks

COLORS = {"many": "#1b9e77", "med": "#7570b3", "few": "#d95f02"}
LABELS = {"many": "many-shot", "med": "medium-shot", "few": "few-shot"}


def class_curve(counts: np.ndarray, many_above: int, few_below: int, title: str) -> bytes:
    """Draw the class frequencies.

    Args:
        counts: training images of each class, int64 [C].
        many_above: classes with more images are many-shot.
        few_below: of the others, classes with fewer images are few-shot.
        title: text above the picture.

    Returns:
        A PNG file.
    """
    from matplotlib.figure import Figure  # takes a second; without pyplot, so that no display is needed

    ordered = np.sort(counts)[::-1]
    ranks = np.arange(1, len(ordered) + 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, mask in shot_masks(ordered, many_above, few_below).items():
        if mask.any():
            label = f"{LABELS[name]}: {int(mask.sum())} classes, {int(ordered[mask].sum()):,} images"
            axes.bar(ranks[mask], ordered[mask], width=1.0, color=COLORS[name], label=label)
    axes.set(yscale="log", xlabel="classes, the most frequent first", ylabel="training images", title=title)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
