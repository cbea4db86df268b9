"""Writes docs/costs.md and .json: what the training of each shipped model config costs, counted without a GPU.

    python scripts/make_costs.py                     # all configs, minutes; needs no weights and no images
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

from tailtune.benchmarks.shipped import PAIRS as SHIPPED
from tailtune.benchmarks.steps.host_syncs import syncs_of_step
from tailtune.configs import CfgNode, load_configs, names
from tailtune.configs.shipped_configs import KINDS, kind_of
from tailtune.configs.yaml_reader import read_yaml
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
KIND_OF = {model: kind_of(read_yaml(path)) for model, path in names("model").items()}
PAIRS = [*SHIPPED, ("imagenet_lt", IMAGES_ONLY)]
PAIRS += [("imagenet_lt", model) for data, model in SHIPPED if data == "inat2018" and KIND_OF[model] == "text"]
"""The rows of the table. iNaturalist has the most classes; what encodes texts is also counted with 1,000 classes."""
NEEDED = {"clip_vit_b16_lt_soups": ("merge_runs", "[first,second]")}
"""Options that a model config does not run without. They change no cost."""
CARD, MEMORY = "A100", 20
"""The card whose times are estimated, and the memory in GB of the smallest card that is meant."""
RATE = {"fp32": 95e12, "amp": 190e12, "bf16": 190e12}
"""Value of `prec` → FLOP/s that the card is assumed to reach in products and convolutions."""
BANDWIDTH, LAUNCH = 1.3e12, 10e-6
"""Bytes per second that it is assumed to move, and seconds that the host is assumed to need for a kernel."""
TORCH = torch.__version__.partition("+")[0]
MB, GB, GIGA, TERA = 10**6, 10**9, 10**9, 10**12


def counted(data: str, model: str, *words: str) -> Row:
    """The row of a config: parameters, work and memory of its training, from the method on the meta device.

    Args:
        data: name of the data config.
        model: name of the model config.
        words: `KEY VALUE` pairs.
    """
    methods: list[Method] = []
    for stage in _stages(data, model, *words):
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


def waits_of(data: str, model: str) -> int:
    """How often a step of the trainer makes the host wait for the GPU."""
    return len(syncs_of_step(_stages(data, model)))


def _stages(data: str, model: str, *words: str) -> list[CfgNode]:
    return load_configs(data, model, [*NEEDED.get(model, ()), *words], declared())


def row_of(data: str, model: str) -> Row:
    """The row of a config in the table: `counted`, and `waits` where something trains."""
    row = counted(data, model)
    return row if "reason" in row else row | {"waits": waits_of(data, model)}


def works(row: Row) -> tuple[Work, Work]:
    """What a micro-batch computes without the texts, and what the texts of a step are."""
    fields = Work.__dataclass_fields__
    texts = {name: row.get("texts", {}).get(name, 0) for name in fields}
    return Work(**{name: row[name] - texts[name] for name in fields}), Work(**texts)


def step_of(row: Row) -> Work:
    """What an optimizer step computes: its micro-batches, and the texts once."""
    images, texts = works(row)
    count = row["batch"] // row["at_once"]
    return Work(**{name: count * getattr(images, name) + getattr(texts, name) for name in Work.__dataclass_fields__})


def estimated_seconds(row: Row) -> float:
    """Time of an optimizer step on the card, without the optimizer and the loading of images.

    The host is ahead of the card in a step, because it never waits for it. So the slower of both decides.
    """
    work = step_of(row)
    return max(work.flops / RATE[row["prec"]] + work.moved / BANDWIDTH, work.kernels * LAUNCH)


COLUMNS = {
    "trained": "number of parameters that train",
    "total": "number of all parameters",
    "GFLOPs": "of a training step, for one image: convolutions, matrix products and fused attention. A multiplication "
    "and an addition are two.",
    "saved": "MB that are kept of an image for the backward pass",
    "kernels": "operations on tensors in the passes of a micro-batch, without views. Each is at least one kernel.",
    "waits": "operations of a step of the trainer for which the host waits for the GPU, between two lines of the log "
    "(`benchmarks/steps/host_syncs.py`)",
    "batch": "images of an optimizer step; in brackets how many of them are computed at once, if not all "
    "(`micro_batch_size`)",
    "memory": "GB of the parameters, the gradients, the state of the optimizer and all that is saved of a micro-batch. "
    "CUDA itself, its allocator and the workspace of kernels need more: 2 or 3 GB, by our guess.",
    "hours": "**estimated** time of all epochs on one {card}, see [below](#how-the-hours-are-estimated)",
}
OF_TEXTS = {
    "texts, TFLOPs": "of a training step, for the texts of all classes. They are encoded once in a step, while the "
    "text encoder trains.",
    "texts, saved": "MB that are kept of the texts for the backward pass",
}
OF_SHARES = ["data", "classes", "TFLOPs without texts", "TFLOPs with texts", "ratio of FLOPs", "ratio of bytes"]
OF_SHARES += ["ratio of estimated times", "GB with texts"]
INTRODUCTION = """# What training costs

Every number of this page is **counted or estimated**. Nothing here was timed, and no GPU has run this code yet.
[Results](results.md) has times that were measured on a CPU. `--dry-run` counts the memory of a command of your own.
This page is written by `python scripts/make_costs.py`, from `docs/costs.json`, and a test counts again.

## How it is counted

The training step of each shipped config is run on torch's meta device, which computes shapes and no values: forward and
backward pass of one micro-batch, with all passes of `sam`, and without the optimizer. So the numbers are the same on
every machine with the same version of torch ({torch}).

| column | what it is |
|---|---|
{columns}

