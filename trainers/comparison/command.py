"""`compare` on the command line: a table of finished runs, and tests over the test images that they share."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tailtune.configs.errors import UserError
from tailtune.configs.program import Parser, print_text, program
from tailtune.configs.schema import Schema
from tailtune.trainers.comparison.finished_runs import folder_rows, with_result
from tailtune.trainers.comparison.formats import FORMATS, format_of, format_of_console, write_table
from tailtune.trainers.comparison.rows import METRICS, Row, check_metrics, ranked
from tailtune.trainers.comparison.tables import Table

DESCRIPTION = """Compare finished runs.

Runs that differ in nothing but their seed are one row, with mean ± standard deviation (n − 1). Each row is compared
with the first one over the test images, from the stored logits: bootstrap confidence intervals, McNemar's test, and
wins and losses by class. Folders without a result are left out, and a line says so."""
LoadSchema = Callable[[], Schema]


def run_compare(argv: Sequence[str], load_schema: LoadSchema) -> int:
    """Run the command `compare`.

    Args:
        argv: the words that follow `compare`.
        load_schema: gives the schema of all options.

    Returns:
        The exit code 0.

    Raises:
        UserError: wrong input.
    """
    parser = Parser(
        prog=f"{program()} compare",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, or a folder tests/KEY in one")
    add_arguments(parser)
    args = parser.parse_args(list(argv))
    compare(args.runs, args, load_schema)
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose rows, columns and output of a table."""
    form = "of the table; default: that of --output, text on a terminal, or md"
    parser.add_argument("--format", choices=FORMATS, help=form)
    parser.add_argument("--output", "-o", metavar="FILE", type=Path, help="write to this file, and print nothing")
    metrics = "names of numbers in metrics.json, such as few_acc or backward50.accuracy"
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=metrics)
    parser.add_argument("--sort", metavar="NAME", help="sort the rows by this metric, the best first")
    best = "only the N best rows (1 without N) by the metric of --sort, or by accuracy"
    parser.add_argument("--best", metavar="N", nargs="?", const=1, type=int, help=best)
    tests = "only the table: no tests over test images, for which the stored logits are read"
    parser.add_argument("--no-tests", dest="tests", action="store_false", help=tests)


def compare(names: Sequence[str], args: argparse.Namespace, load_schema: LoadSchema) -> None:
    """Make and show the table of some run folders.

    Args:
        names: paths of folders.
        args: what `add_arguments` has parsed.
        load_schema: gives the schema of all options.

    Raises:
        UserError: a path does not exist, no folder has a result, or a result is damaged.
    """
    check_arguments(args)
    folders, left_out = with_result(names)
    rows, copies = folder_rows(folders, load_schema())
    for line in filter(None, (left_out, copies)):
        print(line, file=sys.stderr)
    show(Table(rows, args.metrics or METRICS), args, args.tests)


def check_arguments(args: argparse.Namespace) -> None:
    """Check what can be checked before runs are read.

    Raises:
        UserError: a metric, a number or an ending is wrong.
    """
    check_metrics([*(args.metrics or ()), *([args.sort] if args.sort else ())])
    if args.best is not None and args.best < 1:
        raise UserError(f"--best {args.best}: give a number from 1 on")
    if args.output and not args.format:
        format_of(args.output)


def show(table: Table, args: argparse.Namespace, tests: bool = False) -> None:
    """Sort a table, test its rows, and print it or write it to a file.

    Args:
        table: the table, without tests.
        args: what `add_arguments` has parsed.
        tests: whether to compare the rows over their test images.

    Raises:
        UserError: no row has the metric to sort by, or the file system refuses to write.
    """
    rows = list(table.rows)
    if args.sort or args.best:
        metric = args.sort or "accuracy"
        _check_measured(metric, rows)
        rows = ranked(rows, metric)[: args.best]
    table = replace(table, rows=rows)
    if tests and len(rows) > 1:
        from tailtune.trainers.comparison.answers import compare_with_first, names_of_classes  # imports torch

        paired = compare_with_first(rows)
        alike = [rows[0], *(row for row, found in zip(rows[1:], paired, strict=True) if not found.reason)]
        names = next(filter(None, map(names_of_classes, alike)), None)  # a zero-shot run has stored none
        table = replace(table, paired=paired, class_names=names)
    kind = args.format or (format_of(args.output) if args.output else format_of_console())
    if args.output:
        write_table(table, args.output, kind)
    else:
        print_text(FORMATS[kind](table).removesuffix("\n"))


def _check_measured(metric: str, rows: Sequence[Row]) -> None:
    """Raise a `UserError` if rows are to be sorted by what no finished run has measured, such as a misspelt name."""
    results = [result for row in rows for result in row.results]
    if not results or any(row.values(metric) for row in rows):
        return
    known = dict.fromkeys(name for result in results for name in result.get("distributions", {}))
    hint = f"; the test distributions are {', '.join(known)}" if known and "." in metric else ""
    raise UserError(f"--sort {metric}: no row has this metric{hint}")
