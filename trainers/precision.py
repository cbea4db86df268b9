"""Arithmetic of training and evaluation: the entries of `prec` and `test_prec`."""

from typing import NamedTuple

import torch
from torch import nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import Encoder


class Precision(NamedTuple):
    compute: torch.dtype
    """Of the frozen encoder and the activations."""
    trainable: torch.dtype
    scaled: bool
    """With dynamic loss scaling."""


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, False),
    "bf16": Precision(torch.bfloat16, torch.float32, False),
    "amp": Precision(torch.float16, torch.float32, True),
    "fp16": Precision(torch.float16, torch.float16, False),
    "fp64": Precision(torch.float64, torch.float64, False),
}
RESIDUAL = {None: None, "fp32": torch.float32}


def precision_used(prec: str, cuda: bool) -> str:
    """`prec`, or fp32 where half precision needs a GPU."""
    return "fp32" if prec in ("amp", "fp16") and not cuda else prec


def check_frozen(module: nn.Module) -> None:
    """Raise a `UserError` for weights that are not finite and do not train: no step has made them so."""
    for name, each in module.named_parameters():
        if not each.requires_grad and not each.isfinite().all():
            raise UserError(f"the weights that `pretrained` names are not finite ({name}); get them again")


def cast_trainable(module: nn.Module, dtype: torch.dtype) -> None:
    """What trains into the dtype of its precision, and what peft multiplies it with."""
    trains = [each for each in module.parameters() if each.requires_grad]
    adapted = (layer for host in module.modules() if isinstance(host, Encoder) for layer in host.peft_layers)
    frozen = [each for layer in adapted for each in layer.buffers() if each.is_floating_point()]
    for each in trains + frozen:
        each.data = each.data.to(dtype)
