"""The words of a command that labels images: which model, and what changes its predictions."""

import argparse
from itertools import chain
from typing import Any

from tailtune.configs.errors import UserError
from tailtune.configs.program import Parser


def add_model_arguments(parser: Parser, priors: str) -> None:
    """Add RUN and the flags that say how the model predicts.

    Args:
        parser: gets them.
        priors: which target priors there are, for the help.
    """
    parser.add_argument("run", metavar="RUN", help="a run folder, its name in output/, or a checkpoint of LIFT, RIDE …")
    parser.add_argument("--threshold", metavar="P", type=float, help="below this probability the label is 'unsure'")
    parser.add_argument("--target-prior", metavar="PRIOR", help=f"class frequencies of these images: {priors}")
    parser.add_argument("--tte", action="store_true", help="average several views of each image")
    parser.add_argument(
        "--option",
        metavar=("KEY", "VALUE"),
        nargs=2,
        action="append",
        default=[],
        help="another option of the evaluation, such as gpu 1 or test_batch_size 64",
    )
    parser.add_argument("-d", "--data", metavar="DATA", help="data config, for a checkpoint of another project")
    parser.add_argument("-m", "--model", metavar="MODEL", help="model config, for such a checkpoint")


def model_fields(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `ModelRequest`.

    Args:
        args: the parsed words.

    Raises:
        UserError: the threshold is no probability.
    """
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        raise UserError(f"--threshold must be a probability from 0 to 1, not {args.threshold:g}")
    flags = (("target_prior", args.target_prior), ("tte", args.tte or None))
    return {
        "run": args.run,
        "data": args.data,
        "model": args.model,
        "options": [*chain.from_iterable(args.option), *(w for k, v in flags if v is not None for w in (k, str(v)))],
        "threshold": args.threshold,
    }
