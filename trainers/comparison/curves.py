"""Draws the training curves of several runs over each other."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from tailtune.trainers.comparison.finished_runs import run_folder
from tailtune.trainers.comparison.rows import Row

POINTS = 1000
"""Largest number of points of a curve; of longer curves, as many are drawn at random."""
COLUMNS = 3
COLOURS, STYLES = 10, ("-", "--", ":", "-.")
"""Number of colours of matplotlib, and the lines of the first ten rows, the next ten …"""
Curve = tuple[list[int], list[float]]
"""Steps and values of a curve."""


def curves_of(folder: Path) -> dict[str, Curve]:
    """The curves of a run: tag → steps and values. Tags with a single point, such as results of a test, are left out.

    Args:
        folder: a run folder, or a folder `tests/KEY` in it.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # takes half a second

    path = run_folder(folder) / "tensorboard"
    if not path.is_dir():
        return {}
    events = EventAccumulator(str(path), size_guidance={"scalars": POINTS})
    events.Reload()
    found: dict[str, Curve] = {}
    for tag in events.Tags()["scalars"]:
        points = events.Scalars(tag)
        if len(points) > 1:
            found[tag] = [point.step for point in points], [point.value for point in points]
    return found


def overlaid(rows: Sequence[Row]) -> str:
    """An SVG element with one picture for each tag, in which every run has a curve; those of a row look alike.

    Args:
        rows: rows of finished runs, with their folders.

    Returns:
        The element; empty if no run has curves.
    """
    from matplotlib import rc_context

    curves = [[curves_of(folder) for folder in row.folders] for row in rows]
    every = list(dict.fromkeys(tag for runs in curves for run in runs for tag in run))
    tags = [tag for tag in every if tag.removesuffix(".val") + ".avg" not in every or not tag.endswith(".val")]
    if not tags:
        return ""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare", "text.parse_math": False}):
        return _svg(rows, curves, tags)


def _svg(rows: Sequence[Row], curves: Sequence[Sequence[dict[str, Curve]]], tags: Sequence[str]) -> str:
    from matplotlib.figure import Figure  # without pyplot, so that no display is needed

    height = -(-len(tags) // COLUMNS)
    figure = Figure(figsize=(12, 2.8 * height + 0.3 * len(rows)), layout="constrained")
    grid = figure.subplots(height, COLUMNS, squeeze=False).flat
    for axes in grid[len(tags) :]:
        axes.set_axis_off()
    lines = {}
    for tag, axes in zip(tags, grid, strict=False):
        axes.set_title(tag, fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        for number, (row, runs) in enumerate(zip(rows, curves, strict=True)):
            for run in (run for run in runs if tag in run):
                look = {"color": f"C{number % COLOURS}", "linestyle": STYLES[number // COLOURS % len(STYLES)]}
                lines[row.name] = axes.plot(*run[tag], **look, linewidth=1, alpha=0.8)[0]
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", fontsize=8)
    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?(?=<svg)", "", content.getvalue(), flags=re.DOTALL)
