"""The host of every network that is no ViT of ours: convnets, CLIP's residual networks, image towers as a whole."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import Encoder, tensors_of

LISTS = ("blocks", "stages", "layers", "resblocks")
"""Children that hold the blocks or stages of a network one by one."""
STAGES = ("layer1", "layer2", "layer3", "layer4")
WITHIN = {"trunk", "transformer"}
"""Children of open_clip's towers in which those are found."""


class GenericEncoder(Encoder):
    """A network that runs as its library wrote it; tuners choose among its weights or act on its feature.

    Its batch norms train (`bn_tuning`) on whatever a process holds at once. That includes images of weight 0, which
    are unreadable ones and the padding of ranks that have none left.

    Args:
        net: normalised images [B, 3, H, W] → features [B, feature_dim].
    """

    def __init__(self, net: Any, feature_dim: int) -> None:
        super().__init__(net.to(memory_format=torch.channels_last))  # which convolutions are fastest with
        self.feature_dim = feature_dim
        self.parts = parts_of(net)
        self.compute = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights and of the features. Below fp32 autocast rounds, not the weights."""
        return torch.float64 if self.compute == torch.float64 else torch.float32

    def selectable(self, partial: int | Sequence[int] | None) -> list[nn.Module]:
        """Without `partial` the whole network, stem and pooling included, as LIFT; else those parts."""
        return [self.net] if partial is None else super().selectable(partial)

    def insert(self, tuner: str, module: nn.Module) -> None:
        """Put a tuner's module on the feature, called `y = module(y, y)`; it is stored as `tuners.<tuner>`."""
        self.tuners[tuner] = module

    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, feature_dim] in `dtype`."""
        features = self.run(self.net, self.received(images)).to(self.dtype)
        for module in self.tuners.values():
            features = module(features, features)
        return features

    def received(self, images: Tensor) -> Tensor:
        return images.to(self.dtype, memory_format=torch.channels_last)

    def run(self, part: nn.Module, given: Tensor) -> Tensor:
        """The network, or a part of it, in the arithmetic of `set_precision`; the result has the dtype it got there."""
        # What trains has its own dtype (fp16 with prec fp16); layers of other libraries cast nothing themselves.
        cast = {
            name: each.to(self.dtype)
            for name, each in tensors_of(part)
            if isinstance(each, nn.Parameter) and each.is_floating_point() and each.dtype != self.dtype
        }
        low = self.compute.itemsize < 4
        try:
            with torch.autocast(given.device.type, self.compute) if low else nullcontext():
                return functional_call(part, cast, given, tie_weights=False) if cast else part(given)
        except ValueError as error:
            if self.trained_batch_norms and "more than 1 value per channel" in str(error):
                raise UserError(
                    "bn_tuning: one image alone on maps of one pixel has no deviation; choose a larger resolution or "
                    "micro_batch_size, or a batch_size that leaves more images in the last batch of an epoch"
                ) from error
            raise

    @torch.no_grad()
    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """fp32 and fp64 cast frozen weights and buffers; below that autocast decides for each kind of layer.

        Nothing is ever stored more narrowly than it was loaded, so fp32 after any other is exact. `residual` has no
        meaning here and is refused when a model is built.
        """
        self.compute = compute
        frozen = [each for each in self.net.parameters() if not each.requires_grad]
        for each in [*frozen, *self.net.buffers()]:
            if each.is_floating_point():
                each.data = each.data.to(self.dtype)


def parts_of(net: nn.Module) -> list[nn.Module]:
    """Stages of a residual network, or the blocks or stages that a network keeps in a list; may be empty."""
    children = dict(net.named_children())
    for name in WITHIN & children.keys():
        return parts_of(children[name])
    stages = [children[name] for name in STAGES if name in children]
    return next((list(children[name].children()) for name in LISTS if name in children), stages)
