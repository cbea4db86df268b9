"""Reads grids for reproduce.py and collect.py. A grid is a YAML that defines all commands of a table by rows and axes.

The format, by example:

    # title: one line
    paper: LIFT, Table 5                       # left out: the table has no *published* columns
    metrics: [accuracy, few_acc]               # left out: METRICS
    seeds: [0, 1, 2]                           # left out: the default seed
    axes:
      r: [1, 2, 4]                             # a placeholder and its values
      data:                                    # or values that set further placeholders, which are empty elsewhere
        imagenet_lt:
        inat2018: {more: num_epochs 20}
    rows:                                      # a row has a command for every combination of the axes it mentions
      "r = {r}": -d {data} -m clip_vit_b16 adaptformer True adapter_dim {r} {more}
      LIFT:
        run: ["-d {data} …", -d cifar100 …]    # one command or several
        published: {imagenet_lt: [(77.0), 80.2]}  # in the order of metrics; in brackets: not verified
"""

import argparse
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from string import Formatter
from typing import Any

from tailtune.configs import CfgNode, describe, load_configs
from tailtune.configs.errors import UserError, lookup, unknown
from tailtune.configs.lift_plus_words import translated
from tailtune.configs.yaml_reader import read_yaml
from tailtune.main import split_arguments
from tailtune.trainers.comparison.rows import METRICS, check_metrics
from tailtune.trainers.training_options import TrainingOptions

FOLDER = Path(__file__).resolve().parent / "grids"
KEYS, ROW_KEYS = ("paper", "metrics", "seeds", "axes", "rows"), ("run", "published")
"""Keys of a grid, and those of a row that is more than a command."""
MOST = 10_000
"""Largest number of commands of a row. A larger number is taken for a mistake in the axes."""

Axes = Mapping[str, list[dict[str, str]]]
"""Axis → its values. A value is a mapping from each placeholder that it sets to the words that replace it."""


@dataclass(frozen=True)
class Cell:
    """One command of a grid: a row of the table for one data set."""

    row: str
    words: tuple[str, ...]
    """The words after `python main.py`: `-d DATA -m MODEL KEY VALUE …`, or with `-b` a line of LIFT+."""
    published: Mapping[str, str]
    """Metric → number in the paper, as text."""

    @property
    def facts(self) -> dict[str, str]:
        """The facts that `--where` can select by: data, model, row and the options in the command."""
        options = dict(zip(self.words[::2], self.words[1::2], strict=True))
        flags = {"data": options.pop("-d"), "model": options.pop("-m"), "row": self.row}
        return flags | ({"backbone": options.pop("-b")} if "-b" in options else {}) | options

    def command(self, seed: int, extra: Sequence[str] = ()) -> list[str]:
        """The words of the command with further `KEY VALUE` words, and with a seed unless they set one themselves."""
        return _with_seed([*self.words, *extra], seed)

    def commands(self, seed: int, extra: Sequence[str] = ()) -> list[list[str]]:
        """The commands of this cell. A `test_only` command is preceded by the command that trains its model.

        The training command consists of the words before `test_only`.
        """
        if "test_only" not in self.words:
            return [self.command(seed, extra)]
        training = self.words[: self.words.index("test_only")]
        return [_with_seed([*training, *extra], seed), self.command(seed, extra)]


@dataclass(frozen=True)
class Grid:
    """All commands of a table."""

    name: str
    title: str
    paper: str | None
    metrics: tuple[str, ...]
    seeds: tuple[int, ...]
    cells: tuple[Cell, ...]
    """The cells are sorted by data set; cells of the same data set are in the order of the rows."""
    selected: str = ""
    """The facts by which cells were selected, as text; empty for a whole grid."""

    def where(self, facts: Mapping[str, str]) -> "Grid":
        """Select the cells that have these facts.

        Raises:
            UserError: no cell has them.
        """
        kept = tuple(cell for cell in self.cells if facts.items() <= cell.facts.items())
        asked = " ".join(f"{key} {value}" for key, value in facts.items())
        if not kept:
            raise UserError(f"nothing in {self.name} has {asked}; --print shows its commands")
        return Grid(self.name, self.title, self.paper, self.metrics, self.seeds, kept, asked)


