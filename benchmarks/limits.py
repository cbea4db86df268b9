"""Compares the time of our training steps with their floor: their products alone, interleaved, without any original.

    python benchmarks/limits.py
    python benchmarks/limits.py --only "AdaptFormer bf16" --rounds 9

The products of a step are its matrix products, convolutions and fused attention, with its own tensors
(benchmarks/steps/products.py). Whatever else a step does comes on top, so their time is a limit that no change of the
rest can go below. Steps and times are those of benchmarks/compare.py, whose rows these are. The exit code is 1 if a
share is below its target.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.benchmarks.compare import OUR_SIDES, ROWS, add_measurement, batch_of, interleaved
from tailtune.main import Parser, exit_code_of
from tailtune.trainers.runs.metrics_file import hardware


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 1 if a target is missed, 2 for wrong input.
    """
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    print(f"{hardware()}, torch {torch.__version__}; {args.rounds} rounds, {args.threads} threads; times of an image")
    print(f"{'step':<24}{'prec':<6}{'ours':>10}{'floor':>10}{'share':>8}{'target':>8}")
    missed = False
    for row in ROWS:
        for prec, (_, target) in row.targets.items():
            if args.only not in f"{row.name} {prec}":
                continue
            batch = batch_of(row)
            times = interleaved(OUR_SIDES, row.told(prec, batch), args.rounds, args.threads)
            step, floor = (1e3 / batch * statistics.median(times[side]) for side in ("ours", "floor"))
            wanted = f"{target:.2f}" if target else ""
            print(f"{row.name:<24}{prec:<6}{step:>7.1f} ms{floor:>7.1f} ms{floor / step:>8.2f}{wanted:>8}", flush=True)
            missed |= target is not None and floor / step < target
    return int(missed)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python benchmarks/limits.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_measurement(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
