"""Arithmetic of training and evaluation: the entries of `prec` and `test_prec`."""

from typing import NamedTuple

import torch
from torch import nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import Encoder


class Precision(NamedTuple):
    """An entry of PRECISIONS."""

    compute: torch.dtype
    """Dtype of the frozen encoder and of the activations."""
    trainable: torch.dtype
    """Dtype of the parameters that train."""
    scaled: bool
    """Whether the loss is scaled dynamically, so that small gradients do not vanish in fp16."""


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32, False),
    "bf16": Precision(torch.bfloat16, torch.float32, False),
    "amp": Precision(torch.float16, torch.float32, True),
    "fp16": Precision(torch.float16, torch.float16, False),
    "fp64": Precision(torch.float64, torch.float64, False),
}
"""Value of `prec` and `test_prec` → arithmetic."""
RESIDUAL = {None: None, "fp32": torch.float32}
"""Value of `residual_dtype` → dtype of a ViT's residual stream; None: the dtype in which it computes."""


def precision_used(prec: str, cuda: bool) -> str:
    """The value of `prec` that is used: fp32 instead of half precision without a GPU.

    Args:
        prec: the option.
        cuda: whether there is a GPU.
    """
    return "fp32" if prec in ("amp", "fp16") and not cuda else prec


def check_frozen(module: nn.Module) -> None:
    """Check that all frozen weights are finite. If not, the loaded weights are faulty, since no step changes them.

    Raises:
        UserError: names the first weight that is not.
    """
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad and not parameter.isfinite().all():
            raise UserError(f"the weights that `pretrained` names are not finite ({name}); get them again")


def cast_trainable(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters that train, and the buffers with which peft multiplies them.

    Args:
        module: a method.
        dtype: `Precision.trainable`.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    encoders = (submodule for submodule in module.modules() if isinstance(submodule, Encoder))
    peft_layers = (layer for encoder in encoders for layer in encoder.peft_layers)
    buffers = [buffer for layer in peft_layers for buffer in layer.buffers() if buffer.is_floating_point()]
    for tensor in trained + buffers:
        tensor.data = tensor.data.to(dtype)
