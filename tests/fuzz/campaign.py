"""The parts of the campaign, their shares of the time, and the report."""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tailtune.tests.fuzz import changes, combinations, decoding, files, foreign, images, kills, processes, values
from tailtune.tests.fuzz.bench import Bench, Unusable
from tailtune.tests.fuzz.promises import Finding
from tailtune.tests.fuzz.runner import Limits

LONG = 600.0
"""Seconds from which on a campaign has time for what takes half a minute a case."""


@dataclass(frozen=True)
class Part:
    """Cases without end, each None or the promise that it broke; and a share of the time."""

    cases: Callable[[Bench], Iterator[Finding | None]]
    share: float
    long: bool = False
    """Only in long campaigns, or when named."""


PARTS: Mapping[str, Part] = {
    "values": Part(values.cases, 3),
    "combinations": Part(combinations.cases, 2),
    "images": Part(images.cases, 1),
    "decoding": Part(decoding.cases, 1),
    "files": Part(files.cases, 2),
    "kills": Part(kills.cases, 2),
    "foreign": Part(foreign.cases, 1),
    "changes": Part(changes.cases, 2),
    "workers": Part(processes.workers, 1),
    "ranks": Part(processes.ranks, 3, long=True),
}


@dataclass
class Tally:
    """What a part has done."""

    cases: int = 0
    seconds: float = 0.0
    findings: dict[str, tuple[int, Finding]] = field(default_factory=dict)
    """By what was seen: how often, and the case with the shortest command."""

    def add(self, found: Finding | None) -> None:
        self.cases += 1
        if found is not None:
            times, best = self.findings.get(found.what, (0, found))
            self.findings[found.what] = times + 1, min(best, found, key=lambda each: len(each.command))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; 1 if a promise broke."""
    begin = time.monotonic()
    args = _arguments(argv)
    chosen = (
        args.only.split(",") if args.only else [n for n, p in PARTS.items() if args.minutes * 60 >= LONG or not p.long]
    )
    if unknown := set(chosen) - PARTS.keys():
        raise SystemExit(f"error: --only {','.join(unknown)}: the parts are {', '.join(PARTS)}")
    tallies: dict[str, Tally] = {}
    with tempfile.TemporaryDirectory(prefix="tailtune-fuzz-") as scratch:
        for number, name in enumerate(chosen):
            remaining = begin + args.minutes * 60 - time.monotonic()
            share = PARTS[name].share / sum(PARTS[each].share for each in chosen[number:])
            bench = Bench(name, args.seed, Path(scratch) / name, Limits(args.limit))
            tallies[name] = go(PARTS[name], bench, args.count, None if args.count else remaining * share)
            print(_line(name, tallies[name]), flush=True)
            _report(args, tallies)
    return int(any(each.findings for each in tallies.values()))


def go(part: Part, bench: Bench, count: int | None, seconds: float | None) -> Tally:
    """Cases of a part until it has done `count`, or `seconds` are over; one at least."""
    tally, begin = Tally(), time.monotonic()
    found = part.cases(bench)
    while count is None or tally.cases < count:
        if seconds is not None and tally.cases and time.monotonic() - begin >= seconds:
            break
        try:
            tally.add(next(found))
        except Unusable as failed:
            tally.add(failed.args[0])
            break
    tally.seconds = time.monotonic() - begin
    return tally


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="which cases (default: 0)")
    parser.add_argument("--minutes", type=float, default=1.0, help="for all parts together (default: 1)")
    parser.add_argument("--only", metavar="PART,…", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--count", type=int, help="cases of each part, instead of minutes")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a command may take (default: 60)")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="JSON with every finding; what is printed goes beside it"
    )
    return parser.parse_args(argv)


def _line(name: str, tally: Tally) -> str:
    broke = sum(times for times, _ in tally.findings.values())
    lines = [f"{name:<14}{tally.cases:>6} cases {tally.seconds:>7.0f} s  {broke} broke a promise"]
    for what, (times, found) in sorted(tally.findings.items()):
        lines += [f"  ({found.promise}) {what}, {times} times", f"      {found.command[:600]}"]
    return "\n".join(lines)


def _report(args: argparse.Namespace, tallies: Mapping[str, Tally]) -> None:
    if args.report is None:
        return
    parts = {
        name: {
            "cases": tally.cases,
            "seconds": round(tally.seconds),
            "findings": [{"times": times, **asdict(found)} for times, found in tally.findings.values()],
        }
        for name, tally in tallies.items()
    }
    args.report.write_text(json.dumps({"seed": args.seed, "parts": parts}, indent=1) + "\n")
    args.report.with_suffix(".txt").write_text("\n".join(_line(*each) for each in tallies.items()) + "\n")
