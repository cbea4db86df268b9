"""Writes docs/composition.md and .json: which backbones, tuners, methods and test-time steps go together.

    python scripts/make_composition.py     # two minutes; needs no weights and no images

Every pair of entries is built on the meta device, as --dry-run does. A pair is refused where no usual choice of the
other axes makes it work; the reason is the error that its user reads. The JSON holds, besides, a covering array:
configurations in which every pair that goes together occurs, which tests/test_composition.py trains, resumes and
evaluates.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tailtune.configs import load_configs  # noqa: E402
from tailtune.configs.errors import UserError  # noqa: E402
from tailtune.models.tuners.table import TUNERS  # noqa: E402
from tailtune.trainers.dry_run import check_chain  # noqa: E402
from tailtune.trainers.evaluation.ensembles import ENSEMBLES  # noqa: E402
from tailtune.trainers.evaluation.expert_weights import ADAPTS  # noqa: E402
from tailtune.trainers.evaluation.target_prior import TARGETS  # noqa: E402
from tailtune.trainers.methods import METHODS  # noqa: E402
from tailtune.trainers.options import declared  # noqa: E402

PAGE, ARRAY = ROOT / "docs" / "composition.md", ROOT / "docs" / "composition.json"
Choice = dict[str, str]
"""Axis → entry."""

LOSS = "loss_type CE"
OF_METHOD = {
    "h2t": "h2t.shift_bn False sampler balanced pair_sampler shuffle",
    "tau_norm": "classifier LinearClassifier after.classifier LinearClassifier num_epochs 0",
}
"""What else a method asks for."""
OF_TEST = {"soup": "ensemble_runs [other]"}

AXES: Mapping[str, Mapping[str, str]] = {
    "backbone": {
        "CLIP ViT": "backbone TinyCLIP resolution 32 init_head text_feat",
        "timm ViT": "backbone timm:test_vit.r160_in1k resolution 32 init_head class_mean",
        "timm convnet": "backbone timm:test_efficientnet.r160_in1k resolution 32 init_head class_mean",
        "our ResNet": "backbone ResNet-20 resolution 32 init_head none",
    },
    "tuner": {
        "head only": "",
        **{name: f"{name} True" for name in TUNERS},
        "peft LoRA": "peft LoRA",
    },
    "method": {name: f"method {name} num_experts 3 {LOSS} {OF_METHOD.get(name, '')}" for name in METHODS},
    "test": {
        "plain": "",
        "tte": "tte True",
        **{name: f"adapt {name}" for name in ADAPTS},
        **{f"target_prior {name}": f"target_prior {name}" for name in TARGETS},
        **{name: f"ensemble {name} {OF_TEST.get(name, '')}" for name in ENSEMBLES},
    },
}
"""Each axis with the words of a command line that its entries mean, on the embedded CLIP's config."""
COMMON = "pretrained none test_only True val_per_class 1"
USUAL = {
    "backbone": AXES["backbone"],
    "tuner": ("head only", "full_tuning", "bn_tuning"),
    "method": ("sade", "classify"),
}
"""Where the other axes stand while a pair is tried, in this order; the last axis at its first entry."""


def words(choice: Choice) -> list[str]:
    """The `KEY VALUE` words of a choice; the earlier run of a chain has the same parts and method classify."""
    parts = f"{AXES['backbone'][choice['backbone']]} {AXES['tuner'][choice['tuner']]}".split()
    found = [*COMMON.split(), *parts, *AXES["method"][choice["method"]].split(), *AXES["test"][choice["test"]].split()]
    if METHODS[choice["method"]].needs_after:
        before = [*parts, "pretrained", "none", "num_experts", "3", *LOSS.split()]
        found += ["after", "tiny_clip"] + [f"after.{w}" if i % 2 == 0 else w for i, w in enumerate(before)]
    return found


def refusal(choice: Choice) -> str | None:
    """Why a configuration is refused, as its user reads it; None if it is not."""
    try:
        check_chain(load_configs("fake_lt", "tiny_clip", words(choice), declared()))
    except UserError as error:
        return " ".join(str(error).split())
    return None


def tried(first: tuple[str, str], second: tuple[str, str]) -> Iterator[Choice]:
    """A pair of (axis, entry) among usual entries of the other axes."""
    fixed = dict((first, second))
    free = [axis for axis in AXES if axis not in fixed]
    for entries in product(*(USUAL.get(axis, list(AXES[axis])[:1]) for axis in free)):
        yield {axis: {**dict(zip(free, entries, strict=True)), **fixed}[axis] for axis in AXES}


