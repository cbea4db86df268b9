"""From metrics.json files to a table: published numbers beside ours, mean ± standard deviation over seeds.

    python scripts/collect.py lift/tab6_peft_methods --seeds 0 1 2 --format latex > tab6.tex
    python scripts/collect.py output/digits_lt_tiny_clip_peft* --metrics accuracy few_acc ece
    python scripts/collect.py output/my_run output/my_run/tests/tte_True

With a grid (see scripts/reproduce.py --list) it shows the rows of the grid, also those that were not run. With run
folders, runs that differ in their seed only are one row. Standard deviations are those of a sample (n − 1).
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tailtune.configs.errors import UserError  # noqa: E402
from tailtune.main import Parser, exit_code_of  # noqa: E402
from tailtune.scripts._grid import (  # noqa: E402
    METRICS,
    Grid,
    add_selection,
    check_metrics,
    result,
    runs,
    select,
    split_extra,
)
from tailtune.scripts._table import FORMATS, Result, Row  # noqa: E402


def grid_rows(grid: Grid, seeds: Sequence[int], extra: Sequence[str] = ()) -> list[Row]:
    """The rows of a grid, run or not."""
    rows = []
    for cell in grid.cells:
        wanted = runs(cell, seeds, extra)
        found = (result(cell.command(seed, extra)) for seed in wanted)
        results = [_read(path) for path in found if path is not None]
        rows.append(Row(cell.words[1], cell.row, len(wanted), results, cell.published))
    return rows


def folder_rows(folders: Sequence[Path]) -> list[Row]:
    """Finished run folders, or `tests/KEY` folders within them, grouped by what they are but for the seed."""
    groups: dict[str, list[tuple[Path, Result]]] = {}
    for folder in folders:
        found = _read(folder / "metrics.json")
        groups.setdefault(_identity(folder, found), []).append((folder, found))
    return [_group_row(group) for group in groups.values()]


def with_result(names: Sequence[str]) -> list[Path]:
    """The folders that hold a result; the others, as `output/*` brings them, are named on standard error.

    Raises:
        UserError: a name that is nothing at all, or no folder with a result.
    """
    for each in names:
        if not Path(each).exists():
            raise UserError(f"{each} is no folder; name run folders")
    kept = [Path(each) for each in names if (Path(each) / "metrics.json").is_file()]
    left = [each for each in names if Path(each) not in kept]
    if not kept:
        raise UserError(f"{left[0]} holds no metrics.json; name the folder of a finished run")
    if left:
        print(f"left out, for they hold no metrics.json: {', '.join(left)}", file=sys.stderr)
    return kept


def _identity(folder: Path, found: Result) -> str:
    """All options of a run and of its evaluation, without the seed and without which checkpoint it was."""
    from tailtune.configs import load_resolved, values_of
    from tailtune.configs.key import TRAIN
    from tailtune.trainers.methods import declared

    home = folder if (folder / "config.yaml").is_file() else folder.parent.parent
    trained = values_of(load_resolved(home / "config.yaml", declared()), TRAIN)
    tested = {key: value for key, value in found.get("evaluation", {}).items() if key not in ("checkpoint", "of")}
    return json.dumps([{**trained, "seed": None}, tested], sort_keys=True)


def _group_row(group: list[tuple[Path, Result]]) -> Row:
    folder, first = group[0]
    home = folder.parent.parent if folder.parent.name == "tests" else folder
    name = folder.relative_to(home.parent).as_posix()
    name = re.sub(r"_seed_\d+", "", name) if len(group) > 1 else name
    return Row(first["data"], name, len(group), [found for _, found in group])


def _read(path: Path) -> Result:
    from tailtune.trainers.runs.report import read_result

    return read_result(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    own, extra = split_extra(argv)
    parser = Parser(
        prog="scripts/collect.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="+", help="a grid, or run folders")
    parser.add_argument("--format", choices=FORMATS, default="md")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="names of metrics.json; default: the grid's own")
    add_selection(parser)
    args = parser.parse_args(own)
    check_metrics(args.metrics or ())
    metrics: Sequence[str]
    if any(Path(each).is_dir() for each in args.what):
        rows, metrics, paper = folder_rows(with_result(args.what)), METRICS, None
    elif len(args.what) == 1:
        args.grid = args.what[0]
        grid, seeds = select(args)
        rows, metrics, paper = grid_rows(grid, seeds, extra), grid.metrics, grid.paper
    else:
        raise UserError(f"{args.what[0]} is no folder; name one grid, or run folders")
    print(FORMATS[args.format](rows, args.metrics or metrics, paper), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
