"""Compares our code with the originals' own code, on a CPU: the same weights, inputs and options on both sides.

    git clone https://github.com/shijxcs/LIFT /somewhere/LIFT
    python parity/compare.py lift /somewhere/LIFT
    python parity/compare.py lift /somewhere/LIFT --only adaptformer        some cases; nothing is written
    python parity/compare.py experts RIDE SADE BATCHFORMER --files /scratch/experts

Each original runs in a process of its own and leaves its tensors in files. Prints a table of errors and writes the
subject's part of docs/parity.json. Exits with 1 if an error is above the tolerance.
"""

import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # the path has this file's folder; the one above holds tailtune.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tailtune.configs.errors import UserError
from tailtune.main import Parser, exit_code_of
from tailtune.parity.balpoe.subject import BALPOE
from tailtune.parity.dirmixe.subject import DIRMIXE
from tailtune.parity.experts.subject import EXPERTS
from tailtune.parity.focal_sam.subject import FOCAL_SAM
from tailtune.parity.h2t.subject import H2T
from tailtune.parity.lift.subject import LIFT
from tailtune.parity.lift_plus.subject import LIFT_PLUS
from tailtune.parity.report import TOP, about_our_side, commit_of, write
from tailtune.parity.subject import Row, Subject, compare
from tailtune.parity.text.subject import TEXT

SUBJECTS: Mapping[str, Subject] = {
    subject.name: subject for subject in (LIFT, EXPERTS, DIRMIXE, H2T, FOCAL_SAM, BALPOE, LIFT_PLUS, TEXT)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: its words; None for those of the process.

    Returns:
        The exit code: 1 if an error is above the tolerance, 2 for bad input.
    """
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    subject = SUBJECTS[args.subject]
    checkouts = {name: _checkout(getattr(args, name), url) for name, url in subject.sources.items()}
    commits = [] if args.only else args.commits or [commit_of(path) for path in checkouts.values()]
    print(subject.header())
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for row in compare(subject, checkouts, (args.files or Path(scratch)).absolute(), args.only):
            rows.append(row)
            print(subject.line(row), flush=True)
    high = sum(map(subject.above, rows))
    print(f"\n{len(rows)} rows, {high} above the tolerance of {subject.tolerance}")
    if not args.only:
        write(report(subject, commits, rows), subject.name)
    return int(high > 0)


def report(subject: Subject, commits: Sequence[str], rows: Sequence[Row]) -> dict[str, Any]:
    """A subject's part of docs/parity.json.

    Args:
        subject: what was compared.
        commits: of its checkouts, in the order of `subject.sources`.
        rows: all of its rows.
    """
    repositories = {
        name: {"repository": url, "commit": commit}
        for (name, url), commit in zip(subject.sources.items(), commits, strict=True)
    }
    sources = {"original": repositories[TOP]} if subject.name == TOP else {"originals": repositories}
    about = {**sources, **about_our_side(), "tolerance": subject.tolerance, "procedure": subject.procedure}
    return about | ({"patches": subject.patches} if subject.patches else {}) | {"cases": rows}


def _checkout(path: Path, url: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{path} is no folder; run git clone {url} {path} first")
    return path.absolute()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python parity/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(dest="subject", metavar="SUBJECT", required=True)
    for subject in SUBJECTS.values():
        clones = "\n".join(f"    git clone {url}" for url in subject.sources.values())
        command = subparsers.add_parser(
            subject.name,
            help=subject.about,
            description=f"{subject.about}\n\n{clones}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for name, url in subject.sources.items():
            command.add_argument(name, type=Path, metavar=name.upper(), help=f"a checkout of {url}")
        text = "only the cases with this text in their kind, name, network or data; nothing is written then"
        command.add_argument("--only", default="", metavar="TEXT", help=text)
        text = "folder for the originals' tensors; what is there is not computed again (default: a temporary folder)"
        command.add_argument("--files", type=Path, metavar="DIR", help=text)
        text = "commits of the checkouts, where they are no git repositories"
        command.add_argument("--commits", nargs=len(subject.sources), metavar="SHA", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
