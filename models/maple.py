"""MaPLe: context vectors in the first blocks of the text tower, and linear maps of them as prompts of the images.

Source: Khattak et al., CVPR 2023, section 3.2.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.class_texts import ContextPlace
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.vit_layers import norm
from tailtune.models.text_contexts import MAPLE_LENGTH, ContextOptions, word_embeddings


class MapleContexts(nn.Module):
    """Context vectors P_0 … P_{J-1} of the text tower, and couplings F_0 … F_{J-1} to the image encoder.

    Args:
        length: number p of vectors in a block.
        depth: number J of blocks.
        width: width of the text tower.
        image_width: width of the image encoder.
    """

    def __init__(self, length: int, depth: int, width: int, image_width: int) -> None:
        super().__init__()
        vectors = (torch.empty(length, width).normal_(0.0, 0.02) for _ in range(depth))
        self.vectors = nn.ParameterList(nn.Parameter(each) for each in vectors)
        first, other = nn.Linear(width, image_width), nn.Linear(width, image_width)
        # As in the authors' code, the later couplings start as copies of one.
        self.couplings = nn.ModuleList([first, *(copy.deepcopy(other) for _ in range(depth - 1))])

    def forward(self) -> Tensor:
        """The vectors that stand in the sentences, [p, D]."""
        return self.vectors[0]

    def image_prompts(self, block: int) -> Tensor:
        """The prompts of a block of the image encoder, [p, D of images]."""
        prompts: Tensor = self.couplings[block](self.vectors[block])
        return prompts


class _OfContexts(nn.Module):
    """A module at a site that reads contexts, which are a part of the text tower and of no other module."""

    def __init__(self, contexts: MapleContexts, block: int) -> None:
        super().__init__()
        self._contexts = (contexts,)
        self.block = block

    @property
    def contexts(self) -> MapleContexts:
        return self._contexts[0]


class _ReplacedTokens(_OfContexts):
    """Puts the vectors of a later block of the text tower in the place of those of the block before."""

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        vectors = self.contexts.vectors[self.block].to(y.dtype)
        return torch.cat([y[:, :1], vectors.expand(len(y), -1, -1), y[:, 1 + len(vectors) :]], dim=1)


class _CoupledPrompts(_OfContexts):
    """Appends the prompts of a block of the image encoder; those of the first go through the first norm."""

    def __init__(self, contexts: MapleContexts, block: int, first_norm: nn.Module) -> None:
        super().__init__(contexts, block)
        self._first_norm = (first_norm,)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        prompts = self.contexts.image_prompts(self.block)
        if self.block == 0:
            prompts = norm(prompts, self._first_norm[0])
        return torch.cat([y, prompts.to(y.dtype).expand(y.shape[0], -1, -1)], dim=1)


def add_maple(
    tower: TextTower, encoder: Encoder, options: ContextOptions, class_names: Sequence[str], seed: int
) -> None:
    """Let contexts act in the first blocks of both encoders.

    Args:
        tower: the text tower; its sentences are set.
        encoder: the image encoder.
        options: number of vectors and blocks, words.
        class_names: names of the C classes.
        seed: seed of the initial weights.

    Raises:
        UserError: the image encoder is no ViT, has too few blocks or prompts of its own, or the words are too few.
    """
    if not isinstance(encoder, ViTEncoder):
        raise UserError("context maple puts prompts into the blocks of a ViT, and this image encoder runs as a whole")
    depth, length = options.depth, options.length or MAPLE_LENGTH
    if depth > min(tower.depth, encoder.depth):
        raise UserError(
            f"context_depth {depth}: the encoders have {tower.depth} and {encoder.depth} blocks; choose at most "
            f"{min(tower.depth, encoder.depth)}"
        )
    if any(sites["tokens"] for host in (tower, encoder) for of_expert in host.sites for sites in of_expert):
        raise UserError("context maple and vpt_shallow or vpt_deep both set the prompt tokens; choose one of them")
    place = ContextPlace(length=length, words=options.words)
    with torch.device("cpu"):
        tower.set_texts(place.texts(tower.tokenizer, class_names, tower.vocabulary))
    with seeded(seed, "context"):
        contexts = MapleContexts(length, depth, tower.width, encoder.width)
    if options.words is not None:
        start = word_embeddings(tower, options.words)
        if len(start) < length:
            raise UserError(f"context_len {length}: context_words '{options.words}' has only {len(start)} tokens")
        with torch.no_grad():
            contexts.vectors[0].copy_(start[:length])
    tower.context = contexts
    encoder.prompted_by_texts = True
    for block in range(depth):
        if block:
            tower.sites[0][block]["tokens"].append(_ReplacedTokens(contexts, block))
        for sites in {id(of_expert[block]): of_expert[block] for of_expert in encoder.sites}.values():
            sites["tokens"].append(_CoupledPrompts(contexts, block, encoder.net.norm_pre))