* The largest memory is {most:.1f} GB (`{largest}` with `{largest_data}`), so each config fits a card of {memory} GB
  with the batch and the `micro_batch_size` that it names.
* Networks that run as a whole (the convolutional ones of CLIP and timm) are counted in fp32, because autocast does not
  support the meta device. This overestimates their memory and their time.
* A run that continues another one (`after`) is counted without the run before it, which has a row of its own.

## How the hours are estimated

The time of a step is the larger of two: FLOPs / R + bytes / {bandwidth:.1f} TB/s, and kernels · {launch:.0f} µs. R is
{half:.0f} TFLOP/s with `prec` amp and bf16, and {single:.0f} TFLOP/s with fp32 (TF32). The bytes are those that all
operations without FLOPs read and write, such as norms and activations. The hours are the time of all steps.

These rates are **assumptions** for an {card}: about 60 % of its peaks. The loading of images, the optimizer, validation
and test are not in them. Take the hours as an order of magnitude, and read the remaining time (`eta`) in the log.

## What text mode costs

`{text}` trains an AdaptFormer in both encoders. `{images}` trains the one of the image
encoder, and a classifier. Costs of a step of 128 images:

{shares}
"""


def page(version: str, rows: Mapping[Pair, Row]) -> str:
    """The text of docs/costs.md, for rows that were counted with a version of torch."""
    trained = {pair: row for pair, row in rows.items() if "reason" not in row}
    data, largest = max(trained, key=lambda pair: trained[pair]["memory"])
    values = {"card": CARD, "memory": MEMORY, "largest": largest, "largest_data": data}
    values |= {"most": trained[data, largest]["memory"] / GB, "bandwidth": BANDWIDTH / TERA, "launch": LAUNCH * 1e6}
    values |= {"half": RATE["amp"] / TERA, "single": RATE["fp32"] / TERA}
    values |= {"text": TEXT_AND_IMAGES, "images": IMAGES_ONLY}
    values["shares"] = "\n".join([*_heading(OF_SHARES), *(_share(rows, data) for data in ("imagenet_lt", "inat2018"))])
    columns = (_line([name, meaning.format(**values)]) for name, meaning in (COLUMNS | OF_TEXTS).items())
    parts = [INTRODUCTION.format(**values, columns="\n".join(columns), torch=version)]
    for kind, meaning in KINDS.items():
        found = {pair: row for pair, row in rows.items() if KIND_OF[pair[1]] == kind}
        parts.append(f"## {kind}\n\n{meaning[0].upper()}{meaning[1:]}.\n\n{_table(found)}\n")
    return "\n".join(parts)


def _share(rows: Mapping[Pair, Row], data: str) -> str:
    """The row of a data config in the table of text mode."""
    cfg = resolve(load_configs(data, IMAGES_ONLY, [], declared())[-1])
    pair = [rows[data, IMAGES_ONLY], rows[data, TEXT_AND_IMAGES]]
    steps = [step_of(row) for row in pair]
    cells = [f"`{data}`", f"{build_info(cfg).num_classes:,}", *(f"{each.flops / TERA:.2f}" for each in steps)]
    cells += [_ratio([each.flops for each in steps]), _ratio([each.moved for each in steps])]
    return _line([*cells, _ratio([estimated_seconds(row) for row in pair]), f"{pair[1]['memory'] / GB:.1f}"])


def _ratio(pair: Sequence[float]) -> str:
    return f"{pair[1] / pair[0]:.2f}"


def _table(rows: Mapping[Pair, Row]) -> str:
    headings = ["config", "data", *COLUMNS, *(OF_TEXTS if any("texts" in row for row in rows.values()) else ())]
    lines = _heading(headings)
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
    cells = [f"{images.flops / row['at_once'] / GIGA:.2f}", f"{row['saved'] / MB:.1f}", f"{row['kernels']:,}"]
    cells += [f"{row['waits']}", batch, f"{row['memory'] / GB:.1f}", f"{hours:.1f}"]
    texts = row.get("texts")
    return cells + ([f"{texts['flops'] / TERA:.2f}", f"{texts['saved'] / MB:,.0f}"] if texts else [])


def _heading(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def stored() -> tuple[str, dict[Pair, Row]]:
    """docs/costs.json: the version of torch that it was made with, and the rows."""
    found = json.loads(STORED.read_text(encoding="utf-8"))
    return found["torch"], {(row.pop("data"), row.pop("model")): row for row in found["rows"]}


def write(rows: Mapping[Pair, Row]) -> None:
    """Write both files; a row of the JSON is one line."""
    lines = [json.dumps({"data": data, "model": model, **row}) for (data, model), row in rows.items()]
    head = json.dumps({"torch": TORCH})[:-1]
    STORED.write_text(f'{head}, "rows": [\n ' + ",\n ".join(lines) + "\n]}\n", encoding="utf-8")
    PAGE.write_text(page(TORCH, rows), encoding="utf-8")


def main() -> None:
    """Count the costs of the given configs, or of all, and write both files."""
    parser = argparse.ArgumentParser(
        prog="python scripts/make_costs.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help="count these model configs only")
    asked = parser.parse_args().models
    if unknown := set(asked) - {model for _, model in PAIRS}:
        parser.error(f"{min(unknown)} is no shipped model config")
    kept: dict[Pair, Row] = {}
    if asked and (before := stored())[0] == TORCH:  # another version counts other kernels
        kept = {pair: row for pair, row in before[1].items() if pair[1] not in asked}
    rows = {pair: kept.get(pair) or row_of(*pair) for pair in PAIRS}
    write(rows)
    print(f"wrote {PAGE.relative_to(ROOT)} and .json: {len(rows)} rows")


if __name__ == "__main__":
    main()
