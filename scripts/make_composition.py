"""Writes docs/composition.md and .json: which backbones, tuners, methods and test-time steps go together.

    python scripts/make_composition.py     # two minutes; needs no weights and no images

Every pair of entries is built on the meta device, as --dry-run does. A pair is refused if it works with no usual
choice of the other axes; the reason is the error message that a user gets. The JSON also holds a covering array: few
configurations in which every pair that goes together occurs. tests/test_composition.py trains, resumes and evaluates
them.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.configs import load_configs
from tailtune.configs.errors import UserError
from tailtune.models.tuners.table import TUNERS
from tailtune.trainers.config_checks import validate
from tailtune.trainers.evaluation.adaptation_table import ADAPTS
from tailtune.trainers.evaluation.ensembles import ENSEMBLES
from tailtune.trainers.evaluation.target_prior import TARGETS
from tailtune.trainers.flat_minima import SAM_MODES
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import METHODS
from tailtune.trainers.option_schema import declared

ROOT = Path(__file__).resolve().parent.parent
PAGE, ARRAY = ROOT / "docs" / "composition.md", ROOT / "docs" / "composition.json"
Choice = dict[str, str]
"""Axis → chosen entry."""

INTRODUCTION = """# What can be combined

A run combines entries of {axes} tables: a backbone, a tuner, the step of training, a loss, a method and what is done at
test time. `Tip-Adapter` and `LT-Soups` stand for several options. Every pair of entries was built as
`--dry-run` does, with three experts.

* {taken} of {total} pairs can be combined. `tests/test_composition.py` trains, resumes and evaluates {rows}
  configurations in which all these pairs occur.
* The other {refused} pairs are refused before anything is read. The table below has the reasons, in the words of the
  error message.

The four backbones are examples of their kinds. Another one can accept a pair that these four refuse: the residual
networks of CLIP, for example, have a text encoder and batch norms.

This page is written by `python scripts/make_composition.py`, which `make docs` runs.

## The entries

{entries}

## The pairs that are refused

