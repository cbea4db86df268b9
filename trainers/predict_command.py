"""`predict …` on the command line. Wrong words and paths are refused before torch is imported."""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from tailtune.configs import Schema
from tailtune.configs.errors import UserError
from tailtune.configs.program import Parser, program
from tailtune.datasets.sources.given_paths import given_paths
from tailtune.trainers.prediction.arguments import add_model_arguments, model_fields
from tailtune.trainers.prediction.request import PredictRequest, check_outputs
from tailtune.trainers.prediction.tables import TABLES
from tailtune.trainers.processes.console_log import console_restored, start_console
from tailtune.trainers.processes.slow_start import loading_shown
from tailtune.trainers.runs.run_folder import find_checkpoint

EPILOG = """
SOURCE is an image; a folder, which is searched with its subfolders; a quoted pattern such as 'photos/**/*.jpg'; a .txt
file with a path in each line; or - for paths on standard input.

examples:
  {program} predict birds_run photos > labels.csv
  {program} predict birds_run photos --threshold 0.8 --copy-into sorted
  {program} predict birds_run photos --target-prior estimate --out labels.jsonl
  find /data -name '*.jpg' | {program} predict birds_run - --out labels.csv

exit codes: 0 every image was read, 1 some images could not be read, 2 wrong input"""


def run_predict(argv: Sequence[str], load_schema: Callable[[], Schema]) -> int:
    """Label images with the model of a finished run. Standard output has the table only; everything else is on stderr.

    Args:
        argv: the words that follow `predict`.
        load_schema: gives the schema of all options.

    Returns:
        The exit code: 0, or 1 if images could not be read.

    Raises:
        UserError: wrong input.
    """
    args = _parser().parse_intermixed_args(list(argv))
    stdout = io.BytesIO() if sys.stdout is None else sys.stdout.buffer
    if args.out is None and sys.stdout is None:
        raise UserError("there is no standard output for the table: name a file with --out")
    with redirect_stdout(sys.stderr), console_restored():
        start_console(main=True)
        request = _request(args)
        with loading_shown():
            from tailtune.trainers.predict import predict_images
        try:
            return int(predict_images(request, load_schema(), stdout) > 0)
        except BrokenPipeError:
            if request.embeddings is not None or request.copy_into is not None:
                raise UserError("standard output was closed before the end, so nothing was written") from None
            return 0  # as in `… | head`


def _request(args: argparse.Namespace) -> PredictRequest:
    find_checkpoint(args.run, "predict:")
    suffix = "" if args.out is None else args.out.suffix.lower().removeprefix(".")
    request = PredictRequest(
        **model_fields(args),
        kind=args.format or (suffix if suffix in TABLES else "csv"),
        out=args.out,
        embeddings=args.embeddings,
        copy_into=args.copy_into,
    )
    check_outputs(request)
    return replace(request, paths=given_paths(args.sources, args.copy_into))


def _parser() -> Parser:
    parser = Parser(
        prog=f"{program()} predict",
        description="Label images with the model of a finished run.",
        epilog=EPILOG.format(program=program()),
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser, "uniform, train, a JSON file by class name, or estimate (from them)")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="images: files, folders, patterns, lists, or -")
    parser.add_argument("--out", metavar="FILE", type=Path, help="write the table to a file, not to standard output")
    parser.add_argument("--format", choices=tuple(TABLES), help="default: by the ending of --out, otherwise csv")
    parser.add_argument("--embeddings", metavar="FILE", type=Path, help="write the features of the images")
    parser.add_argument("--copy-into", metavar="DIR", type=Path, help="copy the images into a folder for each label")
    return parser
