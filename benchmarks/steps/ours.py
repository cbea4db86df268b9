"""Our trainer with one batch again and again: `python -m tailtune.benchmarks.steps.ours JSON`."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from accelerate import Accelerator

from tailtune.benchmarks.step import method_in
from tailtune.benchmarks.steps.clock import Clock
from tailtune.configs import CfgNode, load_configs
from tailtune.datasets.build_data import build_info
from tailtune.models import resolve
from tailtune.trainers import distributed, trainer
from tailtune.trainers.distributed import Devices, make_accelerator, uses_cuda
from tailtune.trainers.memory_estimate import blank_batch
from tailtune.trainers.methods import Method
from tailtune.trainers.methods.base import Batch
from tailtune.trainers.micro_batch_size import micro_batch_size
from tailtune.trainers.optimizers_and_schedules import Plan
from tailtune.trainers.option_schema import declared
from tailtune.trainers.precision import precision_used

STEPS = 10_000
"""Length of the run, more than is ever measured."""


def main(row: dict[str, Any]) -> None:
    """Train until standard input ends.

    Args:
        row: `data`, `model` and `pairs` as on the command line; `batch`: images of a step; `prec`; `frees`: give freed
            memory back to the system, which a training does not do on a CPU.
    """
    if row.get("frees"):
        distributed.keep_freed_memory = lambda: None
    clock = Clock()
    pairs = [*row["pairs"], "pretrained", "none", "prec", row["prec"], "batch_size", str(row["batch"])]
    cfg = resolve(load_configs(row["data"], row["model"], pairs, declared())[-1])
    info, at_once = build_info(cfg), micro_batch_size(cfg, 1)
    accelerator = make_accelerator(Devices.of(cfg))
    method = method_in(cfg, info, precision_used(cfg.prec, uses_cuda()))
    batch = blank_batch(method, accelerator.device, row["batch"], cfg.resolution)
    batch["label"] = torch.arange(row["batch"], device=accelerator.device) % info.num_classes
    batch["image"] = torch.randint_like(batch["image"], 256)
    print(f"{sum(p.numel() for p in method.parameters() if p.requires_grad):,} trained parameters")
    fit(cfg, method, accelerator, clock.batches(batch), row["batch"], at_once)


def fit(
    cfg: CfgNode, method: Method, accelerator: Accelerator, batches: Iterator[Batch], batch_size: int, at_once: int
) -> None:
    """Train by our trainer, without a loader, states, validation and log, until `batches` raises an error.

    Args:
        cfg: resolved config.
        method: the method, on the device of the accelerator and in the arithmetic of its training.
        accelerator: device and processes.
        batches: the batch of each step.
        batch_size: their number of images.
        at_once: number of images that are computed at once.
    """
    info = build_info(cfg)
    data = MagicMock(info=info)
    data.train.labels = torch.arange(STEPS * batch_size) % info.num_classes
    states, validation = MagicMock(), MagicMock(seconds=0.0)
    states.load.return_value = None
    validation.ends.return_value = validation.asks_to_stop.return_value = validation.is_due.return_value = False

    def loader(*_: Any) -> Iterator[Batch]:
        for whole in batches:
            for start in range(0, batch_size, at_once):
                yield {name: value[start : start + at_once] for name, value in whole.items()}

    plan = replace(Plan.of(cfg, at_once), batch_size=batch_size)
    with patch.object(trainer, "train_loader", loader), patch.object(trainer, "Progress", MagicMock()):
        trainer.Trainer(accelerator, plan, states, validation, MagicMock()).fit(method, data)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
