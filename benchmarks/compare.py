"""Compares time and memory of a training step with those of the original codes, each in a process of its own.

    git clone https://github.com/shijxcs/LIFT /somewhere/LIFT
    python benchmarks/compare.py --lift /somewhere/LIFT
    python benchmarks/compare.py --lift DIR --sade DIR --ride DIR --dirmixe DIR --h2t DIR --only bf16

Both sides run their own training loop, with the same size of network and batch, random weights and random images, and
without a data loader. One step of each in turn is measured: its processor time on a CPU (other processes do not change
it), its wall time on a GPU. Rows whose checkout is not given are skipped. The floor is the time of the matrix products,
convolutions and fused attention of our step alone (benchmarks/limits.py), measured in the same turns.

Memory is the peak of two steps of 16 images above what the process had before them: resident memory on a CPU (Linux),
allocated memory on a GPU. On a CPU our training keeps freed memory; "frees" is ours without that. The exit code is 1 if
a target is missed.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.benchmarks.steps.device import device
from tailtune.benchmarks.steps.side import ROOT, Side
from tailtune.configs import load_configs
from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.main import Parser, exit_code_of
from tailtune.models import resolve
from tailtune.trainers.option_schema import declared
from tailtune.trainers.runs.metrics_file import hardware

SOURCES = {
    "lift": "https://github.com/shijxcs/LIFT",
    "sade": "https://github.com/Vanint/SADE-AgnosticLT",
    "ride": "https://github.com/frank-xwang/RIDE-LongTailRecognition",
    "dirmixe": "https://github.com/scongl/DirMixE",
    "h2t": "https://github.com/Keke921/H2T",
}
Targets = tuple[float | None, float | None]
"""Smallest ratio of the original's time to ours, and smallest share of the floor in our time."""
VIT, RESNET32, RESNEXT50 = ("imagenet_lt", 4), ("cifar100_ir100", 128), ("imagenet_lt", 4)
"""Data config and images of a step on a CPU."""
GPU_BATCH = {VIT: 128, RESNET32: 128, RESNEXT50: 64}


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    original: str
    """Entry of `SOURCES`."""
    settings: dict[str, Any]
    """What the original is told; see `originals.py`."""
    model: str
    pairs: tuple[str, ...] = ()
    """Our model config, and options."""
    size: tuple[str, int] = VIT
    targets: Mapping[str, Any] = field(default_factory=dict)
    """Precision → what must be reached: `Targets` of times, or the largest ratio of our memory to the original's."""

    def told(self, prec: str, batch: int, *more: str) -> dict[str, Any]:
        """What the modules of `steps` are told.

        Args:
            prec: precision.
            batch: images of a step.
            more: more options of ours.
        """
        data, pairs = self.size[0], [*self.pairs, *more]
        cfg = resolve(load_configs(data, self.model, ["pretrained", "none", *pairs], declared())[-1])
        told = {"name": f"{self.name} {prec}", "batch": batch, "prec": prec, "data": data, "model": self.model}
        told |= {"pairs": pairs, "original": self.original, "settings": self.settings, "side": cfg.resolution}
        return told | {"counts": build_info(cfg).class_counts.long().tolist()}


BOTH = {"fp32": (1.3, None), "bf16": (1.6, None)}
OTHERS = {"fp32": (1.2, None), "bf16": (1.2, None)}
SSF = {"ssf_attn": True, "ssf_mlp": True, "ssf_ln": True}
SADE = {"config": "config_cifar100_ir100_sade.json", "change": {}}
RIDE = {
    "config": "config_imagenet_lt_resnext50_ride.json",
    "change": {"arch;args;reduce_dimension": 1, "arch;args;num_experts": 3},
}
DIRMIXE = {"config": "train/cifar100.json", "change": {}}
H2T = {"config": "config/cifar100/cifar100_imb001_stage1_ce_mixup.yaml"}
ADAPTFORMER = {"adaptformer": True}


def _lift(name: str, options: dict[str, Any], targets: Mapping[str, Any], more: tuple[str, ...] = ()) -> Row:
    pairs = tuple(word for key, value in options.items() for word in (key, str(value)))
    return Row(name, "lift", {**options, "loss_type": "LA"}, "clip_vit_b16", (*pairs, *more), VIT, targets)


