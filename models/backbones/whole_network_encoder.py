"""The encoder for every network that is no plain ViT: it runs as its library wrote it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import Encoder, named_tensors
from tailtune.models.backbones.recomputation import RunPart

BLOCK_LISTS = ("blocks", "stages", "layers", "resblocks")
"""Children of a network that hold its blocks or stages one by one."""
RESNET_STAGES = ("layer1", "layer2", "layer3", "layer4")
"""Children of a residual network that are its stages."""
WRAPPED = {"trunk", "transformer"}
"""Children of open_clip's image encoders within which these are found."""


class WholeNetworkEncoder(Encoder):
    """A network that runs as a whole; tuners choose among its weights or act on its feature.

    Its batch norms train (`bn_tuning`) on all images that a process holds at once. These include images of weight 0:
    unreadable ones, and the padding of processes that have no images left.

    Args:
        net: network without its classifier, normalised images [B, 3, H, W] → features [B, feature_dim].
        feature_dim: width D of the features.
    """

    def __init__(self, net: Any, feature_dim: int) -> None:
        super().__init__(net.to(memory_format=torch.channels_last))  # convolutions are fastest in this layout
        self.feature_dim = feature_dim
        self.blocks = blocks_of(net)  # a plain list: these modules are registered below `net`
        self.compute_dtype = torch.float32

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and the features. In lower precision autocast rounds; the weights stay in fp32."""
        return torch.float64 if self.compute_dtype == torch.float64 else torch.float32

    def tunable_modules(self, partial: int | Sequence[int] | None) -> list[nn.Module]:
        """Without `partial` the whole network, stem and pooling included, as in LIFT; else these blocks."""
        return [self.net] if partial is None else super().tunable_modules(partial)

    def insert(self, tuner: str, module: nn.Module) -> None:
        """Put a tuner's module on the feature.

        Args:
            tuner: name of the tuner; the module is stored as `tuners.<tuner>`, and checkpoints use this name.
            module: called as `features = module(features, features)`.
        """
        self.tuners[tuner] = module

    def compute_parts_by(self, run_part: RunPart) -> None:
        super().compute_parts_by(run_part)
        for part in parts_of(self.blocks):
            # The network calls its parts itself. An attribute of the instance, unlike a module around it, keeps names.
            part.forward = partial(self._run_part, part)

    def _run_part(self, part: nn.Module, *inputs: Any, **options: Any) -> Any:
        """The forward of a part."""
        run = partial(type(part).forward, part, **options)
        return run(*inputs) if self.run_part is None else self.run_part(run, [part], *inputs)

    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, feature_dim] in `dtype`."""
        features = self.run(self.net, self.as_network_input(images)).to(self.dtype)
        for module in self.tuners.values():
            features = module(features, features)
        return features

    def as_network_input(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in the dtype and memory layout of the network."""
        return images.to(self.dtype, memory_format=torch.channels_last)

    def run(self, module: nn.Module, inputs: Tensor) -> Tensor:
        """Run the network, or a part of it, in the arithmetic of `set_precision`.

        Args:
            module: the network or a part of it.
            inputs: its input.

        Returns:
            Its output, in the dtype that autocast gives it.

        Raises:
            UserError: `bn_tuning` on a single value per channel, which has no deviation.
        """
        # Trained parameters have their own dtype (fp16 with prec fp16), and layers of other libraries never cast.
        cast = {
            name: tensor.to(self.dtype)
            for name, tensor in named_tensors(module)
            if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and tensor.dtype != self.dtype
        }
        low_precision = self.compute_dtype.itemsize < 4
        try:
            with torch.autocast(inputs.device.type, self.compute_dtype) if low_precision else nullcontext():
                return functional_call(module, cast, inputs, tie_weights=False) if cast else module(inputs)
        except ValueError as error:
            if self.trained_batch_norms and "more than 1 value per channel" in str(error):
                raise UserError(
                    "bn_tuning cannot normalise one image on maps of one pixel; choose a larger resolution or "
                    "micro_batch_size, or a batch_size that leaves more images in the last batch of an epoch"
                ) from error
            raise

    @torch.no_grad()
    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Set the arithmetic: fp32 and fp64 cast frozen weights and buffers; in lower precision autocast decides.

        Weights are never stored in a narrower dtype than they were loaded in, so a later call with fp32 gets them
        back exactly. The model builder refuses `residual` for these networks.
        """
        self.compute_dtype = compute
        frozen = [parameter for parameter in self.net.parameters() if not parameter.requires_grad]
        for tensor in [*frozen, *self.net.buffers()]:
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(self.dtype)


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The stages of a residual network, or the blocks or stages that a network keeps in a list; may be empty."""
    children = dict(net.named_children())
    for name in WRAPPED & children.keys():
        return blocks_of(children[name])
    stages = [children[name] for name in RESNET_STAGES if name in children]
    return next((list(children[name].children()) for name in BLOCK_LISTS if name in children), stages)


def parts_of(modules: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The modules, and in place of one that consists of blocks, such as a stage, these blocks."""
    for module in modules:
        inner = module.children() if type(module) in (nn.Sequential, nn.ModuleList) else blocks_of(module)
        yield from parts_of(inner) if inner else [module]
