"""TABLES: the formats in which `predict` writes one row for each image, a few rows at a time."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO, NamedTuple

from tailtune.configs.errors import UserError

TOP = 5
"""Number of most probable classes in a row, if there are so many classes."""
UNSURE = "unsure"
"""The label below the threshold."""
Top = Sequence[tuple[str, float]]
"""The most probable classes of an image and their probabilities, at most `TOP`, the most probable first."""
ROWS_AT_ONCE = 2**14
"""Rows of a row group of a Parquet file. They are kept in memory until it is written."""


class Row(NamedTuple):
    """The prediction of an image."""

    path: str
    label: str
    """The most probable class, or `UNSURE`."""
    top: Top

    @classmethod
    def of(cls, path: str, top: Top, threshold: float | None) -> "Row":
        """The prediction of an image.

        Args:
            path: the image.
            top: its most probable classes.
            threshold: probability below which the label is `UNSURE`; None: the label is always a class.
        """
        label, probability = top[0]
        return cls(path, UNSURE if threshold is not None and probability < threshold else label, top)

    def values(self) -> list[Any]:
        """The values of the columns that `columns` names."""
        pairs = (value for name, probability in self.top for value in (name, _rounded(probability)))
        return [self.path, self.label, _rounded(self.top[0][1]), *pairs]

    def as_object(self) -> dict[str, Any]:
        """The row as an object of JSON."""
        top = [{"label": name, "probability": _rounded(probability)} for name, probability in self.top]
        return {"path": self.path, "label": self.label, "probability": top[0]["probability"], "top": top}


AddRows = Callable[[Sequence[Row]], object]
"""Writes some rows."""


def columns(classes: int) -> list[str]:
    """The columns of a table.

    Args:
        classes: number of classes.
    """
    numbers = range(1, min(TOP, classes) + 1)
    return ["path", "label", "probability", *(f"{name}_{n}" for n in numbers for name in ("label", "probability"))]


@contextmanager
def csv_table(file: BinaryIO, classes: int) -> Iterator[AddRows]:
    """CSV in UTF-8 with a line of column names. Bytes of a path that are no UTF-8 are kept."""

    def write(rows: Sequence[Sequence[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        _write(file, text.getvalue())

    write([columns(classes)])
    yield lambda rows: write([row.values() for row in rows])


@contextmanager
def json_lines(file: BinaryIO, classes: int) -> Iterator[AddRows]:
    """An object in each line: path, label, probability, and `top`, a list of labels and probabilities."""

    def add(rows: Sequence[Row]) -> None:
        _write(file, "".join(f"{json.dumps(row.as_object(), ensure_ascii=False)}\n" for row in rows))

    yield add


@contextmanager
def parquet(file: BinaryIO, classes: int) -> Iterator[AddRows]:
    """Parquet with the columns of the CSV. Bytes of a path that are no UTF-8 become `\\udcNN`."""
    pyarrow = _pyarrow()
    names = columns(classes)
    types = [pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in names]
    waiting: list[list[Any]] = []

    def write() -> None:
        by_column = zip(*waiting, strict=True) if waiting else ((),) * len(names)
        arrays = [pyarrow.array(values, kind) for values, kind in zip(by_column, types, strict=True)]
        writer.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))
        waiting.clear()

    def add(rows: Sequence[Row]) -> None:
        for row in rows:
            _, *others = row.values()
            waiting.append([row.path.encode(errors="backslashreplace").decode(), *others])
        if len(waiting) >= ROWS_AT_ONCE:
            write()

    schema = pyarrow.schema(list(zip(names, types, strict=True)))
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        yield add
        write()


TABLES: Mapping[str, Callable[..., Any]] = {"csv": csv_table, "jsonl": json_lines, "parquet": parquet}
"""Name of a format → context manager that takes the open file and the number of classes, and gives `AddRows`."""


def check_format(kind: str, to_file: bool) -> None:
    """Raise a `UserError` if a table of a format cannot be written.

    Args:
        kind: entry of `TABLES`.
        to_file: whether it is written to a file, not to standard output.
    """
    if kind != "parquet":
        return
    if not to_file:
        raise UserError("--format parquet writes no text: name a file with --out FILE.parquet")
    _pyarrow()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            'Parquet needs the package pyarrow: `pip install "tailtune[parquet]"`, in a checkout `pip install -r '
            "requirements-parquet.txt`; or choose csv or jsonl"
        ) from None
    return pyarrow


def _rounded(probability: float) -> float:
    """Six significant digits: more would differ between devices."""
    return float(f"{probability:.6g}")


def _write(file: BinaryIO, text: str) -> None:
    file.write(text.encode(errors="surrogateescape"))
    file.flush()