Pair = tuple[tuple[str, str], tuple[str, str]]


def every_pair() -> Iterator[Pair]:
    for one, other in combinations(AXES, 2):
        yield from (((one, a), (other, b)) for a, b in product(AXES[one], AXES[other]))


def refused_pairs(why: Callable[[Choice], str | None] = refusal) -> dict[Pair, str]:
    """Pairs that go together in no configuration tried → reason."""
    found = {}
    for pair in every_pair():
        reasons = []
        for choice in tried(*pair):
            reason = why(choice)
            if reason is None:
                break
            reasons.append(reason)
        else:
            found[pair] = reasons[0]
    return found


def covering(refused: Sequence[Pair], why: Callable[[Choice], str | None] = refusal) -> list[Choice]:
    """Configurations in which every pair that is not refused occurs, few of them: each row is filled greedily."""
    open_pairs = [pair for pair in every_pair() if pair not in refused]
    left, bad = set(open_pairs), set(refused)
    rows: list[Choice] = []
    for pair in open_pairs:
        if pair not in left:
            continue
        row = next((each for each in _filled(pair, left, bad) if why(each) is None), None)
        row = row or next(each for each in tried(*pair) if why(each) is None)
        rows.append(row)
        left -= set(_pairs_of(row))
    return rows


def _pairs_of(row: Choice) -> Iterator[Pair]:
    places = [(axis, row[axis]) for axis in AXES if axis in row]
    return combinations(places, 2)  # type: ignore[return-value]


def _filled(pair: Pair, left: set[Pair], bad: set[Pair], at_most: int = 12) -> Iterator[Choice]:
    """Rows with a pair in them and no refused pair, those first that cover most of what is left."""
    free = [axis for axis in AXES if axis not in dict(pair)]
    rows = []
    for entries in product(*(AXES[axis] for axis in free)):
        chosen = {**dict(pair), **dict(zip(free, entries, strict=True))}
        row = {axis: chosen[axis] for axis in AXES}
        pairs = set(_pairs_of(row))
        if not pairs & bad:
            rows.append((len(pairs & left), row))
    rows.sort(key=lambda each: -each[0])
    return (row for _, row in rows[:at_most])


def page(refused: Mapping[Pair, str], rows: Sequence[Choice]) -> str:
    """The Markdown."""
    total = sum(1 for _ in every_pair())
    lines = [
        "# What goes together",
        "",
        "Written by `python scripts/make_composition.py`: every pair of entries of",
        f"{len(AXES)} axes was built as `--dry-run` does, with three experts. {total - len(refused)} of {total} pairs",
        f"go together; {len(rows)} configurations in which each of those occurs are trained, resumed and evaluated by",
        "`tests/test_composition.py`. The rest are refused before anything is read, with these words. Other backbones",
        "(CLIP's residual networks have a text tower and batch norms) may take what these four do not.",
        "",
        *(f"* **{axis}**: {', '.join(f'`{each}`' for each in entries)}" for axis, entries in AXES.items()),
        "",
        "| this | with this | is refused, because |",
        "|---|---|---|",
    ]
    for reason, pairs in _grouped(refused):
        lines.append(f"| {pairs[0]} | {pairs[1]} | {reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _grouped(refused: Mapping[Pair, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Reason and entries of both sides, what is refused alike in one line; `it` is the entry of the second side."""
    seconds: dict[tuple[str, str], list[str]] = {}
    for ((_, one), (_, other)), reason in refused.items():
        own = reason
        for text, short in ((f"ensemble {other}", "this ensemble"), (f"adapt {other}", "it"), (other, "it")):
            own = own.replace(text, short)
        seconds.setdefault((one, own), []).append(other)
    firsts: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (one, reason), others in seconds.items():
        firsts.setdefault((reason, tuple(others)), []).append(one)
    for (reason, others), ones in firsts.items():
        first, second = (", ".join(f"`{each}`" for each in names) for names in (ones, others))
        yield reason, (first, second)


def main() -> None:
    refused = refused_pairs()
    rows = covering(list(refused))
    PAGE.write_text(page(refused, rows), encoding="utf-8")
    stored = {
        "axes": {axis: list(entries) for axis, entries in AXES.items()},
        "refused": [[dict(pair), reason] for pair, reason in refused.items()],
        "rows": rows,
    }
    ARRAY.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)} and .json: {len(refused)} refused pairs, {len(rows)} configurations")


if __name__ == "__main__":
    main()
