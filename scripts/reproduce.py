"""Runs all commands of a table or figure of a paper and writes the table: published numbers beside ours.

    python scripts/reproduce.py --list
    python scripts/reproduce.py lift/tab6_peft_methods --print
    python scripts/reproduce.py lift/tab6_peft_methods --seeds 0 1 2 --where data places_lt -- root /data/places
    python scripts/reproduce.py my_grid.yaml
    python scripts/reproduce.py digits_lt --launcher local --jobs 2
    python scripts/reproduce.py lift/tab6_peft_methods --launcher slurm --slurm partition=gpu gpus-per-node=1 time=240
    python scripts/reproduce.py lift/tab6_peft_methods --status

A grid is a file in scripts/grids/ or a YAML of your own. Every run is a run of main.py, in a folder of output/. A
finished run is not repeated, and an interrupted one continues. Ctrl-C saves the state and stops the grid; the same
command continues it. Before a command that only tests, the command that trains is run. At the end the table (mean ±
standard deviation over the seeds) is written into output/tables/ as GRID.md, .csv, .tex and .html, and printed.

Without --launcher the runs follow one another in this process. `local` starts processes, N at once, and divides the
processors among them. `slurm` submits one array of jobs and ends; when all of them are finished, the same command
writes the table. Neither starts a run that is finished, or that another launch is working on.
"""

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune import main as tailtune
from tailtune.configs.errors import UserError
from tailtune.configs.launch_environment import world_size
from tailtune.scripts._grid import Grid, add_selection, names, read, result, runs, select, split_extra
from tailtune.scripts._launch_local import run_local, slots
from tailtune.scripts._launch_slurm import submit
from tailtune.scripts._launches import Launch, table
from tailtune.scripts.collect import grid_table
from tailtune.trainers.comparison.formats import ENDINGS, FORMATS, format_of_console, write_table
from tailtune.trainers.processes.exit import end_at_signals, run_as_process

