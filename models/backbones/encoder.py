"""The base of every image encoder: a frozen pre-trained network, and the places where tuners act on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.recomputation import RunPart
from tailtune.models.backbones.staged_module import StagedModule


class Encoder(StagedModule):
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
        tuned_blocks: tuner → indices of the blocks that it acts on.
        tuners_draw: whether tuners draw random numbers while they train, as dropout does.
        prompted_by_texts: whether parts of the text tower act in it, which train.
        projection: weight [d, D] that the encoder applies to its feature in the end; None if there is none.
        run_part: how the encoder runs one block after another, such as `computed_again`; None: it just calls them.
    """

    net: Any
    feature_dim: int
    blocks: Sequence[nn.Module]

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.eval()
        self.tuners = nn.ModuleDict()
        self.tuned_blocks: dict[str, Sequence[int]] = {}
        self.experts = 1
        self.projection: nn.Parameter | None = None
        self.run_part: RunPart | None = None
        self._trained_batch_norms: list[nn.Module] = []
        self._peft_layers: list[Any] = []
        self.tuners_draw = self.prompted_by_texts = False
        self._peft_draws = self._is_frozen = self._batch_norms_follow = False
        self._pretrained_buffers = [(module, name) for module in net.modules() for name in module._buffers]
        self.requires_grad_(False)

    @property
    def width(self) -> int:
        """Width D of the transformer; of another network, that of its feature."""
        return self.feature_dim

    @property
    def depth(self) -> int:
        """How many blocks there are."""
        return len(self.blocks)

    @property
    def batch_coupled(self) -> bool:
        """Whether training depends on which images are in memory at once."""
        return self._batch_norms_train or self._draws

    @property
    def is_constant(self) -> bool:
        """Whether the features of an image stay the same while a run trains."""
        changes = self._batch_norms_train or self._draws or self.prompted_by_texts
        return not changes and not any(parameter.requires_grad for parameter in self.parameters())

    @property
    def is_frozen(self) -> bool:
        """Whether `freeze_trained` was called, because a later run trains something else than the encoder."""
        return self._is_frozen

    @property
    def trained_batch_norms(self) -> Sequence[nn.Module]:
        """The batch norms that a tuner trains; they normalise by the images that a process holds at once."""
        return self._trained_batch_norms

    def set_trained_batch_norms(self, norms: Sequence[nn.Module]) -> None:
        """Set which batch norms of the network train, so that their statistics follow the training images."""
        self._trained_batch_norms = list(norms)

    @property
    def peft_layers(self) -> Sequence[Any]:
        """The layers of the network that the peft library has wrapped."""
        return self._peft_layers

    def wrap_with_peft(self, layers: Sequence[Any], draws: bool) -> None:
        """Set which layers the peft library has wrapped.

        Args:
            layers: peft's wrappers, each around one layer of the network.
            draws: whether they draw random numbers while they train, as dropout does.
        """
        self._peft_layers, self._peft_draws = list(layers), draws

    def freeze_trained(self, batch_norms_follow: bool = False) -> None:
        """From now on leave everything that the tuners have trained as it is. They stay in eval mode, without dropout.

        Call it while the trained parameters still require gradients: that is how they are found. The caller then
        stops their gradients.

        Args:
            batch_norms_follow: whether the trained batch norms still normalise by the images in memory and update
                their running statistics, although their weights stay.
        """
        self.frozen_trained |= {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        self._is_frozen, self._batch_norms_follow = True, batch_norms_follow

    @property
    def _draws(self) -> bool:
        """Whether tuners draw random numbers while a run trains."""
        return (self._peft_draws or self.tuners_draw) and not self._is_frozen

    @property
    def _batch_norms_train(self) -> bool:
        """Whether there are batch norms that normalise by the images in memory while a run trains."""
        return bool(self._trained_batch_norms) and (self._batch_norms_follow or not self._is_frozen)

    def compute_parts_by(self, run_part: RunPart) -> None:
        """Let a function run every block, such as `computed_again`.

        Raises:
            UserError: the backbone has no blocks.
        """
        if not self.depth:
            raise UserError("grad_checkpoint: this backbone has no blocks to compute again; leave it out")
        self.run_part = run_part

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
        """Set the mode of what trains: tuners and tuned batch norms. The rest of the network stays in eval mode."""
        super().train(mode)
        self.net.eval()
        self.tuners.train(mode and not self._is_frozen)
        for norm in self._trained_batch_norms:
            norm.train(mode and self._batch_norms_train)
        for layer in self._peft_layers:
            layer.train(mode and not self._is_frozen)
        return self

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

    def listed_blocks(self, layers: int | Sequence[int]) -> list[int]:
        """Indices of the blocks that an option `<tuner>_layers` means.

        Args:
            layers: k: the last k; indices: these, where −1 is the last block.

        Raises:
            UserError: the backbone does not have all of them.
        """
        depth = self.depth
        indices = range(depth - layers, depth) if isinstance(layers, int) else layers
        found = [index if isinstance(layers, int) or index >= 0 else index + depth for index in indices]
        if any(not 0 <= index < depth for index in found):
            raise UserError(
                f"layers {layers}: this backbone has only {depth} blocks, 0 to {depth - 1}; choose among them"
            )
        if len(set(found)) < len(found):
            raise UserError(f"layers {layers}: a block is there twice; this backbone has {depth} blocks")
        return found

    def tunable_modules(self, partial: int | Sequence[int] | None) -> list[nn.Module]:
        """The modules whose own weights tuners such as full_tuning may train: the blocks of `partial`."""
        return [self.blocks[index] for index in self.block_range(partial)]

    def frozen_buffers(self) -> list[Tensor]:
        """Buffers of the pre-trained network that training never changes: all but those of trained batch norms."""
        trained = {id(norm) for norm in self._trained_batch_norms}
        buffers = [module._buffers.get(name) for module, name in self._pretrained_buffers if id(module) not in trained]
        return [buffer for buffer in buffers if buffer is not None]

    def pretrained_state(self) -> dict[str, Tensor]:
        """State dict of the pre-trained network under its original names, without what tuners have added to it."""
        # peft moves a wrapped layer's weights below `base_layer`, and puts its own below `default`.
        kept = ((name, each) for name, each in self.net.state_dict().items() if "default" not in name.split("."))
        return {name.replace(".base_layer.", "."): each for name, each in kept}

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
        for layer in self._peft_layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer in self._peft_layers:
                layer.enable_adapters(True)  # this also makes parameters that an earlier run trained require gradients
            for parameter, required in requires_grad.items():
                parameter.requires_grad_(required)

    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Set the arithmetic of frozen weights. Trained parameters keep their dtype and are cast where they are used.

        Args:
            compute: dtype in which the network computes.
            residual: dtype of a ViT's residual stream; None: `compute`.
        """
        raise NotImplementedError


def trained_batch_norms(module: nn.Module) -> list[nn.Module]:
    """The batch norms that train, of every encoder within a module."""
    encoders = (submodule for submodule in module.modules() if isinstance(submodule, Encoder))
    return [norm for encoder in encoders for norm in encoder.trained_batch_norms]


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
