"""Options of tuners: their sizes, and LIFT's rules for sizes that nobody gives."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.seeding import derive_seed
from tailtune.configs.value_parsers import as_float, as_int, as_scale

PROMPTS = 10
"""Number of prompt tokens, as LIFT."""


@dataclass(frozen=True)
class TunerOptions:
    """A tuner without options, and the base of all others."""

    def filled(self, classes: int, depth: int, width: int) -> Self:
        """The options with a value in place of every None.

        Args:
            classes: number of classes.
            depth: number of blocks of the backbone.
            width: size of its feature.
        """
        return self

    def check(self) -> None:
        """Raise a `UserError` where filled options cannot be."""

    @property
    def draws(self) -> bool:
        """Whether the tuner draws random numbers in every training forward."""
        return False

    def of_expert(self, expert: int) -> Self:
        """The options of an expert's own copy of the tuner; `expert` counts from 1, after the first one."""
        return self


@dataclass(frozen=True)
class BottleneckOptions(TunerOptions):
    """Adapters and low-rank updates."""

    dim: int | None = option(
        None,
        "Bottleneck dimension of adapters, which is also the rank of LoRA. None means LIFT's rule, by which the tuner "
        "has fewer weights than the classifier.",
        as_int,
        key="adapter_dim",
        least=1,
        most=4096,
    )

    def filled(self, classes: int, depth: int, width: int) -> Self:
        return self if self.dim else replace(self, dim=bottleneck_dim(classes, depth))

    @property
    def bottleneck(self) -> int:
        """`dim`, once it is filled."""
        assert self.dim is not None
        return self.dim


@dataclass(frozen=True)
class AdaptFormerOptions(BottleneckOptions):
    """AdaptFormer."""

    scale: float | str = option(
        "learnable", "Factor on AdaptFormer's output: `learnable`, or a fixed number.", as_scale
    )


@dataclass(frozen=True)
class ClipLoraOptions(TunerOptions):
    """CLIP-LoRA, in the image encoder and in the text tower."""

    rank: int = option(2, "Rank of CLIP-LoRA, in both encoders.", least=1, most=4096)
    alpha: float = option(1.0, "CLIP-LoRA multiplies its updates with this number over the root of the rank.")
    dropout: float = option(
        0.25, "Share of the inputs of CLIP-LoRA's updates that are set to 0 in training.", least=0.0, most=0.99
    )

    @property
    def draws(self) -> bool:
        return self.dropout > 0


@dataclass(frozen=True)
class PromptOptions(TunerOptions):
    """Prompt tokens."""

    length: int | None = option(
        None,
        f"Number of prompt tokens that VPT puts before a block. None means {PROMPTS}.",
        as_int,
        key="vpt_len",
        least=1,
        most=1024,
    )

    def filled(self, classes: int, depth: int, width: int) -> Self:
        return self if self.length else replace(self, length=PROMPTS)


@dataclass(frozen=True)
class MaskOptions(TunerOptions):
    """A random subset of weights."""

    ratio: float | None = option(
        None,
        "Share of a layer's weights that the tuner `mask` trains. None means LIFT's rule, by which it trains about as "
        "many weights as the classifier has.",
        as_float,
        least=0.0,
        most=1.0,
    )
    seed: int | None = option(
        None, "Random seed of the weights that the tuner `mask` chooses. None means 0.", as_int, least=0, most=2**63 - 1
    )

    def filled(self, classes: int, depth: int, width: int) -> Self:
        ratio = mask_ratio(classes, depth, width) if self.ratio is None else self.ratio
        return replace(self, ratio=ratio, seed=self.seed or 0)

    def check(self) -> None:
        if self.ratio is None or not 0 < self.ratio <= 1:
            raise UserError(f"mask_ratio {self.ratio} is no share of the weights; choose one above 0 and up to 1")

    def of_expert(self, expert: int) -> Self:
        return replace(self, seed=derive_seed(self.seed or 0, "expert", expert))

    @cached_property
    def draw(self) -> torch.Generator:
        """The one generator of all masks of a network: it goes on from layer to layer and block to block, as LIFT's."""
        return torch.Generator().manual_seed(self.seed or 0)


def bottleneck_dim(num_classes: int, depth: int) -> int:
    """LIFT's rule for the LoRA rank and the width of adapters: r = 2^max(0, ⌊log2(C / 2L)⌋).

    Tuners then stay smaller than the head.

    Args:
        num_classes: number C of classes.
        depth: number L of blocks.
    """
    return 2 ** max(0, int(math.log2(num_classes / (2 * max(1, depth)))))


def mask_ratio(num_classes: int, depth: int, width: int) -> float:
    """LIFT's rule for the share of weights that `mask` trains: ρ = C / 12LD in whole thousandths, at least one.

    About as many parameters then train as the head has.

    Args:
        num_classes: number C of classes.
        depth: number L of blocks.
        width: width D of the transformer.
    """
    return max(1, 1000 * num_classes // (12 * max(1, depth) * width)) / 1000