def names() -> dict[str, Path]:
    """The shipped grids: name → file."""
    return {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def read(name: str) -> Grid:
    """Read a grid.

    Args:
        name: name of a shipped grid, or path of a YAML.

    Raises:
        UserError: there is no grid of this name, or the file is not a grid.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else lookup(names(), name, "grid")
    body = read_yaml(path)
    if not isinstance(body, dict) or not isinstance(body.get("rows"), dict):
        raise UserError(f"{path}: a grid needs `rows: {{name: command}}`; scripts/_grid.py describes the format")
    _check_keys(path, body)
    try:
        axes = {axis: _values(axis, values) for axis, values in body.get("axes", {}).items()}
        metrics = tuple(map(str, body.get("metrics", METRICS)))
        seeds = tuple(dict.fromkeys(map(int, body.get("seeds", (0,)))))
        cells = [cell for row, entry in body["rows"].items() for cell in _cells(row, entry, axes, metrics)]
    except KeyError as error:
        raise UserError(f"{path}: no axis gives the placeholder {{{error.args[0]}}}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is no grid ({error}); scripts/_grid.py describes the format") from error
    if not (cells and seeds):
        raise UserError(f"{path} has no {'seeds' if cells else 'rows'}; scripts/_grid.py describes the format")
    check_metrics(metrics)  # before the runs, which may take many hours
    _check_cells(path, body, axes, cells)
    order = list(dict.fromkeys(cell.words[1] for cell in cells))
    cells.sort(key=lambda cell: order.index(cell.words[1]))
    known_as = name if name in names() else path.stem
    return Grid(known_as, describe(path), body.get("paper"), metrics, seeds, tuple(cells))


def stages(words: Sequence[str]) -> list[CfgNode]:
    """The configs of all stages of a command, given by its words after `python main.py`."""
    from tailtune.trainers.option_schema import declared

    flags, pairs = split_arguments(words)
    named = dict(zip(flags[::2], flags[1::2], strict=True))
    model, pairs = translated(named.get("-b"), named["-m"], pairs)
    return load_configs(named["-d"], model, pairs, declared())


def config(words: Sequence[str]) -> CfgNode:
    """The resolved config of a command, given by its words after `python main.py`."""
    from tailtune.models import resolve

    return resolve(stages(words)[-1])


def result(words: Sequence[str]) -> Path | None:
    """Path of the metrics.json that a command has written; None if the command has not finished.

    The folder of an `output_dir` may hold a run of other options. Its result is not that of the command.

    Raises:
        UserError: the stored config is damaged, so that nobody knows of which run the result is.
    """
    from tailtune.trainers.runs.longer_run import epochs_before
    from tailtune.trainers.runs.ownership import OtherRun
    from tailtune.trainers.runs.resume_decision import still_true
    from tailtune.trainers.runs.run_folder import RunFolder

    cfg = config(words)
    folder = RunFolder(cfg)
    path = folder.target() / "metrics.json"
    if not path.exists() or not still_true(path, folder, {}):
        return None
    try:
        if folder.config.exists():
            folder.compare()
    except OtherRun:
        return None
    return path if epochs_before(folder.config, cfg) is None else None


def runs(cell: Cell, seeds: Sequence[int], extra: Sequence[str] = ()) -> list[int]:
    """The seeds with which a cell is run: one if it sets `seed` itself, or is zero-shot, so that no seed matters."""
    once = _sets_seed([*cell.words, *extra]) or config(cell.command(seeds[0], extra)).zero_shot
    return list(seeds[:1] if once else seeds)


def split_extra(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the words before `--` and the `KEY VALUE` words after it."""
    cut = list(argv).index("--") if "--" in argv else len(argv)
    return list(argv[:cut]), list(argv[cut + 1 :])


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that select commands of a grid."""
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds of the runs; default: the grid's")
    where = "only the commands with this data, model, row or option; can be repeated"
    parser.add_argument("--where", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help=where)


def select(args: argparse.Namespace) -> tuple[Grid, list[int]]:
    """The selected part of a grid, and the seeds, each once: a repeated seed is the same run, which would count twice.

    Raises:
        UserError: there is no such grid, or no command has all the facts.
    """
    grid, facts = read(args.grid), dict(args.where)
    for key, value in args.where:
        if facts[key] != value:
            raise UserError(f"no command has both {key} {value} and {key} {facts[key]}; give --where {key} once")
    return grid.where(facts) if facts else grid, list(dict.fromkeys(args.seeds or grid.seeds))


def _with_seed(words: list[str], seed: int) -> list[str]:
    """The words of a command with those that set a seed. A seed of its own, or the default one, needs no words."""
    return words if _sets_seed(words) or seed == TrainingOptions().seed else [*words, "seed", str(seed)]


def _sets_seed(words: Sequence[str]) -> bool:
    """Whether the words of a command set the option `seed`."""
    return any(word == "seed" or word.startswith("seed=") for word in words)


def _check_keys(path: Path, body: Mapping[str, Any]) -> None:
    """Raise a `UserError` for a key of a grid or of its rows that nothing reads, such as `seed` for `seeds`."""
    for keys, known, place in (
        (body, KEYS, ""),
        *((entry, ROW_KEYS, f", row '{row}'") for row, entry in body["rows"].items() if isinstance(entry, dict)),
    ):
        for key in (key for key in keys if key not in known):
            raise unknown(f"key of {path}{place}", str(key), known)


def _check_cells(path: Path, body: Mapping[str, Any], axes: Axes, cells: Sequence[Cell]) -> None:
    """Check that every axis and every published number is used, and that rows can be told apart.

    Raises:
        UserError: names what would be ignored.
    """
    entries = [entry if isinstance(entry, dict) else {"run": entry} for entry in body["rows"].values()]
    templates = [str(run) for entry in entries for run in _templates(entry)]
    mentioned = {name for template in templates for _, name, _, _ in Formatter().parse(template) if name}
    for axis, values in axes.items():
        if not values or not mentioned & values[0].keys():
            raise UserError(f"{path}: no command mentions the axis {axis}; write {{{axis}}} into one, or leave it out")
    tested = {cell.words[1] for cell in cells}
    for row, entry in zip(body["rows"], entries, strict=True):
        for data, numbers in (entry.get("published") or {}).items():
            if data not in tested:
                raise UserError(f"{path}, row '{row}': numbers are published for {data}, which no command uses")
            if len(numbers) > len(body.get("metrics", METRICS)):
                raise UserError(f"{path}, row '{row}': more numbers are published for {data} than there are metrics")
    named: set[tuple[str, str]] = set()
    for cell in cells:
        name = (cell.words[1], cell.row)
        if name in named:
            raise UserError(f"{path}: two commands for {name[0]} are the row '{name[1]}'; write an axis into the name")
        named.add(name)


def _templates(entry: Mapping[str, Any]) -> Sequence[Any]:
    """The commands of a row, with placeholders."""
    run = entry.get("run") or ""
    return [run] if isinstance(run, str) else run


def _values(axis: str, values: Any) -> list[dict[str, str]]:
    pairs = values.items() if isinstance(values, dict) else ((value, None) for value in values)
    placeholders = {value: more or {} for value, more in pairs}
    blank = {name: "" for more in placeholders.values() for name in more}
    return [{axis: str(value), **blank, **{k: str(v) for k, v in more.items()}} for value, more in placeholders.items()]


def _cells(row: str, entry: Any, axes: Axes, metrics: Sequence[str]) -> Iterator[Cell]:
    entry = entry if isinstance(entry, dict) else {"run": entry}
    for template in _templates(entry):
        for words in _combinations(str(template), axes):
            command = tuple(shlex.split(str(template).format_map(words)))
            if tuple(word for word in command[0:6:2] if word in ("-d", "-m")) != ("-d", "-m") or len(command) % 2:
                raise UserError(f"grid row '{row}': a command is `-d DATA -m MODEL KEY VALUE …`, not `{template}`")
            published = entry.get("published", {}).get(command[1], [])
            numbers = {metric: str(n) for metric, n in zip(metrics, published, strict=False) if n is not None}
            yield Cell(row.format_map(words), command, numbers)


def _combinations(template: str, axes: Axes) -> Iterator[dict[str, str]]:
    """Placeholder → words, for every combination of the axes that the template mentions."""
    mentioned = {name for _, name, _, _ in Formatter().parse(template) if name}
    used = [values for values in axes.values() if values and mentioned & values[0].keys()]
    if prod(map(len, used)) > MOST:
        raise ValueError(f"a row of {prod(map(len, used)):,} commands, more than {MOST:,}")
    for values in product(*used):
        yield {name: words for value in values for name, words in value.items()}
