"""The base of every image encoder: a frozen pre-trained network, and the places where tuners act on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError


class Encoder(nn.Module):
    """Base of the image encoders: normalised images [B, 3, H, W] → features [B, feature_dim].

    Several experts (`experts` > 1) may have parts of the network for themselves. Then the features are
    [B, E, feature_dim]: `trunk` computes what all experts share, and `branch` the rest, for one expert at a time.

    Checkpoints name their tensors after the attributes `net` and `tuners` and the names within, so these names are
    part of the file format.

    Args:
        net: the pre-trained network without its classifier. It is frozen and put into eval mode.

    Attributes:
        net: the pre-trained network; only what a tuner selects of it trains.
        tuners: the modules that tuners have inserted, by the tuner's name.
        blocks: what the option `partial` counts: blocks of a transformer or stages of a residual network; it may be
            empty.
        feature_dim: width D of the features.
        experts: the number of branches E.
        batch_norms: batch norms that train, on the statistics of the images that are in memory at once.
        adapted: layers of the network that peft has wrapped.
        still: whether everything that was tuned stays as it is, because a later stage trains something else.
        shifts: only matters while `still`: the tuned batch norms normalise with the statistics of their batch and go
            on updating the running ones.
        held: names of the parameters that an earlier stage trained and that stay as they are. They keep their dtype,
            as parameters that train do.
        noisy: whether a trained module draws random numbers in every forward (dropout).
    """

    net: Any
    feature_dim: int
    blocks: Sequence[nn.Module]

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval()
        self.tuners = nn.ModuleDict()
        self.batch_norms: list[nn.Module] = []
        self.adapted: list[Any] = []
        self.experts = 1
        self.still = self.shifts = False
        self.held: frozenset[str] = frozenset()
        self.noisy = False
        self._pretrained_buffers = [(module, name) for module in net.modules() for name in module._buffers]
        self.requires_grad_(False)

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def batch_coupled(self) -> bool:
        """Whether training depends on which images are in memory at once."""
        return bool(self.batch_norms) and (self.shifts or not self.still) or self.noisy and not self.still

    @property
    def expert_blocks(self) -> list[nn.Module]:
        """The blocks in which each expert has tuners of its own, around weights that all experts share."""
        return []

    def trunk(self, images: Tensor) -> Tensor:
        """Compute what all experts share.

        Args:
            images: normalised images [B, 3, H, W].

        Returns:
            The input of `branch`; features [B, feature_dim] where experts share the whole network.
        """
        raise NotImplementedError

    def branch(self, shared: Tensor, expert: int) -> Tensor:
        """Compute the features of one expert.

        Args:
            shared: output of `trunk`, or the rows of it that belong to some of the images.
            expert: index of the expert.

        Returns:
            Features [B, feature_dim].
        """
        return shared

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, feature_dim], or [B, E, feature_dim] of several experts."""
        shared = self.trunk(images)
        if self.experts == 1:
            return self.branch(shared, 0)
        return torch.stack([self.branch(shared, expert) for expert in range(self.experts)], dim=1)

    def train(self, mode: bool = True) -> "Encoder":
        """Set the mode of the tuners and of tuned batch norms; the rest of the network stays in eval mode."""
        super().train(mode)
        self.net.eval()
        for norm in self.batch_norms:
            norm.train(mode and (self.shifts or not self.still))
        for layer in self.adapted:
            layer.train(mode and not self.still)
        return self

    def hold(self) -> None:
        """From now on everything that was tuned stays as it is, batch norms included.

        Call it while the tuned parameters still require gradients: that is how they are found.
        """
        self.held = self.held | {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self.still = True

    def block_range(self, partial: int | Sequence[int] | None) -> range:
        """Indices of the blocks that the option `partial` means.

        Args:
            partial: None: all blocks; k: the last k; [start, end): those from start to before end.

        Raises:
            UserError: the backbone has no blocks, or fewer than asked for.
        """
        depth = self.depth
        start, end = (
            (0, depth) if partial is None else (depth - partial, depth) if isinstance(partial, int) else partial
        )
        if partial is not None and not depth:
            raise UserError(f"partial {partial}: this backbone has no blocks to count; leave partial out")
        if start < 0 or end > depth:
            raise UserError(f"partial {partial}: this backbone has only {depth} blocks; choose a smaller range")
        return range(start, end)

    def tunable_modules(self, partial: int | Sequence[int] | None) -> list[nn.Module]:
        """The modules whose own weights tuners such as full_tuning may train: the blocks of `partial`."""
        return [self.blocks[index] for index in self.block_range(partial)]

    def frozen_buffers(self) -> list[Tensor]:
        """Buffers of the pre-trained network that training never changes: all but those of trained batch norms."""
        trained = {id(norm) for norm in self.batch_norms}
        buffers = [module._buffers.get(name) for module, name in self._pretrained_buffers if id(module) not in trained]
        return [buffer for buffer in buffers if buffer is not None]

    def pretrained_state(self) -> dict[str, Tensor]:
        """State dict of the pre-trained network under its original names, without what tuners have added to it."""
        state = self.net.state_dict()
        # peft moves a wrapped layer's weights below `base_layer`, and puts its own below `default`.
        return {
            name.replace(".base_layer.", "."): tensor
            for name, tensor in state.items()
            if "default" not in name.split(".")
        }

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Within this block the encoder computes the features of the pre-trained network alone.

        Prompts, and scales that start at random values, would change the features even before training.
        """
        hooks = [
            # A tuner's module is called as module(y, x); the hook returns y, the output without that tuner.
            module.register_forward_hook(lambda _, inputs, __: inputs[0])
            for module in _innermost_modules(self.tuners)
        ]
        requires_grad = {parameter: parameter.requires_grad for parameter in self.parameters()}
        for layer in self.adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self.adapted:
                layer.enable_adapters(True)  # this makes even held parameters require gradients
            for parameter, required in requires_grad.items():
                parameter.requires_grad_(required)

    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Set the arithmetic of frozen weights. Trained parameters keep their dtype and are cast where they are used.

        Args:
            compute: dtype in which the network computes.
            residual: dtype of a ViT's residual stream; None: `compute`.
        """
        raise NotImplementedError


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms that train, of every encoder within a module."""
    return [norm for encoder in module.modules() if isinstance(encoder, Encoder) for norm in encoder.batch_norms]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all parameters and buffers.

    A tensor that several modules share comes once for each of them; a module that stands at two places comes once.
    """
    for prefix, submodule in module.named_modules():
        for name, tensor in (*submodule._parameters.items(), *submodule._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor


def _innermost_modules(modules: nn.ModuleDict) -> Iterator[nn.Module]:
    """The modules within nested ModuleDicts."""
    for child in modules.children():
        yield from _innermost_modules(child) if isinstance(child, nn.ModuleDict) else [child]
