"""Rows of `benchmarks/gpu.py` that measure training steps: ours, and beside it the original's."""

import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from tailtune.benchmarks import compare
from tailtune.benchmarks.steps.device import peak_flops
from tailtune.benchmarks.steps.side import ROOT, Side
from tailtune.configs.errors import UserError
from tailtune.trainers.precision import PRECISIONS

GIB = 2**30
WARM, ROUNDS = 3, 15
"""Steps before the measured ones, and measured steps. The first step compiles."""
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Dtype of products → its entry in `PEAKS`; fp32 may be TF32."""
Facts = dict[str, Any]


@dataclass
class Bench:
    """What all rows share."""

    device: str
    """Name of the GPU; empty: the rows run on a CPU."""
    toy: bool
    """Whether rows are small enough for a CPU."""
    places: Mapping[str, Path | None]
    """Entry of `compare.SOURCES` → its checkout."""
    until: float
    """End of the time, on `time.monotonic`."""
    flops: dict[str, int] = field(default_factory=dict)
    """Row → FLOPs of its step."""

    def left(self) -> float:
        """Seconds until the end of the time."""
        return self.until - time.monotonic()

    def ended(self, error: UserError) -> Facts:
        """The facts of a row whose process has ended."""
        over = self.left() <= 0
        return {"status": "not run", "why": "the time was over"} if over else {"status": "failed", "why": str(error)}

    @contextmanager
    def side(self, module: str, told: Facts, folder: Path = ROOT) -> Iterator[Side]:
        """A process of `steps`, which is killed at the end of the time."""
        with Side(module, told, folder, threads=1) as side:
            timer = threading.Timer(max(self.left(), 0), side.process.kill)
            timer.start()
            try:
                yield side
            finally:
                timer.cancel()


@dataclass(frozen=True)
class StepRow:
    """The step of one configuration."""

    name: str
    row: compare.Row
    """What is trained, and what the original is told."""
    prec: str
    beside: str | None = None
    """Precision of the original; None: the original is not measured."""
    pairs: tuple[str, ...] = ()
    """More options of ours."""
    flops_of: str | None = None
    """Row with the same products. Those of a compiled step cannot be counted."""
    targets: Mapping[str, float] = field(default_factory=dict)
    """`ratio` and `mfu`: at least; `GiB`: at most."""
    needs: float = 25
    """Seconds."""

    @property
    def names(self) -> list[str]:
        """The one row."""
        return [self.name]

    def measure(self, bench: Bench) -> Iterator[tuple[str, Facts]]:
        """The row and its facts.

        Raises:
            UserError: a process ended.
        """
        yield self.name, self._measured(bench)

    def _measured(self, bench: Bench) -> Facts:
        """Time, memory, FLOPs and places that wait for the GPU."""
        row, pairs = self.row, self.pairs
        batch, place = compare.GPU_BATCH[row.size], bench.places[row.original]
        if bench.toy:
            model = row.model.replace("clip_vit_b16", "tiny_clip")
            row, batch, place = replace(row, model=model, size=("fake_lt", 4)), 4, None
            pairs = tuple("2" if word.isdigit() else word for word in pairs)
        told, beside = row.told(self.prec, batch, *pairs), None
        with ExitStack() as stack:
            ours = stack.enter_context(bench.side("ours", told))
            warm_up(ours)
            sides = {"": ours}
            if self.beside is not None and place is not None:
                beside = f"{row.original} {self.beside}"
                try:  # ours is worth its row without the original
                    side = stack.enter_context(bench.side("originals", {**told, "prec": self.beside}, place.absolute()))
                    warm_up(side)
                    sides["original_"] = side
                except UserError as error:
                    beside = f"{beside} failed: {error}"
            waits = ours.step("waits")["waits"]
            if self.flops_of is None:
                bench.flops[self.name] = ours.step("flops")["flops"]
            facts = {
                "batch": batch,
                "prec": self.prec,
                "original": beside,
                "waits": waits,
                **timed(sides, bench, batch),
            }
        facts |= self._share_of_peak(facts, ours.facts, bench)
        return {"status": "measured", **facts, "missed": missed(facts, self.targets) if bench.device else []}

    def _share_of_peak(self, facts: Facts, arithmetic: Facts, bench: Bench) -> Facts:
        flops = bench.flops.get(self.flops_of or self.name)
        fp32 = "tf32" if arithmetic.get("tf32 in products") else "fp32"
        kind = NAMES.get(PRECISIONS[self.prec].compute, fp32)
        peak = peak_flops(bench.device, kind) if self.row.size == compare.VIT else None  # convolutions may use another
        mfu = flops / facts["seconds"] / peak if peak and flops else None
        return {"flops": flops, "arithmetic": kind, "peak_flops": peak, "mfu": mfu, **arithmetic}


def warm_up(side: Side) -> None:
    """Make the steps that are not measured."""
    for _ in range(WARM):
        side.step()


def timed(sides: Mapping[str, Side], bench: Bench, batch: int) -> Facts:
    """Times and memory of steps of warm sides in turn: wall time on a GPU, processor time on a CPU.

    Args:
        sides: beginning of the names of the facts → side; ours is the empty one.
        bench: the device and the time.
        batch: images of a step.
    """
    kind, rounds = ("wall", ROUNDS) if bench.device else ("processor", 2)
    found: dict[str, list[Facts]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            found[name].append(side.step())
    facts: Facts = {"rounds": rounds}
    for name, steps in found.items():
        seconds = statistics.median(step[kind] for step in steps)
        facts |= {f"{name}seconds": seconds, f"{name}images_per_second": batch / seconds}
        for memory in ("allocated", "reserved"):
            facts[f"{name}{memory}"] = max((step[memory] for step in steps if memory in step), default=None)
    if len(sides) > 1:
        facts["ratio"] = facts["original_seconds"] / facts["seconds"]
    return facts


def missed(facts: Facts, targets: Mapping[str, float]) -> list[str]:
    """The targets that facts miss, in words. What was not measured misses nothing."""
    allocated = facts["allocated"]
    values = {"ratio": facts.get("ratio"), "mfu": facts["mfu"], "GiB": None if allocated is None else allocated / GIB}
    return [
        f"{name} {value:.2f} (target {target:g})"
        for name, target in targets.items()
        if (value := values[name]) is not None and (value > target if name == "GiB" else value < target)
    ]
