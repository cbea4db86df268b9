"""What every image encoder is to the rest: a pre-trained network that stays as it is, and places where tuners act."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError


class Encoder(nn.Module):
    """Base of the image encoders: normalised images [B, 3, H, W] → features [B, feature_dim].

    Where experts have parts of the network for themselves (`experts` > 1) the features are [B, E, feature_dim]: what
    all share is the `trunk`, what follows is a `branch` for each.

    Attributes:
        net: the pre-trained network; frozen but for what a tuner selects.
        tuners: the modules that tuners have inserted.
        parts: what `partial` counts: blocks of a transformer, stages of a residual network; may be empty.
        experts: how many branches there are.
        still: what was tuned is held as it is, batch norms included (a later stage trains something else).
        shifts: while it is, the tuned batch norms go on gathering statistics, and train with those of their images.
    """

    net: Any
    feature_dim: int
    parts: Sequence[nn.Module]

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval()
        self.tuners = nn.ModuleDict()
        self.batch_norms: list[nn.Module] = []
        """Those that train, on the statistics of what is in memory at once."""
        self.adapted: list[Any] = []
        """Layers of the network that peft has wrapped."""
        self.experts = 1
        self.still = self.shifts = False
        self.held: frozenset[str] = frozenset()
        """What was tuned and is held; it keeps its dtype, as what trains."""
        self.noisy = False
        """What trains draws random numbers in every forward."""
        self._came_with = [(module, name) for module in net.modules() for name in module._buffers]
        self.requires_grad_(False)

    @property
    def depth(self) -> int:
        return len(self.parts)

    @property
    def batch_coupled(self) -> bool:
        """Whether training depends on which images are in memory at once."""
        return bool(self.batch_norms) and (self.shifts or not self.still) or self.noisy and not self.still

    @property
    def divided(self) -> list[nn.Module]:
        """Parts in which each expert has tuners of its own, around weights that all share."""
        return []

    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → what all experts share; the whole feature where they share all."""
        raise NotImplementedError

    def branch(self, shared: Tensor, expert: int) -> Tensor:
        """What the trunk gave, of some images → features [B, feature_dim] of one expert."""
        return shared

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, feature_dim], or [B, E, feature_dim] of several experts."""
        shared = self.trunk(images)
        if self.experts == 1:
            return self.branch(shared, 0)
        return torch.stack([self.branch(shared, expert) for expert in range(self.experts)], dim=1)

    def train(self, mode: bool = True) -> "Encoder":
        """The backbone stays as it was pre-trained; only tuners, and tuned batch norms, have a training mode."""
        super().train(mode)
        self.net.eval()
        for norm in self.batch_norms:
            norm.train(mode and (self.shifts or not self.still))
        for layer in self.adapted:
            layer.train(mode and not self.still)
        return self

    def hold(self) -> None:
        """What is tuned stays as it is from now on, batch norms included; called while it still asks for gradients."""
        self.held = self.held | {name for name, each in self.named_parameters() if each.requires_grad}
        self.still = True

    def block_range(self, partial: int | Sequence[int] | None) -> range:
        """Indices of the parts that `partial` means: none: all; k: the last k; [start, end): those.

        Raises:
            UserError: the backbone has no parts, or not so many.
        """
        depth = self.depth
        start, end = (
            (0, depth) if partial is None else (depth - partial, depth) if isinstance(partial, int) else partial
        )
        if partial is not None and not depth:
            raise UserError(f"partial {partial}: this backbone has no blocks to count; leave it out")
        if start < 0 or end > depth:
            raise UserError(f"partial {partial} asks for more blocks than the {depth} of this backbone")
        return range(start, end)

    def tunable_modules(self, partial: int | Sequence[int] | None) -> list[nn.Module]:
        """The modules whose own weights tuners such as full_tuning may train."""
        return [self.parts[index] for index in self.block_range(partial)]

    def frozen_buffers(self) -> list[Tensor]:
        """Buffers that came with the network and that training leaves alone: all but those of trained batch norms."""
        trained = {id(norm) for norm in self.batch_norms}
        found = [module._buffers.get(name) for module, name in self._came_with if id(module) not in trained]
        return [each for each in found if each is not None]

    def pretrained_state(self) -> dict[str, Tensor]:
        """The pre-trained network under its own names, whatever has been put into or around its layers.

        Layers that peft has wrapped keep their weights below `base_layer`; what it adds stands below `default`.
        """
        state = self.net.state_dict()
        return {
            name.replace(".base_layer.", "."): each for name, each in state.items() if "default" not in name.split(".")
        }

    @contextmanager
    def untuned(self) -> Iterator[None]:
        """Features of the pre-trained network alone: prompts, and scales that begin at random, change them."""
        hooks = [
            module.register_forward_hook(lambda _, given, __: given[0])  # a tuner's module is called as (y, x) → y
            for module in _leaves(self.tuners)
        ]
        trains = {each: each.requires_grad for each in self.parameters()}
        for layer in self.adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self.adapted:
                layer.enable_adapters(True)  # which asks for gradients, also of what a later stage holds
            for each, asks in trains.items():
                each.requires_grad_(asks)

    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Arithmetic of what is frozen. What trains keeps its dtype and is cast where it is used."""
        raise NotImplementedError


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """Those that train, of every encoder in a module."""
    return [norm for host in module.modules() if isinstance(host, Encoder) for norm in host.batch_norms]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers at each place where one stands, also a place of the same tensor, but not of a module."""
    for prefix, each in module.named_modules():
        for name, tensor in (*each._parameters.items(), *each._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor


def _leaves(modules: nn.ModuleDict) -> Iterator[nn.Module]:
    """What stands in dicts of modules, nested or not."""
    for each in modules.children():
        yield from _leaves(each) if isinstance(each, nn.ModuleDict) else [each]
