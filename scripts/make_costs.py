"""Writes docs/costs.md and .json: what the training of each shipped model config costs, counted without a GPU.

    python scripts/make_costs.py                     # all configs, ten minutes; needs no weights and no images
    python scripts/make_costs.py clip_vit_b16_peft   # this config; the others stay as they are stored

tests/test_costs.py counts again and compares, so that a change of a cost is seen in a review.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tailtune.configs import load_configs
from tailtune.configs.shipped_configs import KINDS, configs_of, main_pairs
from tailtune.datasets.build_data import build_info
from tailtune.models import resolve
from tailtune.scripts._page import ROOT
from tailtune.scripts._step_cost import Work, work_of_step, work_of_texts
from tailtune.trainers.config_checks import outline
from tailtune.trainers.dry_run_report import memory_of, steps_of
from tailtune.trainers.methods import Method
from tailtune.trainers.micro_batch_size import micro_batch_size
from tailtune.trainers.optimizers_and_schedules import Plan
from tailtune.trainers.option_schema import declared

PAGE, STORED = ROOT / "docs" / "costs.md", ROOT / "docs" / "costs.json"
Row = dict[str, Any]
Pair = tuple[str, str]
"""Data config and model config."""
TEXT_AND_IMAGES, IMAGES_ONLY = "clip_vit_b16_text_peft", "clip_vit_b16_peft"
"""The same tuner of the image encoder with and without one of the text encoder."""
PAIRS = main_pairs()
PAIRS += [("imagenet_lt", model) for model in (IMAGES_ONLY, *configs_of("text")) if ("inat2018", model) in PAIRS]
"""The rows of the table. iNaturalist has the most classes; what encodes texts is also counted with 1,000 classes."""
CARD, MEMORY = "A100", 20
"""The card whose times are estimated, and the memory in GB of the smallest card that is meant."""
RATE = {"fp32": 95e12, "amp": 190e12, "bf16": 190e12}
"""Value of `prec` → FLOP/s that the card is assumed to reach in products and convolutions."""
BANDWIDTH, LAUNCH = 1.3e12, 10e-6
"""Bytes per second that it is assumed to move, and seconds that the host is assumed to need for a kernel."""
MB, GB, GIGA, TERA = 10**6, 10**9, 10**9, 10**12


def counted(data: str, model: str) -> Row:
    """The row of a config: parameters, work and memory of its training, from the method on the meta device."""
    methods: list[Method] = []
    for stage in load_configs(data, model, [], declared()):
        cfg = resolve(stage)
        methods.append(outline(cfg))
    method, params = methods[-1], methods[-1].counts()
    row: Row = {"trained": params["trainable"], "total": params["total"]}
    _, steps = steps_of(cfg, int(build_info(cfg).class_counts.sum()))
    if not steps:
        return row | {"reason": "nothing is trained"}
    plan = Plan.of(cfg, micro_batch_size(cfg, 1))
    memory = memory_of(cfg, methods[-2:])
    row |= {"prec": cfg.prec, "steps": steps, "batch": plan.batch_size, "at_once": plan.micro_batch_size}
    row |= {"memory": memory.total(plan.micro_batch_size), "saved": memory.image}
    row |= vars(work_of_step(method, plan, cfg.resolution))
    if memory.texts:
        row["texts"] = {"saved": memory.texts, **vars(work_of_texts(method))}
    return row


def works(row: Row) -> tuple[Work, Work]:
    """What a micro-batch computes without the texts, and what the texts of a step are."""
    fields = Work.__dataclass_fields__
    texts = {name: row.get("texts", {}).get(name, 0) for name in fields}
    return Work(**{name: row[name] - texts[name] for name in fields}), Work(**texts)


def flops_of_step(row: Row) -> int:
    """FLOPs of an optimizer step, in which the texts are encoded once."""
    images, texts = works(row)
    return images.flops * (row["batch"] // row["at_once"]) + texts.flops


def estimated_seconds(row: Row) -> float:
    """Time of an optimizer step on the card, without the optimizer and the loading of images."""
    images, texts = works(row)
    return _seconds(images, row["prec"]) * (row["batch"] // row["at_once"]) + _seconds(texts, row["prec"])


def _seconds(work: Work, prec: str) -> float:
    return max(work.flops / RATE[prec] + work.moved / BANDWIDTH, work.kernels * LAUNCH)


INTRODUCTION = """# What training costs

