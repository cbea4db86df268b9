"""Options of tuners: where they act and their sizes, with the rules of LIFT and LIFT+ for what nobody gives."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import torch

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.seeding import derive_seed
from tailtune.configs.value_parsers import as_float, as_int, as_layers, as_names, as_scale, as_str
from tailtune.models.tuners.tuner_sizes import aft_ratio, bottleneck_dim, mask_ratio, power_of_two

ATTENTION = {"q": "q", "k": "k", "v": "v", "o": "proj"}
"""CLIP-LoRA's name of a matrix of the attention → site at its output."""
PROMPTS = 10
"""Number of prompt tokens, as LIFT."""
RULES = ("lift", "lift_plus")
"""Rules for the sizes and first weights that nobody gives."""


@dataclass(frozen=True)
class Case:
    """What the rules depend on."""

    classes: int
    """Number of classes."""
    depth: int
    """Number of blocks of the backbone."""
    selected: int
    """Number of blocks that the tuner acts on."""
    width: int
    """Width D of the transformer, see `Encoder.width`."""
    rules: str = "lift"
    """An entry of RULES."""

    @property
    def plus(self) -> bool:
        """Whether the rules of LIFT+ hold."""
        return self.rules == "lift_plus"

    @property
    def blocks(self) -> int:
        """Number of blocks by which sizes are divided: LIFT counts all of them, LIFT+ those that the tuner acts on."""
        return max(1, self.selected if self.plus else self.depth)


@dataclass(frozen=True)
class TunerOptions:
    """A tuner without options of its own, and the base of all others."""

    layers: int | list[int] | None = option(
        None,
        "Blocks that this tuner acts on, in place of those of `partial`: a number k for the last k, or indices such as "
        "[0,11] or range(3). None means those of `partial`.",
        as_layers,
        zero_shot=False,
    )

    def filled(self, case: Case) -> Self:
        """The options with a value in place of every None but that of `layers`."""
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
        "Bottleneck dimension of adapters, which is also the rank of LoRA. None means the rule of `tuner_rules`, by "
        "which the tuner has fewer weights than the classifier.",
        as_int,
        key="adapter_dim",
        least=1,
        most=4096,
    )

    def filled(self, case: Case) -> Self:
        return self if self.dim else replace(self, dim=bottleneck_dim(case.classes, case.blocks))

    @property
    def bottleneck(self) -> int:
        """`dim`, once it is filled."""
        assert self.dim is not None
        return self.dim


@dataclass(frozen=True)
class LoraOptions(BottleneckOptions):
    """Low-rank updates of query and value."""

    def filled(self, case: Case) -> Self:
        return super().filled(replace(case, selected=2 * case.selected) if case.plus else case)


@dataclass(frozen=True)
class AdapterOptions(BottleneckOptions):
    """Adapters."""

    init: str | None = option(
        None,
        "Distribution of an adapter's first weights W_down, both with deviation 1/√(3D). None means normal, and "
        "uniform with `tuner_rules lift_plus`.",
        as_str,
        key="adapter_init",
        choices=("normal", "uniform"),
    )

    def filled(self, case: Case) -> Self:
        return replace(super().filled(case), init=self.init or ("uniform" if case.plus else "normal"))


@dataclass(frozen=True)
class AdaptFormerOptions(AdapterOptions):
    """AdaptFormer."""

    scale: float | str = option(
        "learnable", "Factor on AdaptFormer's output: `learnable`, or a fixed number.", as_scale, held_with="encoder"
    )


@dataclass(frozen=True)
class ClipLoraOptions(TunerOptions):
    """CLIP-LoRA, in the image encoder and in the text tower."""

    rank: int = option(2, "Rank of CLIP-LoRA, in both encoders.", least=1, most=4096)
    alpha: float = option(
        1.0, "CLIP-LoRA multiplies its updates with this number over the root of the rank.", held_with="encoder"
    )
    dropout: float = option(
        0.25, "Share of the inputs of CLIP-LoRA's updates that are set to 0 in training.", least=0.0, most=0.99
    )
    params: list[str] = option(
        ["q", "k", "v"],
        "Matrices of the attention that CLIP-LoRA updates: q, k, v, and o for that of the output.",
        as_names,
    )

    @property
    def draws(self) -> bool:
        return self.dropout > 0

    @property
    def sites(self) -> list[str]:
        """The sites of `params`."""
        return [ATTENTION[name] for name in self.params]

    def check(self) -> None:
        if len(set(self.params)) < len(self.params) or not set(self.params) <= ATTENTION.keys():
            raise UserError(
                f"clip_lora_params [{','.join(self.params)}]: give each of {', '.join(ATTENTION)} at most once"
            )


@dataclass(frozen=True)
class PromptOptions(TunerOptions):
    """Prompt tokens."""

    length: int | None = option(
        None,
        f"Number of prompt tokens that VPT puts before a block. None means {PROMPTS}, and with `tuner_rules lift_plus` "
        "about the number of classes over the number of blocks.",
        as_int,
        key="vpt_len",
        least=1,
        most=4096,
    )
    init: str | None = option(
        None,
        "Distribution of VPT's first prompt tokens: uniform, with a bound that depends on the size of a patch, or "
        "normal with deviation 0.02. None means uniform, and normal with `tuner_rules lift_plus`.",
        as_str,
        key="vpt_init",
        choices=("uniform", "normal"),
    )

    def filled(self, case: Case) -> Self:
        length = power_of_two(case.classes / case.blocks) if case.plus else PROMPTS
        return replace(self, length=self.length or length, init=self.init or ("normal" if case.plus else "uniform"))


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

    def filled(self, case: Case) -> Self:
        ratio = mask_ratio(case.classes, case.blocks, case.width) if self.ratio is None else self.ratio
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


@dataclass(frozen=True)
class AftOptions(TunerOptions):
    """Random subsets of the weights and of the biases, as in LIFT+."""

    ratio: float | None = option(
        None,
        "Share of each weight and of each bias that the tuner `aft` trains. None means LIFT+'s rule, by which it "
        "trains about as many values as the classifier has.",
        as_float,
        least=0.0,
        most=1.0,
    )
    loc: str = option(
        "all", "Layers in which the tuner `aft` trains: attention, MLP, or both.", choices=("all", "attn", "mlp")
    )
    seed: int = option(
        0, "Random seed with which the tuner `aft` draws the values of each tensor.", least=0, most=2**63 - 1
    )

    def filled(self, case: Case) -> Self:
        ratio = aft_ratio(case.classes, case.selected, case.width, self.loc) if self.ratio is None else self.ratio
        return replace(self, ratio=ratio)

    def check(self) -> None:
        if self.ratio is None or not 0 < self.ratio <= 1:
            raise UserError(f"aft_ratio {self.ratio} is no share of the weights; choose one above 0 and up to 1")

    def of_expert(self, expert: int) -> Self:
        return replace(self, seed=derive_seed(self.seed, "expert", expert))

    @property
    def in_layers(self) -> tuple[str, ...]:
        """The layers that `loc` means."""
        return {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2"), "all": ("qkv", "proj", "fc1", "fc2")}[self.loc]
