"""What every backbone hands to the model builder."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.prompts import Sentences

Stats = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of the pre-training images, RGB in [0, 1]."""


class Text(Protocol):
    """A text tower that names classes in the image tower's feature space."""

    projection: Tensor | None  # [d, D] from image features to the shared space; None if the encoder projects
    logit_scale: float

    def class_features(self, sentences: Sentences, device: torch.device | None = None) -> Tensor: ...  # [C, d]

    def weights(self) -> dict[str, Tensor]: ...  # all that class_features depends on


@dataclass(frozen=True)
class Inputs:
    """The images that a backbone takes."""

    resolution: int
    """Side in pixels, what `resolution none` means."""
    interpolation: str = "bilinear"
    """What `interpolation none` means."""
    patch_size: int | None = None
    """Side of a ViT's patches, of which the resolution is a multiple; None for other networks."""

    @property
    def expand(self) -> int:
        """Pixels that the crops' resize adds: 1.5 patches, as LIFT; as for a patch of 16 where there are none."""
        return 3 * (self.patch_size or 16) // 2


@dataclass(frozen=True)
class PublishedWeights:
    """Pre-trained weights that anybody can get from a library by their name."""

    library: str
    """`timm` or `open_clip`."""
    name: str
    """Of the network; timm's has the tag behind a dot."""
    tag: str | None = None
    """open_clip's."""

    def __str__(self) -> str:
        return ":".join(each for each in (self.library, self.name, self.tag) if each)


@dataclass(frozen=True)
class Split:
    """How experts share a network."""

    experts: int = 1
    own: int | None = None
    """Last parts (stages, blocks) that each expert has for itself; 0: none; None: what the backbone does by itself."""
    reduced: bool = False
    """The experts' own parts are narrower."""


@dataclass
class Backbone:
    encoder: Encoder
    stats: Stats | None
    """None: trained from nothing, so of the data's own pixels."""
    embed_dim: int | None = None
    """Width of the space shared with text, d; None for a backbone without text tower."""
    text: Text | None = None
    """Absent on the meta device too, where nothing is encoded."""
    random: bool = False
    """The weights are random although pre-trained ones exist."""


ONE = Split()


class BackboneSpec(Protocol):
    """An entry of BACKBONES, or what `open_clip:…` or `timm:…` names."""

    def inputs(self, pretrained: str | None = None) -> Inputs:
        """Known without weights or network. Weights of one architecture may differ in their interpolation."""
        ...

    def published(self, pretrained: str | None) -> PublishedWeights | None:
        """Where others find the weights that an option means; None for random ones, files, and what we ship."""
        ...

    def build(
        self,
        pretrained: str | None,
        resolution: int,
        seed: int,
        project: bool,
        fast: bool = True,
        split: Split = ONE,
    ) -> Backbone: ...