| this | with this | is refused, because |
|---|---|---|"""
OTHER = "output/other"
"""Folder of another run of the same model, for what combines several runs."""
OF_METHOD = {
    "h2t": "h2t.shift_bn False sampler balanced pair_sampler shuffle",
    "glmc": "pair_sampler shuffle",
    "tau_norm": "classifier LinearClassifier after.classifier LinearClassifier num_epochs 0",
}
"""Further options that a method needs."""
TEXT, OF_EXPERTS = "classifier TextClassifier", "adaptformer True expert_split 1"
"""Text features that train, and adapters in which experts differ, which share the texts."""
OF_TEST = {"soup": f"ensemble_runs [{OTHER}]"}
"""Further options that an ensemble needs."""

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
        "text tower": f"{TEXT} text_lora True {OF_EXPERTS}",
        "CoOp": f"{TEXT} context coop context_len 4 {OF_EXPERTS}",
        "MaPLe": f"{TEXT} context maple context_depth 2 {OF_EXPERTS}",
        "CLIP-Adapter": f"{TEXT} clip_adapter residual {OF_EXPERTS}",
        "Tip-Adapter": "classifier TipAdapter num_experts 1 num_epochs 0",
    },
    "step": {"at the weights": "", **{f"sam {name}": f"sam {name}" for name in SAM_MODES}},
    "loss": {name: f"loss_type {name}" for name in LOSSES},
    "method": {
        **{name: f"method {name} {OF_METHOD.get(name, '')}" for name in METHODS},
        "LT-Soups": f"method h2t h2t.ratio 0 h2t.shift_bn False merge_runs [{OTHER}]",
    },
    "test": {
        "plain": "",
        "tte": "tte True",
        **{name: f"adapt {name}" for name in ADAPTS},
        **{f"target_prior {name}": f"target_prior {name}" for name in TARGETS},
        **{name: f"ensemble {name} {OF_TEST.get(name, '')}" for name in ENSEMBLES},
    },
}
"""Axis → its entries. Each entry has the words of a command line that select it, with the model config `tiny_clip`."""
COMMON = "pretrained none num_experts 3"
USUAL = {
    "backbone": AXES["backbone"],
    "tuner": ("head only", "full_tuning", "bn_tuning"),
    "method": ("classify", "sade"),
}
"""Entries of the other axes that are tried with a pair, in this order. For an axis that is missing: its first entry."""


def words(choice: Choice) -> list[str]:
    """The `KEY VALUE` words of a choice. In a chain, the earlier run has the same model and the method `classify`."""
    parts, method = (
        " ".join(AXES[axis][choice[axis]] for axis in axes).split()
        for axes in (("backbone", "tuner", "step"), ("loss", "method", "test"))
    )
    pairs = ["test_only", "True", "val_per_class", "1", *COMMON.split(), *parts, *method]
    if METHODS[method[method.index("method") + 1]].continues_from_earlier_run:
        before = [*COMMON.split(), *parts, "loss_type", "CE"]
        pairs += ["after", "tiny_clip"] + [f"after.{w}" if i % 2 == 0 else w for i, w in enumerate(before)]
    return pairs


def refusal(choice: Choice) -> str | None:
    """The error message for a configuration; None if the configuration is accepted."""
    try:
        validate(load_configs("fake_lt", "tiny_clip", words(choice), declared()))
    except UserError as error:
        return " ".join(str(error).split())
    return None


def tried(first: tuple[str, str], second: tuple[str, str]) -> Iterator[Choice]:
    """Configurations that contain two pairs (axis, entry), with usual entries of the other axes."""
    fixed = dict((first, second))
    free = [axis for axis in AXES if axis not in fixed]
    for entries in product(*(USUAL.get(axis, list(AXES[axis])[:1]) for axis in free)):
        yield {axis: {**dict(zip(free, entries, strict=True)), **fixed}[axis] for axis in AXES}


Pair = tuple[tuple[str, str], tuple[str, str]]


def every_pair() -> Iterator[Pair]:
    """All pairs of entries of different axes."""
    for one, other in combinations(AXES, 2):
        yield from (((one, a), (other, b)) for a, b in product(AXES[one], AXES[other]))


def refused_pairs(why: Callable[[Choice], str | None] = refusal) -> dict[Pair, str]:
    """The pairs that are refused in every configuration tried.

    Args:
        why: configuration → reason for refusing it, None if it is accepted.

    Returns:
        Pair → the first reason.
    """
    reason_of: dict[Pair, str] = {}
    for pair in every_pair():
        reasons = []
        for choice in tried(*pair):
            reason = why(choice)
            if reason is None:
                break
            reasons.append(reason)
        else:
            reason_of[pair] = reasons[0]
    return reason_of


def covering(refused: Sequence[Pair], why: Callable[[Choice], str | None] = refusal) -> list[Choice]:
    """Find a small number of configurations that contain every pair that is not refused, with a greedy search.

    Args:
        refused: the pairs that cannot be combined.
        why: configuration → reason for refusing it, None if it is accepted.
    """
    open_pairs = [pair for pair in every_pair() if pair not in refused]
    left, bad = set(open_pairs), set(refused)
    rows: list[Choice] = []
    for pair in open_pairs:
        if pair not in left:
            continue
        row = next((choice for choice in _filled(pair, left, bad) if why(choice) is None), None)
        row = row or next(choice for choice in tried(*pair) if why(choice) is None)
        rows.append(row)
        left -= set(_pairs_of(row))
    return rows


def _pairs_of(row: Choice) -> Iterator[Pair]:
    places = [(axis, row[axis]) for axis in AXES if axis in row]
    return combinations(places, 2)


def _filled(pair: Pair, left: set[Pair], bad: set[Pair], at_most: int = 12) -> Iterator[Choice]:
    """Configurations with `pair` and without refused pairs. Those with most pairs in `left` come first."""
    free = [axis for axis in AXES if axis not in dict(pair)]
    rows = []
    for entries in product(*(AXES[axis] for axis in free)):
        chosen = {**dict(pair), **dict(zip(free, entries, strict=True))}
        row = {axis: chosen[axis] for axis in AXES}
        pairs = set(_pairs_of(row))
        if not pairs & bad:
            rows.append((len(pairs & left), row))
    rows.sort(key=lambda covered_and_row: -covered_and_row[0])
    return (row for _, row in rows[:at_most])


def page(refused: Mapping[Pair, str], rows: Sequence[Choice]) -> str:
    """The text of docs/composition.md, for the refused pairs with their reasons and the covering array."""
    total = sum(1 for _ in every_pair())
    numbers = {"axes": len(AXES), "taken": total - len(refused), "total": total, "refused": len(refused)}
    entries = [f"* **{axis}**: {', '.join(f'`{entry}`' for entry in of_axis)}" for axis, of_axis in AXES.items()]
    lines = [INTRODUCTION.format(**numbers, rows=len(rows), entries="\n".join(entries))]
    for reason, pairs in _grouped(refused):
        lines.append(f"| {pairs[0]} | {pairs[1]} | {reason.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def _grouped(refused: Mapping[Pair, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Group the pairs by reason: yields the reason and the entries of both sides. `it` replaces the second entry."""
    seconds: dict[tuple[str, str], list[str]] = {}
    for ((_, one), (_, other)), reason in refused.items():
        general = reason
        names = ((f"loss_type {one}", "this loss"), (f"ensemble {other}", "this ensemble"), (f"adapt {other}", "it"))
        for text, short in (*names, (other, "it")):
            general = general.replace(text, short)
        seconds.setdefault((one, general), []).append(other)
    firsts: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (one, reason), others in seconds.items():
        firsts.setdefault((reason, tuple(others)), []).append(one)
    for (reason, seconds_of_reason), ones in firsts.items():
        first, second = (", ".join(f"`{name}`" for name in names) for names in (ones, seconds_of_reason))
        yield reason, (first, second)


def main() -> None:
    """Try all pairs and write both files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
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
