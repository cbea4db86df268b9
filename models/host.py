"""What every image encoder is to the rest: a pre-trained network that stays as it is, and places where tuners act."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError


class Host(nn.Module):
    """Base of the image encoders: normalised images [B, 3, H, W] → features [B, feature_dim].

    Attributes:
        net: the pre-trained network; frozen but for what a tuner selects.
        tuners: the modules that tuners have inserted.
        parts: what `partial` counts: blocks of a transformer, stages of a residual network; may be empty.
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
        self.requires_grad_(False)

    @property
    def depth(self) -> int:
        return len(self.parts)

    @property
    def batch_coupled(self) -> bool:
        """Whether features of an image depend on the others in the batch."""
        return bool(self.batch_norms)

    def train(self, mode: bool = True) -> "Host":
        """The backbone stays as it was pre-trained; only tuners, and tuned batch norms, have a training mode."""
        super().train(mode)
        self.net.eval()
        for norm in self.batch_norms:
            norm.train(mode)
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

    def base_state(self) -> dict[str, Tensor]:
        """The pre-trained network under its own names, whatever has been put into or around its layers.

        Layers that peft has wrapped keep their weights below `base_layer`; what it adds stands below `default`.
        """
        state = self.net.state_dict()
        return {
            name.replace(".base_layer.", "."): each for name, each in state.items() if "default" not in name.split(".")
        }

    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Arithmetic of what is frozen. What trains keeps its dtype and is cast where it is used."""
        raise NotImplementedError
