"""Gives a fresh method's head what its initialisation asks for: this run's training images as features."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from datasets import DataBundle
from datasets.bundle import eval_loader
from models.head_init import HeadContext
from trainers.launch import to_device
from trainers.methods import Method


@torch.no_grad()
def prepare_head(method: Method, data: DataBundle, accelerator: Accelerator, batch_size: int, num_workers: int) -> None:
    """Run `method.prepare`; each process encodes its share of the training images, if they are asked for."""

    def features() -> Iterator[tuple[Tensor, Tensor]]:
        rank, world = accelerator.process_index, accelerator.num_processes
        for batch in eval_loader(data.plain, batch_size, num_workers, rank, world):
            batch = to_device(batch, accelerator.device)
            real = batch["weight"] > 0
            yield method.model.features(batch["image"])[real], batch["label"][real]

    def total(tensor: Tensor) -> Tensor:
        return accelerator.reduce(tensor, "sum")

    method.eval()
    method.prepare(HeadContext(data.info.class_names, accelerator.device, features, total))
