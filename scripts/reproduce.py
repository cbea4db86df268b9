"""Runs the grid of a table or figure and writes the table: published numbers beside ours, mean ± std over seeds.

    python scripts/reproduce.py --list
    python scripts/reproduce.py lift/tab6_peft_methods --print
    python scripts/reproduce.py lift/tab6_peft_methods --seeds 0 1 2 --where data places_lt -- root /data/places
    python scripts/reproduce.py my_grid.yaml

Every run is an ordinary one of main.py, below output/: what is finished is not repeated, what was interrupted
continues. Ctrl-C stops the grid with its state saved, and the same command continues. A command that only tests has
the one that trains run before it. Ends with output/tables/TABLE.md, .csv and .tex, and the first on the screen.
"""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tailtune import main as tailtune  # noqa: E402
from tailtune.configs.errors import UserError  # noqa: E402
from tailtune.scripts._grid import Grid, add_selection, names, read, result, runs, select, split_extra  # noqa: E402
from tailtune.scripts._table import FORMATS  # noqa: E402
from tailtune.scripts.collect import grid_rows  # noqa: E402
from tailtune.trainers.processes.exit import end_at_signals, run_as_process  # noqa: E402

CONTINUES = "interrupted; the same command continues"
TABLES = Path("output/tables")
ENDINGS = {"md": "md", "csv": "csv", "latex": "tex"}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: of the first run that fails, 130 when interrupted."""
    return tailtune.exit_code_of(_command, argv, interrupted=CONTINUES)


def _command(argv: Sequence[str]) -> int:
    own, extra = split_extra(argv)
    args = _parser().parse_args(own)
    if args.list:
        print("\n".join(f"{name:<28}  {len(read(name).cells):>4} commands  {read(name).title}" for name in names()))
        return 0
    if args.grid is None:
        raise UserError("name a grid; --list shows them")
    grid, seeds = select(args)
    todo = plan(grid, seeds, extra)
    if args.print:
        done = ["" if result(words) is None else "  # finished" for words in todo]
        print("\n".join(f"python main.py {shlex.join(words)}{mark}" for words, mark in zip(todo, done, strict=True)))
        return 0
    code = run_all(todo, args.keep_going)
    if first_process() and (code == 0 or (args.keep_going and code != 130)):
        write(grid, seeds, extra)
    return code


def plan(grid: Grid, seeds: Sequence[int], extra: Sequence[str] = ()) -> list[list[str]]:
    """All command lines, each once."""

    def every() -> Iterator[list[str]]:
        for cell in grid.cells:
            for seed in runs(cell, seeds, extra):
                yield from cell.commands(seed, extra)

    return [list(words) for words in dict.fromkeys(map(tuple, every()))]


def run_all(todo: Sequence[Sequence[str]], keep_going: bool = False) -> int:
    """The exit code of the first run that failed; a finished run shows its result and costs nothing."""
    worst = 0
    for number, words in enumerate(todo, 1):
        if first_process():
            print(f"[{number}/{len(todo)}] python main.py", shlex.join(words), flush=True)
        try:
            code = tailtune.main(list(words))
        except Exception:  # one run out of memory must not end a night's work
            if not keep_going:
                raise
            traceback.print_exc()
            code = 1
        if code == 130 or (code and not keep_going):
            return code
        worst = worst or code
    return worst


def write(grid: Grid, seeds: Sequence[int], extra: Sequence[str]) -> None:
    """The table in every format; Markdown on the screen too."""
    rows = grid_rows(grid, seeds, extra)
    for kind, render in FORMATS.items():
        path = TABLES / f"{grid.name}.{ENDINGS[kind]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(rows, grid.metrics, grid.paper), encoding="utf-8")
    print(f"\n{grid.title}\n\n{FORMATS['md'](rows, grid.metrics, grid.paper)}\nalso in {TABLES}/{grid.name}.*")


def first_process() -> bool:
    """Whether this is the process of a launch that speaks."""
    return os.environ.get("RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = tailtune.Parser(
        prog="scripts/reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python scripts/reproduce.py GRID [options] [-- KEY VALUE …]",
        epilog="what stands behind -- is added to every command",
    )
    parser.add_argument("grid", nargs="?", help="name of a grid, see --list, or a YAML of your own")
    parser.add_argument("--list", action="store_true", help="show all grids, a line each")
    parser.add_argument("--print", action="store_true", help="show the commands and which are finished; run nothing")
    parser.add_argument("--keep-going", action="store_true", help="go on to the next run when one fails")
    add_selection(parser)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes fork after the tokenizer ran
    end_at_signals(CONTINUES)
    run_as_process(main, tailtune.exit_code_and_line)