Every number of this page is **counted or estimated**. Nothing was timed, and no GPU has run this code yet. Measured times
on a CPU are in [Results](results.md). `python main.py -d DATA -m MODEL --dry-run` counts the memory of your own run.

## How it is counted

The step of each shipped config is run on torch's meta device, which computes shapes and no values: forward and backward
passes over one micro-batch, with the passes of `sam` and without the optimizer.

| column | what it is |
|---|---|
| trained, total | numbers of parameters |
| GFLOPs | of a training step, for one image: convolutions, matrix products and fused attention. A multiplication and an addition are two. |
| saved | MB that are kept of an image for the backward pass |
| kernels | operations on tensors in the passes of a micro-batch, without views. Each is at least one kernel. |
| batch | images of an optimizer step, and in brackets how many of them are computed at once, if they are fewer (`micro_batch_size`) |
| memory | GB of parameters, gradients, optimizer state and everything that is saved of a micro-batch. What CUDA itself, its allocator and single kernels need is not in it: 2 or 3 GB more. |
| hours | **estimated** time of all epochs on one {card}, see [below](#how-the-hours-are-estimated) |

While a text encoder trains, it encodes the texts of all classes once in a step. These costs are in the columns
*texts* (TFLOPs of a step and MB saved), and not in those of an image.

* The largest memory is {most:.1f} GB (`{largest}` with `{largest_data}`), so each config fits a card of {memory} GB with the
  batch and the `micro_batch_size` that it names.
* The passes wait nowhere for the GPU: they were run without values, so none of them reads one.
* Networks that run as a whole (CLIP's and timm's convolutional networks) are counted in fp32, because autocast does not
  support the meta device. Their memory is overestimated.
* A chain of runs (`after`) has the costs of its last stage. The stage before it has a row of its own.

## How the hours are estimated

Time of a micro-batch = the larger of FLOPs / R + bytes / {bandwidth:.1f} TB/s, and kernels · {launch:.0f} µs. R is {half:.0f} TFLOP/s with
`prec` amp and bf16, and {single:.0f} with fp32 (TF32). *Bytes* are those that all operations without FLOPs read and write, such as
norms and activations. The hours are this time for all micro-batches of all epochs.

These rates are **assumptions** for an {card}: about 60 % of its peaks. A card with half of them takes twice as long. The
loader of images, the optimizer, validation and test are not in it. So take the hours as an order of magnitude.

## What text mode costs

`{text}` trains an AdaptFormer in both encoders, and `{images}` has the one of the image encoder and a classifier. At batch 128:

| data | classes | step without texts, TFLOPs | step with texts, TFLOPs | ratio | memory, GB | estimated times, ratio |
|---|---|---|---|---|---|---|
{shares}
"""


def page(rows: Mapping[Pair, Row]) -> str:
    """The text of docs/costs.md."""
    trained = {pair: row for pair, row in rows.items() if "reason" not in row}
    data, largest = max(trained, key=lambda pair: trained[pair]["memory"])
    values = {"card": CARD, "memory": MEMORY, "largest": largest, "largest_data": data}
    values |= {"most": trained[data, largest]["memory"] / GB, "bandwidth": BANDWIDTH / TERA, "launch": LAUNCH * 1e6}
    values |= {
        "half": RATE["amp"] / TERA,
        "single": RATE["fp32"] / TERA,
        "text": TEXT_AND_IMAGES,
        "images": IMAGES_ONLY,
    }
    values["shares"] = "\n".join(_share(rows, data) for data in ("imagenet_lt", "inat2018"))
    parts = [INTRODUCTION.format(**values)]
    for kind, meaning in KINDS.items():
        models = configs_of(kind)
        found = {pair: row for pair, row in rows.items() if pair[1] in models}
        parts.append(f"## {kind}\n\n{meaning[0].upper()}{meaning[1:]}.\n\n{_table(found)}\n")
    return "\n".join(parts)


def _share(rows: Mapping[Pair, Row], data: str) -> str:
    with_texts, without = rows[data, TEXT_AND_IMAGES], rows[data, IMAGES_ONLY]
    classes = len(build_info(resolve(load_configs(data, IMAGES_ONLY, [], declared())[-1])).class_counts)
    flops = [flops_of_step(row) for row in (without, with_texts)]
    times = [estimated_seconds(row) for row in (without, with_texts)]
    cells = [f"`{data}`", f"{classes:,}", *(f"{each / TERA:.2f}" for each in flops), f"{flops[1] / flops[0]:.2f}"]
    return _line([*cells, f"{with_texts['memory'] / GB:.1f}", f"{times[1] / times[0]:.2f}"])


def _table(rows: Mapping[Pair, Row]) -> str:
    headings = ["config", "data", "trained", "total", "GFLOPs", "saved", "kernels", "batch", "memory", "hours"]
    headings += ["texts, TFLOPs", "texts, saved"] if any("texts" in row for row in rows.values()) else []
    lines = [_line(headings), _line(["---"] * len(headings))]
    for (data, model), row in rows.items():
        cells = [f"`{model}`", f"`{data}`", f"{row['trained']:,}", f"{row['total']:,}"]
        cells += [row["reason"]] if "reason" in row else _costs(row)
        lines.append(_line(cells + [""] * (len(headings) - len(cells))))
    return "\n".join(lines)


def _costs(row: Row) -> list[str]:
    """The cells of a row from `GFLOPs` on."""
    images, _ = works(row)
    hours = estimated_seconds(row) * row["steps"] / 3600
    batch = f"{row['batch']}" + (f" ({row['at_once']})" if row["at_once"] < row["batch"] else "")
    cells = [f"{images.flops / row['at_once'] / GIGA:.2f}", f"{row['saved'] / MB:.1f}", f"{row['kernels']:,}", batch]
    cells += [f"{row['memory'] / GB:.1f}", f"{hours:.1f}"]
    texts = row.get("texts")
    return cells + ([f"{texts['flops'] / TERA:.2f}", f"{texts['saved'] / MB:,.0f}"] if texts else [])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def stored() -> dict[Pair, Row]:
    """The rows of docs/costs.json."""
    rows = json.loads(STORED.read_text(encoding="utf-8"))["rows"]
    return {(row.pop("data"), row.pop("model")): row for row in rows}


def write(rows: Mapping[Pair, Row]) -> None:
    """Write both files; a row of the JSON is one line."""
    lines = [json.dumps({"data": data, "model": model, **row}) for (data, model), row in rows.items()]
    head = json.dumps({"torch": torch.__version__.partition("+")[0]})[:-1]
    STORED.write_text(f'{head}, "rows": [\n ' + ",\n ".join(lines) + "\n]}\n", encoding="utf-8")
    PAGE.write_text(page(rows), encoding="utf-8")


def main() -> None:
    """Count the costs of the given configs, or of all, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="count these model configs only")
    asked = parser.parse_args().models
    before = stored() if asked else {}
    rows = {pair: before[pair] if asked and pair[1] not in asked else counted(*pair) for pair in PAIRS}
    write(rows)
    print(f"wrote {PAGE.relative_to(ROOT)} and .json: {len(rows)} rows")


if __name__ == "__main__":
    main()