ROWS = (
    _lift("AdaptFormer", ADAPTFORMER, {"fp32": (1.3, 0.93), "bf16": (1.8, 0.85)}),
    _lift("LoRA", {"lora": True}, BOTH),
    _lift("VPT-deep", {"vpt_deep": True}, OTHERS),
    _lift("SSF", SSF, OTHERS),
    _lift("biases", {"bias_tuning": True}, OTHERS),
    _lift("full fine-tuning", {"full_tuning": True}, OTHERS),
    Row("SADE ResNet-32", "sade", SADE, "resnet32_sade", (), RESNET32, {"fp32": (1.6, None), "bf16": (1.6, None)}),
    Row("RIDE ResNeXt-50", "ride", RIDE, "resnext50_ride", (), RESNEXT50, {"fp32": (1.2, None), "bf16": (1.2, None)}),
    Row("DirMixE ResNet-32", "dirmixe", DIRMIXE, "resnet32_dirmixe", (), RESNET32, {"fp32": (None, None)}),
    Row("H2T stage 1 ResNet-32", "h2t", H2T, "resnet32_mixup", (), RESNET32, {"fp32": (None, None)}),
)
MEMORY_ROWS = (
    _lift("AdaptFormer memory", ADAPTFORMER, {"fp32": 0.5, "bf16": 0.4}),
    _lift("same, grad_checkpoint", ADAPTFORMER, {"fp32": None, "bf16": None}, ("grad_checkpoint", "True")),
)
MEMORY_BATCH, MB = 16, 10**6


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Returns:
        The exit code: 1 if a target is missed, 2 for wrong input.
    """
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    places = {name: getattr(args, name) for name in SOURCES}
    for name, place in places.items():
        if place is not None and not place.is_dir():
            raise UserError(f"--{name} {place} is no folder; run git clone {SOURCES[name]} {place} first")
    print(f"{hardware()}, torch {torch.__version__}; {args.rounds} rounds, {args.threads} threads; times of an image")
    print(
        f"{'step':<24}{'prec':<6}{'original':>10}{'ours':>11}{'ratio':>7}{'minima':>8}{'target':>8}{'floor':>7}{'target':>8}"
    )
    missed = False
    for row, prec, targets, place in _chosen(ROWS, args.only, places):
        missed |= compared(row, prec, targets, place, args.rounds, args.threads)
    print(
        f"{'memory above the model':<24}{'prec':<6}{'original':>10}{'ours':>9}{'ratio':>7}{'target':>8}"
        f"{'frees':>9}{'ratio':>7}"
    )
    for row, prec, target, place in _chosen(MEMORY_ROWS, args.only, places):
        missed |= compared_memory(row, prec, target, place, args.threads)
    return int(missed)


def _chosen(rows: Sequence[Row], only: str, places: Mapping[str, Path | None]) -> Iterator[tuple[Row, str, Any, Path]]:
    """Each row and precision whose text contains `only`, with its targets and checkout; says which have none."""
    for row in rows:
        for prec, targets in row.targets.items():
            place = places[row.original]
            if only in f"{row.name} {prec}" and place is None:
                print(f"{row.name:<24}{prec:<6}skipped: no --{row.original}")
            elif only in f"{row.name} {prec}" and place is not None:
                yield row, prec, targets, place.absolute()


def batch_of(row: Row) -> int:
    """Images of a step whose time is measured."""
    return GPU_BATCH[row.size] if device().type == "cuda" else row.size[1]


def compared(row: Row, prec: str, targets: Targets, place: Path, rounds: int, threads: int) -> bool:
    """Measure a row and print it.

    Returns:
        Whether a target is missed.
    """
    batch = batch_of(row)
    sides = {"original": ("originals", place), **OUR_SIDES}
    times = interleaved(sides, row.told(prec, batch), rounds, threads)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    least = {name: min(seconds) for name, seconds in times.items()}
    ratio, floor = middle["original"] / middle["ours"], middle["floor"] / middle["ours"]
    wanted = [f"{target:.2f}" if target else "" for target in targets]
    scale = 1e3 / batch
    print(
        f"{row.name:<24}{prec:<6}{scale * middle['original']:>7.1f} ms{scale * middle['ours']:>8.1f} ms{ratio:>7.2f}"
        f"{least['original'] / least['ours']:>8.2f}{wanted[0]:>8}{floor:>7.2f}{wanted[1]:>8}",
        flush=True,
    )
    return any(target is not None and value < target for value, target in zip((ratio, floor), targets, strict=True))


OUR_SIDES = {"ours": ("ours", ROOT), "floor": ("products", ROOT)}


def interleaved(
    sides: Mapping[str, tuple[str, Path]], facts: dict[str, Any], rounds: int, threads: int
) -> dict[str, list[float]]:
    """Run sides in turn, each in a process of its own.

    Args:
        sides: name → module of the side, and its folder.
        facts: what they are told.
        rounds: measured steps of each.
        threads: threads of torch.

    Returns:
        Name → seconds of each step: processor time on a CPU, wall time on a GPU.
    """
    kind = "wall" if device().type == "cuda" else "processor"
    with ExitStack() as stack:
        begun = {
            name: stack.enter_context(Side(module, facts, place, threads)) for name, (module, place) in sides.items()
        }
        for side in begun.values():
            side.step()  # warm-up
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in begun.items():
                times[name].append(side.step()[kind])
    return times


def compared_memory(row: Row, prec: str, target: float | None, place: Path, threads: int) -> bool:
    """Measure the memory of a row and print it.

    Returns:
        Whether the target is missed.
    """
    facts = row.told(prec, MEMORY_BATCH)
    found = []
    for module, folder, more in (("originals", place, {}), ("ours", ROOT, {}), ("ours", ROOT, {"frees": True})):
        with Side(module, {**facts, **more}, folder, threads) as side:
            found.append([side.step()["memory"] for _ in range(2)][-1])
    if None in found:
        print(f"{row.name:<24}{prec:<6}skipped: this system does not tell the peak of a process")
        return False
    original, ours, frees = (size / MB for size in found)
    print(
        f"{row.name:<24}{prec:<6}{original:>7.0f} MB{ours:>6.0f} MB{ours / original:>7.2f}"
        f"{f'{target:.2f}' if target else '':>8}{frees:>6.0f} MB{frees / original:>7.2f}",
        flush=True,
    )
    return target is not None and ours / original > target


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python benchmarks/compare.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, url in SOURCES.items():
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"a checkout of {url}")
    add_measurement(parser)
    return parser


def add_measurement(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which rows are measured, and how."""
    parser.add_argument("--only", default="", metavar="TEXT", help="only the rows with this text in name or precision")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured steps of each side (default: 5)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of torch (default: 1)")


if __name__ == "__main__":
    sys.exit(main())
