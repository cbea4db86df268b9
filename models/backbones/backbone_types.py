"""The types that every backbone and the model builder share: what a backbone takes, is asked for, and hands over."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.prompts import Sentences
from tailtune.models.backbones.text_tower import TextTower

PixelStats = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of the pre-training images: RGB, with pixels scaled to [0, 1]."""


class TextEncoder(Protocol):
    """The text side of a CLIP, which turns class names into features of the space shared with images.

    Attributes:
        projection: [d, D] weight from image features to the shared space; None if the image encoder projects itself.
        logit_scale: the scale σ with which the model was trained to compare images and texts.
    """

    projection: Tensor | None
    logit_scale: float

    def class_features(self, sentences: Sentences, device: torch.device | None = None) -> Tensor:
        """Encode the sentences of each class.

        Args:
            sentences: one or more sentences of each of C classes.
            device: where to compute; None: the CPU.

        Returns:
            The mean of the normalised text features of each class, [C, d].
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """All tensors that `class_features` depends on, by name."""
        ...


@dataclass(frozen=True)
class InputSpec:
    """The images that a backbone takes."""

    resolution: int
    """Side of the square images, in pixels: what `resolution none` means."""
    interpolation: str = "bilinear"
    """How images are resized: what `interpolation none` means."""
    patch_size: int | None = None
    """Side of a ViT's patches, in pixels; the resolution must be a multiple of it. None: the network has no patches."""

    @property
    def expand(self) -> int:
        """Pixels that the resize before a crop adds: 1.5 patches, as LIFT does; without patches those of size 16."""
        return 3 * (self.patch_size or 16) // 2


@dataclass(frozen=True)
class PublishedWeights:
    """Pre-trained weights that anybody can get from a library by their name."""

    library: str
    """`timm` or `open_clip`."""
    name: str
    """Name of the network; timm's names end in the tag, after a dot."""
    tag: str | None = None
    """open_clip's tag of the weights; None for timm."""

    def __str__(self) -> str:
        return ":".join(word for word in (self.library, self.name, self.tag) if word)


@dataclass(frozen=True)
class ExpertSplit:
    """How experts share a network (`num_experts`, `expert_split`, `reduce_dimension`)."""

    experts: int = 1
    """How many experts there are."""
    own_blocks: int | None = None
    """How many of the last blocks (or stages) each expert has for itself; None: the backbone's default."""
    reduced: bool = False
    """Whether the last stages are narrower, as in RIDE."""


@dataclass
class Backbone:
    """What a backbone hands to the model builder."""

    encoder: Encoder
    pixel_stats: PixelStats | None
    """None: the network was trained on no images yet, so the statistics of the data at hand are used."""
    embed_dim: int | None = None
    """Width d of the space shared with texts; None for a backbone without a text encoder."""
    text_encoder: TextEncoder | None = None
    """None also on the meta device, where no text is encoded."""
    random_base: bool = False
    """Whether the weights are random although pre-trained ones exist."""
    text_tower: Callable[[], TextTower] | None = None
    """Makes the text encoder as a host of tuners; None if there is none that can be one."""


NO_SPLIT = ExpertSplit()


class BackboneSpec(Protocol):
    """How a backbone is built: an entry of BACKBONES, or what `open_clip:NAME` or `timm:NAME` names."""

    def inputs(self, pretrained: str | None = None) -> InputSpec:
        """The images that the backbone takes. Neither weights nor a network are needed to know this.

        Args:
            pretrained: the option; weights of one architecture may differ in their interpolation.
        """
        ...

    def published(self, pretrained: str | None) -> PublishedWeights | None:
        """Where others find the pre-trained weights.

        Args:
            pretrained: the option.

        Returns:
            None for random weights, for files, and for weights that only this repository ships.
        """
        ...

    def build(
        self,
        pretrained: str | None,
        resolution: int,
        seed: int,
        project: bool,
        fast: bool = True,
        split: ExpertSplit = NO_SPLIT,
    ) -> Backbone:
        """The image encoder with its weights. On the meta device it has shapes only, and nothing is read.

        Args:
            pretrained: `default`, a tag, a file, or None for random weights.
            resolution: side of the images, in pixels.
            seed: seed of random weights.
            project: whether features are in the space shared with texts (zero-shot).
            fast: False computes the plain formulation of a ViT, for comparison.
            split: how experts share the network.

        Raises:
            UserError: the weights are not there or do not fit, or the backbone cannot do what is asked.
        """
        ...
