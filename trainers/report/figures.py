"""The figures of a report, drawn by matplotlib. The page has them as SVG; PNG and PDF are for papers."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from tailtune.trainers.report.plots import (
    accuracy_by_class,
    accuracy_by_distribution,
    accuracy_by_frequency,
    confusion_block,
    expert_weights,
    reliability,
    training_curves,
)
from tailtune.trainers.report.subject import Subject
from tailtune.trainers.storage.atomic_io import Digest, write_bytes

INK = "#010203"
"""Stands for the colour of the text in SVG, which the page sets, light or dark."""
FIGURES: Mapping[str, Callable[[Subject], Figure | None]] = {
    "frequency": accuracy_by_frequency,
    "distributions": accuracy_by_distribution,
    "weights": expert_weights,
    "confusion": confusion_block,
    "reliability": reliability,
    "curves": training_curves,
}
"""Name → function that draws the figure, or returns None if there is nothing to draw."""


PICTURES: Mapping[str, Callable[[Subject], Figure]] = {
    "accuracy_by_frequency": accuracy_by_frequency,
    "accuracy_by_class": accuracy_by_class,
}
"""Name → function that draws a picture for TensorBoard, which has no table of classes."""


def svg_figures(subject: Subject) -> dict[str, str]:
    """Name → SVG element of each figure that has something to show."""
    with _style(INK):
        return {name: _svg(figure, name) for name, figure in _drawn(subject)}


def write_figures(folder: Path, subject: Subject) -> dict[Path, Digest]:
    """Write PNG and PDF of every figure, in black on white.

    Args:
        folder: the folder for them.
        subject: what the figures show.

    Raises:
        UserError: the file system refuses to write.
    """
    digests = {}
    with _style("black"):
        for name, figure in _drawn(subject):
            for suffix in ("png", "pdf"):
                content = io.BytesIO()
                dates = {"CreationDate": None} if suffix == "pdf" else {}  # the same result makes the same file
                figure.savefig(content, format=suffix, dpi=200, metadata=dates)
                path = folder / f"{name}.{suffix}"
                digests[path] = write_bytes(path, content.getvalue())
    return digests


def png_pictures(subject: Subject) -> dict[str, bytes]:
    """Name → content of a PNG file, black on white, of each of `PICTURES`.

    Args:
        subject: what they show. They need no predictions and no images.
    """
    with _style("black"):
        return {name: _png(draw(subject), dpi=150) for name, draw in PICTURES.items()}


def _png(figure: Figure, **settings: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", **settings)
    return content.getvalue()


def _drawn(subject: Subject) -> Iterator[tuple[str, Figure]]:
    for name, draw in FIGURES.items():
        figure = draw(subject)
        if figure is not None:
            yield name, figure


@contextmanager
def _style(ink: str) -> Iterator[None]:
    """Draw with this colour of text and axes, and without messages about letters that matplotlib's font lacks."""
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style: dict[Any, Any] = dict.fromkeys(names, ink) | {
        "text.parse_math": False,  # a class may be called `$x$`
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.linewidth": 0.6,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.alpha": 0.15,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "svg.fonttype": "none",
        "pdf.fonttype": 42,  # letters that can be searched
    }
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _svg(figure: Figure, name: str) -> str:
    """A figure as an SVG element whose identifiers are those of no other figure."""
    content = io.StringIO()
    unsaid = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, dpi=150, metadata=unsaid)
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)

    def tag(found: re.Match[str]) -> str:
        inside = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", found[0].replace(INK, "currentColor"))
        return re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", inside)

    text = re.sub(r"<[^!>][^>]*>", tag, text)
    widest = round(125 * figure.get_figwidth())  # pixels; larger letters than those of the page would look odd
    start = rf'<svg viewBox="\1" role="img" class="{name}" style="max-width: {widest}px">'
    return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', start, text, count=1)