CONTINUES = "interrupted; the same command continues"
TABLES = Path("output/tables")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments; None: those of this process.

    Returns:
        The exit code: that of the first failed run, 130 for an interruption, 2 for wrong input, otherwise 0.
    """
    return tailtune.exit_code_of(_command, argv, interrupted=CONTINUES)


def _command(argv: Sequence[str]) -> int:
    words, extra = split_extra(argv)
    args = _parser().parse_args(words)
    if args.list:
        tailtune.print_text("\n".join(_summary(read(name)) for name in names()))
        return 0
    if args.grid is None:
        raise UserError("name a grid; --list shows them")
    grid, seeds = select(args)
    todo = plan(grid, seeds, extra)
    if args.print:
        tailtune.print_text("\n".join(f"python main.py {shlex.join(words)}{_mark(words)}" for words in todo))
        return 0
    if args.status:
        tailtune.print_text(table([Launch(tuple(words)) for words in todo]))
        return 0
    check_launcher(args)
    if args.launcher == "slurm" and submitted(grid.name, todo, args):
        return 0
    if args.launcher == "local":
        code = run_local([Launch(tuple(words)) for words in todo], slots(args.jobs, args.gpus), args.keep_going)
    else:
        code = 0 if args.launcher else run_all(todo, args.keep_going)
    if first_process() and (code == 0 or (args.keep_going and code != 130)):
        write(grid, seeds, extra)
    return code


def _summary(grid: Grid) -> str:
    """The line about a grid in the output of --list."""
    return f"{grid.name:<28}  {len(grid.cells):>4} commands  {grid.title}"


def _mark(words: Sequence[str]) -> str:
    """The mark that --print puts after a finished command; empty for other commands."""
    return "" if result(words) is None else "  # finished"


def plan(grid: Grid, seeds: Sequence[int], extra: Sequence[str] = ()) -> list[list[str]]:
    """All commands of a grid, without repetitions.

    Args:
        grid: the rows of a table.
        seeds: seeds with which each command is run.
        extra: `KEY VALUE` words that are added to every command.

    Returns:
        The words of each command after `python main.py`.
    """

    def with_repetitions() -> Iterator[list[str]]:
        for cell in grid.cells:
            for seed in runs(cell, seeds, extra):
                yield from cell.commands(seed, extra)

    return [list(words) for words in dict.fromkeys(map(tuple, with_repetitions()))]


def run_all(todo: Sequence[Sequence[str]], keep_going: bool = False) -> int:
    """Run commands one after another. A finished command only shows its result.

    Args:
        todo: the words of each command.
        keep_going: whether to continue with the next command after a failure.

    Returns:
        The exit code of the first run that failed, 0 if none did.
    """
    first_failure = 0
    for number, words in enumerate(todo, 1):
        if first_process():
            print(f"[{number}/{len(todo)}] python main.py", shlex.join(words), flush=True)
        try:
            code = tailtune.main(list(words))
        except Exception:  # one failed run, for example without memory, must not end all others
            if not keep_going:
                raise
            traceback.print_exc()
            code = 1
        if code == 130 or (code and not keep_going):
            return code
        first_failure = first_failure or code
    return first_failure


def check_launcher(args: argparse.Namespace) -> None:
    """Fill in the defaults of the options of launchers, and refuse what does not fit.

    Raises:
        UserError: an option of another launcher, or a launch of several processes.
    """
    if args.launcher is None and (args.jobs or args.gpus):
        args.launcher = "local"
    if args.slurm and args.launcher != "slurm":
        raise UserError("--slurm has the options of sbatch; add --launcher slurm")
    if args.gpus and args.launcher != "local":
        raise UserError("--gpus is for --launcher local; with SLURM, ask for GPUs by --slurm gpus-per-node=1")
    if args.launcher and world_size() > 1:
        raise UserError(f"--launcher {args.launcher} starts processes itself; leave out accelerate launch or torchrun")
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: the number of runs at once must be at least 1")
    if args.launcher == "local":
        args.jobs = args.jobs or len(args.gpus) or 1


def submitted(name: str, todo: Sequence[Sequence[str]], args: argparse.Namespace) -> bool:
    """Submit a grid to SLURM, and say what to do next.

    Returns:
        False if every command is finished, so that the table can be written.
    """
    wrong = [word for word in args.slurm if "=" not in word or word.startswith("-")]
    if wrong:
        raise UserError(f"--slurm {wrong[0]}: write KEY=VALUE, such as partition=gpu")
    options = dict(word.split("=", 1) for word in args.slurm)
    launches = [Launch(tuple(words)) for words in todo]
    job = submit(launches, name, args.jobs, options)
    if job is not None:
        print(f"submitted as job {job}")
    elif all(result(launch.words) is not None for launch in launches):
        return False
    print(f"{table(launches)}\n\n--status shows this again; when all is finished, the same command writes the results")
    return True


def write(grid: Grid, seeds: Sequence[int], extra: Sequence[str]) -> None:
    """Write the table in every format, and print it as for the console."""
    table = grid_table(grid, seeds, extra)
    for kind, ending in ENDINGS.items():
        write_table(table, TABLES / f"{grid.name}{ending}", kind)
    print(f"\n{grid.title}\n\n{FORMATS[format_of_console()](table)}\nalso in {TABLES}/{grid.name}.*")


def first_process() -> bool:
    """Whether this is the only process, or the first process of a launch, which prints."""
    return os.environ.get("RANK", "0") == "0"


def _parser() -> argparse.ArgumentParser:
    parser = tailtune.Parser(
        prog="python scripts/reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python scripts/reproduce.py GRID [options] [-- KEY VALUE …]",
        epilog="what stands behind -- is added to every command",
    )
    parser.add_argument("grid", nargs="?", help="name of a grid, see --list, or a YAML of your own")
    parser.add_argument("--list", action="store_true", help="show all grids, one a line")
    parser.add_argument("--print", action="store_true", help="show the commands and which are finished; run nothing")
    parser.add_argument("--keep-going", action="store_true", help="go on to the next run when one fails")
    parser.add_argument("--status", action="store_true", help="show how far each run is; run nothing")
    launchers = parser.add_argument_group("several runs at once")
    launchers.add_argument("--launcher", choices=("local", "slurm"), help="processes on this machine, or jobs of SLURM")
    launchers.add_argument(
        "--jobs", type=int, metavar="N", help="runs at once; default: 1 locally, no limit with SLURM"
    )
    gpus = "local: numbers of GPUs that the runs get in turn; left out: every run sees all of them"
    launchers.add_argument("--gpus", nargs="+", default=[], metavar="GPU", help=gpus)
    sbatch = "slurm: options of sbatch without --, such as partition=gpu gpus-per-node=1 cpus-per-task=8 time=240"
    launchers.add_argument("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help=sbatch)
    add_selection(parser)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked after the tokenizer has run
    end_at_signals(CONTINUES)
    run_as_process(main, tailtune.exit_code_and_line)
