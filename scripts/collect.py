"""Makes a table from the metrics.json of finished runs: published numbers beside ours, mean ± std over seeds.

    python scripts/collect.py lift/tab6_peft_methods --seeds 0 1 2 --format latex > tab6.tex
    python scripts/collect.py output/digits_lt_tiny_clip_peft* --metrics accuracy few_acc ece
    python scripts/collect.py output/my_run output/my_run/tests/tte_True --output comparison.html

With a grid (scripts/reproduce.py --list shows them) the table has all rows of the grid, those too that were not run.
With run folders this is `python main.py compare`: runs that differ in nothing but their seed are one row, each row is
compared with the first one over the test images, and folders without a result are left out.
Standard deviations are those of a sample (n − 1).
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.configs.errors import UserError
from tailtune.main import Parser, exit_code_and_line, exit_code_of
from tailtune.scripts._grid import Grid, add_selection, result, runs, select, split_extra
from tailtune.trainers.cached_schema import cached_schema
from tailtune.trainers.comparison.command import add_arguments, check_arguments, compare, show
from tailtune.trainers.comparison.rows import Row
from tailtune.trainers.comparison.tables import Table
from tailtune.trainers.processes.exit import run_as_process
from tailtune.trainers.runs.result_table import read_result


def grid_table(
    grid: Grid, seeds: Sequence[int], extra: Sequence[str] = (), metrics: Sequence[str] | None = None
) -> Table:
    """The table of a grid, including rows whose commands were not run.

    Args:
        grid: the rows of a table.
        seeds: seeds with which every command should have been run.
        extra: `KEY VALUE` words that were added to every command.
        metrics: metrics of the columns; None: those of the grid.
    """
    rows = []
    for cell in grid.cells:
        seeds_of_cell = runs(cell, seeds, extra)
        found = (result(cell.command(seed, extra)) for seed in seeds_of_cell)
        paths = [path for path in found if path is not None]
        results, folders = [read_result(path) for path in paths], tuple(path.parent for path in paths)
        rows.append(Row(cell.words[1], cell.row, len(seeds_of_cell), results, cell.published, folders))
    notes = [f"Only the commands with {grid.selected}."] if grid.selected else []
    notes += [f"Every command was run with {shlex.join(extra)}."] if extra else []
    return Table(rows, metrics or grid.metrics, grid.paper, notes=notes)


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
    check_arguments(args)
    if any(Path(name).is_dir() for name in args.what):
        for flag, given in (("--seeds", args.seeds), ("--where", args.where), ("--", extra)):
            if given:
                raise UserError(f"{flag} selects commands of a grid, and {args.what[0]} is a folder; leave it out")
        compare(args.what, args, cached_schema)
    elif len(args.what) == 1:
        args.grid = args.what[0]
        grid, seeds = select(args)
        show(grid_table(grid, seeds, extra, args.metrics), args)
    else:
        raise UserError(f"{args.what[0]} is no folder; name one grid, or run folders")
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
    add_arguments(parser)
    add_selection(parser)
    return parser


if __name__ == "__main__":
    run_as_process(main, exit_code_and_line)
