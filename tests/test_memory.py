"""Every shipped config trains on one GPU of 20 GB, with the `micro_batch_size` that it names.

What training keeps is counted on the meta device, without a GPU: a micro-batch's tensors for the backward pass, and
four bytes for each weight, and again for its gradient and momentum where it trains. 16 GiB of that leave the rest to
the buffers of single layers, CUDA itself and what the allocator wastes.
"""

from functools import cache
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from configs import load_configs, names
from datasets import build_info
from models import build_model, resolve
from models.plain import Plain
from trainers.checkpoint import trained_state
from trainers.methods import Earlier, Method, build_method, declared
from trainers.optim import PRECISIONS, RESIDUAL, cast_trainable, micro_batch_size

LIMIT = 16 * 2**30
SIZES = (2, 4)
"""Images of the two steps whose difference is what an image adds."""


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps: unique storages, weights and buffers left out."""

    def __init__(self, module: nn.Module) -> None:
        known = {_storage(each) for each in [*module.parameters(), *module.buffers()]}
        self.kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in known:
                self.kept[_storage(tensor)] = tensor.untyped_storage()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(each.nbytes() for each in self.kept.values())


def _storage(tensor: Tensor) -> int:
    """What tells storages apart where there are no addresses."""
    return int(tensor.untyped_storage()._cdata)


def built(cfg: CfgNode, earlier: Method | None) -> Method:
    """The method as it trains on a GPU, on the meta device, and the model that it learns from."""
    info = build_info(cfg)
    with torch.device("meta"):
        model = build_model(cfg, info.class_names, pixels=(info.mean, info.std))
        method = build_method(cfg, model, info).to("meta")
        if earlier is not None:
            method.after(Earlier(False, lambda: trained_state(earlier), lambda: earlier))
        # There is no autocast on this device: what would run in it is counted in fp32, which is more.
        precision = PRECISIONS["fp32" if isinstance(model.encoder, Plain) else cfg.prec]
        with mock.patch("torch.Tensor.cpu", lambda tensor: tensor):  # the full-precision copy that stays aside
            model.set_precision(precision.compute, RESIDUAL[cfg.residual_dtype])
        cast_trainable(method, precision.trainable)
    return method.train()


def saved(method: Method, cfg: CfgNode, count: int) -> int:
    """Bytes that a step of so many images keeps for its backward pass."""
    with torch.device("meta"):
        batch: dict[str, Any] = {
            "image": torch.empty(count, 3, cfg.resolution, cfg.resolution, dtype=torch.uint8),
            "label": torch.empty(count, dtype=torch.int64),
            "index": torch.empty(count, dtype=torch.int64),
            "weight": torch.empty(count),
        }
        keeps = SavedBytes(method)
        with keeps:
            step = method(batch)
        assert step.loss_sum.requires_grad
    return keeps.total


def measure(data: str, model: str, *pairs: str) -> tuple[int, int, int]:
    method = None
    for stage in load_configs(data, model, list(pairs), declared()):
        cfg = resolve(stage)
        earlier, method = method, built(cfg, method)
    assert method is not None
    frozen = sum(each.numel() * each.element_size() for each in method.parameters() if not each.requires_grad)
    trains = sum(each.numel() for each in method.parameters() if each.requires_grad)
    if not trains:
        return 0, frozen, 0
    few, many = (saved(method, cfg, count) for count in SIZES)
    per_image = (many - few) // (SIZES[1] - SIZES[0])
    return per_image, frozen + 12 * trains, micro_batch_size(cfg, 1)
