"""What every image encoder is to the rest: a pre-trained network that stays as it is, and places where tuners act."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError


class StagedModule(nn.Module):
    """A module that several runs may train one after the other, each of them a part of it.

    Attributes:
        frozen_trained: names of the parameters that an earlier run trained and that this run leaves as they are. A
            checkpoint holds them as it holds what trains, and they keep their dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen_trained: set[str] = set()


class Encoder(StagedModule):
    """Base of the image encoders: normalised images [B, 3, H, W] → features [B, feature_dim].

    Where experts have parts of the network for themselves (`experts` > 1) the features are [B, E, feature_dim]: what
    all share is the `trunk`, what follows is a `branch` for each.

    Attributes:
        net: the pre-trained network; frozen but for what a tuner selects.
        tuners: the modules that tuners have inserted.
        parts: what `partial` counts: blocks of a transformer, stages of a residual network; may be empty.
        experts: how many branches there are.
        projection: weight [d, D] that the encoder applies to its feature in the end; None: none.
    """

    net: Any
    feature_dim: int
    parts: Sequence[nn.Module]

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval()
        self.tuners = nn.ModuleDict()
        self.experts = 1
        self.projection: nn.Parameter | None = None
        self._trained_batch_norms: list[nn.Module] = []
        self._peft_layers: list[Any] = []
        self._peft_draws = self._is_frozen = self._batch_norms_follow = False
        self._came_with = [(module, name) for module in net.modules() for name in module._buffers]
        self.requires_grad_(False)

    @property
    def depth(self) -> int:
        return len(self.parts)

    @property
    def batch_coupled(self) -> bool:
        """Whether training depends on which images are in memory at once."""
        return bool(self._trained_batch_norms) and self._batch_norms_train or self._peft_draws and not self._is_frozen

    @property
    def is_frozen(self) -> bool:
        """Whether `freeze_trained` was called: a later run trains something else than the encoder."""
        return self._is_frozen

    @property
    def trained_batch_norms(self) -> Sequence[nn.Module]:
        """The batch norms that a tuner trains; they normalise by the images that a process holds at once."""
        return self._trained_batch_norms

    def set_trained_batch_norms(self, norms: Sequence[nn.Module]) -> None:
        """Say which batch norms of the network train: their statistics follow the training images."""
        self._trained_batch_norms = list(norms)

    @property
    def peft_layers(self) -> Sequence[Any]:
        """The layers of the network that the peft library has wrapped."""
        return self._peft_layers

    def wrap_with_peft(self, layers: Sequence[Any], draws: bool) -> None:
        """Say what the peft library has done to the network.

        Args:
            layers: its wrappers, each around one layer.
            draws: they draw random numbers in every training forward, such as dropout.
        """
        self._peft_layers, self._peft_draws = list(layers), draws

    def freeze_trained(self, batch_norms_follow: bool = False) -> None:
        """Leave what the tuners have trained as it is from now on; called while it still requires gradients.

        Who calls it stops the gradients.

        Args:
            batch_norms_follow: the trained batch norms still normalise by the images in memory, and their running
                statistics follow those images, although their weights stay.
        """
        self.frozen_trained |= {name for name, each in self.named_parameters() if each.requires_grad}
        self._is_frozen, self._batch_norms_follow = True, batch_norms_follow

    @property
    def _batch_norms_train(self) -> bool:
        return self._batch_norms_follow or not self._is_frozen

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
        for norm in self._trained_batch_norms:
            norm.train(mode and self._batch_norms_train)
        for layer in self._peft_layers:
            layer.train(mode and not self._is_frozen)
        return self

    def chosen(self, partial: int | Sequence[int] | None) -> range:
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

    def selectable(self, partial: int | Sequence[int] | None) -> list[nn.Module]:
        """The modules whose own weights tuners such as full_tuning may train."""
        return [self.parts[index] for index in self.chosen(partial)]

    def untouched(self) -> list[Tensor]:
        """Buffers that came with the network and that training leaves alone: all but those of trained batch norms."""
        trained = {id(norm) for norm in self._trained_batch_norms}
        found = [module._buffers.get(name) for module, name in self._came_with if id(module) not in trained]
        return [each for each in found if each is not None]

    def base_state(self) -> dict[str, Tensor]:
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
        for layer in self._peft_layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self._peft_layers:
                layer.enable_adapters(True)  # which asks for gradients, also of what a later stage holds
            for each, asks in trains.items():
                each.requires_grad_(asks)

    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Arithmetic of what is frozen. What trains keeps its dtype and is cast where it is used."""
        raise NotImplementedError


def trained_batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms that train, of every encoder in a module."""
    return [norm for host in module.modules() if isinstance(host, Encoder) for norm in host.trained_batch_norms]


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers at each place where one stands, also a place of the same tensor, but not of a module."""
    for prefix, each in module.named_modules():
        for name, tensor in (*each._parameters.items(), *each._buffers.items()):
            if tensor is not None:
                yield f"{prefix}.{name}".lstrip("."), tensor


def _leaves(modules: nn.ModuleDict) -> Iterator[nn.Module]:
    """What stands in dicts of modules, nested or not."""
    for each in modules.children():
        yield from _leaves(each) if isinstance(each, nn.ModuleDict) else [each]
