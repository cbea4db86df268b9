"""Measures what a first session on a GPU should know, in minutes, and writes a JSON file and a Markdown table.

    python benchmarks/gpu.py --lift DIR --sade DIR --ride DIR                 8 minutes of one data-centre GPU
    python benchmarks/gpu.py --minutes 20 --only memory                       the memory of every shipped config
    python benchmarks/gpu.py --device cpu --size toy                          every row in small, to see that it works

Rows are measured in the order of their value, and both files are written again after each of them, so nothing is lost
if the session ends early. Rows that do not fit the time stay "not run". Steps of ours and of an original are measured
in turn, each in a process of its own, with random weights, synthetic images and without a data loader. MFU is the
number of floating-point operations in a second, divided by what the data sheet of the GPU promises for dense products.
"waits" are the places in our step at which Python waits for the GPU. On a GPU, the exit code is 1 if a target is
missed: twice the speed of LIFT's AMP step, an MFU of 50 %, at most 6 GiB at batch 128, at most 20 GB for every shipped
config, and tests that pass.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.benchmarks import compare
from tailtune.benchmarks.gpu_checks import MemoryRows, TestsRow, row_of
from tailtune.benchmarks.gpu_report import Report
from tailtune.benchmarks.gpu_steps import Bench, StepRow
from tailtune.benchmarks.shipped import PAIRS
from tailtune.configs.errors import UserError
from tailtune.configs.machine import available_processors
from tailtune.main import Parser, exit_code_of
from tailtune.trainers.distributed import uses_cuda
from tailtune.trainers.runs.metrics_file import circumstances

ORIGINALS = ("lift", "sade", "ride")
VIT, SADE, RIDE = (
    next(row for row in compare.ROWS if row.name == name)
    for name in ("AdaptFormer", "SADE ResNet-32", "RIDE ResNeXt-50")
)
TARGETS = {"ratio": 2.0, "mfu": 0.5, "GiB": 6.0}
COMPILED = ("compile", "True")
FIRST = (
    StepRow("ViT-B/16 bf16", VIT, "bf16", "amp", targets=TARGETS),
    StepRow("ViT-B/16 amp", VIT, "amp", "amp", targets=TARGETS),
)
STEPS = (
    StepRow("ViT-B/16 fp32", VIT, "fp32"),
    StepRow("ViT-B/16 bf16, 32 at once", VIT, "bf16", pairs=("micro_batch_size", "32")),
    StepRow("ViT-B/16 bf16, compiled", VIT, "bf16", pairs=COMPILED, flops_of="ViT-B/16 bf16", needs=60),
    StepRow("SADE ResNet-32 ×3 fp32", SADE, "fp32", "fp32"),
    StepRow("SADE ResNet-32 ×3 bf16", SADE, "bf16", "bf16"),
    StepRow("RIDE ResNeXt-50 ×3 fp32", RIDE, "fp32", "fp32"),
    StepRow("RIDE ResNeXt-50 ×3 bf16", RIDE, "bf16", "bf16"),
    StepRow("ViT-B/16 amp, compiled", VIT, "amp", pairs=COMPILED, flops_of="ViT-B/16 amp", needs=60),
    StepRow("ViT-B/16 fp32, compiled", VIT, "fp32", pairs=COMPILED, flops_of="ViT-B/16 fp32", needs=60),
)
Row = StepRow | TestsRow | MemoryRows


def rows(toy: bool, stem: Path, only: str) -> list[Row]:
    """The rows to measure, the most valuable ones first.

    Args:
        toy: whether they are small enough for a CPU.
        stem: beginning of the names of the logs.
        only: a text that their names have.
    """
    workers = ("-n", str(min(8, available_processors())), "--dist", "loadfile", "--no-loadscope-reorder")
    words = ("tests/test_losses.py",) if toy else workers
    core = TestsRow("one trajectory", ("tests/test_core.py",), stem.with_suffix(".core.log"), 600 if toy else 120)
    tests = TestsRow("default tests", words, stem.with_suffix(".tests.log"), 600 if toy else 150)
    configs = [f"{data} {model}" for data, model in PAIRS]
    if toy:
        configs = [f"digits_lt {words}" for words in ("tiny_clip_peft batch_size 4", "tiny_clip_h2t", "zstiny_clip")]
    memory = MemoryRows([words for words in configs if only in row_of(words)])
    return [row for row in (*FIRST, core, *STEPS, tests, memory) if any(only in name for name in row.names)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 1 if a target is missed on a GPU, 2 for wrong input.
    """
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not uses_cuda():
        raise UserError("there is no CUDA GPU; --device cpu --size toy runs every row in small")
    places = {name: getattr(args, name) for name in ORIGINALS}
    for name, place in places.items():
        if place is not None and not place.is_dir():
            raise UserError(f"--{name} {place} is no folder; run git clone {compare.SOURCES[name]} {place} first")
    toy = args.size == "toy"
    bench = Bench(
        torch.cuda.get_device_name() if uses_cuda() else "", toy, places, time.monotonic() + 60 * args.minutes
    )
    chosen = rows(toy, args.json, args.only)
    names = [name for row in chosen for name in row.names]
    report = Report(args.json, {"command": " ".join(argv), **circumstances(), "torch": torch.__version__}, names)
    for row in chosen:
        if bench.left() < row.needs:
            continue
        try:
            for name, facts in row.measure(bench):
                report.add(name, facts)
        except UserError as error:
            report.add(row.names[0], bench.ended(error))
    print(f"wrote {args.json} and {report.page}")
    return int(bool(bench.device) and report.misses())


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python benchmarks/gpu.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ORIGINALS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"a checkout of {compare.SOURCES[name]}")
    parser.add_argument("--minutes", type=float, default=8, metavar="N", help="time of all rows (default: 8)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows whose name has this text")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where the rows run (default: cuda)")
    parser.add_argument(
        "--size", default="full", choices=("full", "toy"), help="toy: small enough for a CPU (default: full)"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("output/gpu.json"),
        metavar="FILE",
        help="file of the results; the table has the same name with .md (default: output/gpu.json)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
