"""Makes a table from the metrics.json of finished runs: published numbers beside ours, mean ± std over seeds.

    python scripts/collect.py lift/tab6_peft_methods --seeds 0 1 2 --format latex > tab6.tex
    python scripts/collect.py output/digits_lt_tiny_clip_peft* --metrics accuracy few_acc ece
    python scripts/collect.py output/my_run output/my_run/tests/tte_True

With a grid (scripts/reproduce.py --list shows them) the table has all rows of the grid, those too that were not run.
With run folders, runs that differ in nothing but their seed are one row. Folders without a result are left out.
Standard deviations are those of a sample (n − 1).
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.configs.errors import UserError
from tailtune.main import Parser, exit_code_and_line, exit_code_of, print_text
from tailtune.scripts._grid import (
    METRICS,
    Grid,
    add_selection,
    check_metrics,
    result,
    runs,
    select,
    split_extra,
)
from tailtune.scripts._table import FORMATS, Result, Row
from tailtune.trainers.processes.exit import run_as_process


def grid_rows(grid: Grid, seeds: Sequence[int], extra: Sequence[str] = ()) -> list[Row]:
    """The rows of a grid, including rows whose commands were not run.

    Args:
        grid: the rows of a table.
        seeds: seeds with which every command should have been run.
        extra: `KEY VALUE` words that were added to every command.
    """
    rows = []
    for cell in grid.cells:
        seeds_of_cell = runs(cell, seeds, extra)
        paths = (result(cell.command(seed, extra)) for seed in seeds_of_cell)
        results = [_read(path) for path in paths if path is not None]
        rows.append(Row(cell.words[1], cell.row, len(seeds_of_cell), results, cell.published))
    return rows


def folder_rows(folders: Sequence[Path]) -> list[Row]:
    """Create one row for all runs that differ only in their seed.

    Args:
        folders: finished run folders, or folders `tests/KEY` within them.
    """
    groups: dict[str, list[tuple[Path, Result]]] = {}
    for folder in folders:
        contents = _read(folder / "metrics.json")
        groups.setdefault(_identity(folder, contents), []).append((folder, contents))
    return [_group_row(group) for group in groups.values()]


def with_result(names: Sequence[str]) -> list[Path]:
    """Select the folders that contain the result of a run. Report the number of other paths on standard error.

    Args:
        names: paths, such as all that the shell expands from `output/*`.

    Raises:
        UserError: a path does not exist, or no folder contains a result.
    """
    for name in names:
        if not Path(name).exists():
            raise UserError(f"{name} is no folder; name run folders")
    folders = [Path(name) for name in names if _is_run(Path(name))]
    others = [name for name in names if Path(name) not in folders]
    if not folders:
        raise UserError(f"{others[0]} holds no metrics.json of a run; name the folder of a finished run")
    if others:
        shown = ", ".join([*others[:5], *(["…"] if len(others) > 5 else [])])
        print(f"left out {len(others)} of {len(names)}, which are no finished runs: {shown}", file=sys.stderr)
    return folders


def _is_run(folder: Path) -> bool:
    """Whether a folder contains a result and is a run folder, or a folder `tests/KEY` in a run folder."""
    return (folder / "metrics.json").is_file() and (_run_folder(folder) / "config.yaml").is_file()


def _run_folder(folder: Path) -> Path:
    """The run folder: `folder` itself, or the folder that contains `folder` as `tests/KEY`."""
    return folder if (folder / "config.yaml").is_file() else folder.parent.parent


def _identity(folder: Path, contents: Result) -> str:
    """All options of a run and of its evaluation, without the seed and the checkpoint, as text for comparison."""
    from tailtune.configs import load_resolved, values_of
    from tailtune.configs.key import TRAIN
    from tailtune.trainers.option_schema import declared

    trained = values_of(load_resolved(_run_folder(folder) / "config.yaml", declared()), TRAIN)
    tested = {key: value for key, value in contents.get("evaluation", {}).items() if key not in ("checkpoint", "of")}
    return json.dumps([{**trained, "seed": None}, tested], sort_keys=True)


def _group_row(group: list[tuple[Path, Result]]) -> Row:
    """The row of runs that differ only in their seed."""
    folder, first = group[0]
    home = folder.parent.parent if folder.parent.name == "tests" else folder
    name = folder.relative_to(home.parent).as_posix()
    name = re.sub(r"_seed_\d+", "", name) if len(group) > 1 else name
    return Row(first["data"], name, len(group), [contents for _, contents in group])


def _read(path: Path) -> Result:
    from tailtune.trainers.runs.result_table import read_result

    return read_result(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments; None: those of this process.

    Returns:
        The exit code: 0 for success, 2 for wrong input.
    """
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    words, extra = split_extra(argv)
    args = _parser().parse_args(words)
    check_metrics(args.metrics or ())
    metrics: Sequence[str]
    if any(Path(name).is_dir() for name in args.what):
        rows, metrics, paper = folder_rows(with_result(args.what)), METRICS, None
    elif len(args.what) == 1:
        args.grid = args.what[0]
        grid, seeds = select(args)
        rows, metrics, paper = grid_rows(grid, seeds, extra), grid.metrics, grid.paper
    else:
        raise UserError(f"{args.what[0]} is no folder; name one grid, or run folders")
    print_text(FORMATS[args.format](rows, args.metrics or metrics, paper).removesuffix("\n"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python scripts/collect.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python scripts/collect.py GRID | FOLDER … [options] [-- KEY VALUE …]",
        epilog="what stands behind -- was added to every command of the grid",
    )
    parser.add_argument("what", nargs="+", metavar="GRID | FOLDER", help="a grid, or run folders")
    parser.add_argument("--format", choices=FORMATS, default="md", help="of the table; default: md")
    metrics = "names of numbers in metrics.json, such as few_acc; default: those of the grid"
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=metrics)
    add_selection(parser)
    return parser


if __name__ == "__main__":
    run_as_process(main, exit_code_and_line)
