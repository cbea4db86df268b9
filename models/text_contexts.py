"""Learnt context vectors in the sentences about classes, in place of words (CoOp), and in both encoders (MaPLe)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.seeding import seeded
from tailtune.configs.value_parsers import as_int, as_str
from tailtune.models.backbones.class_texts import ContextPlace
from tailtune.models.backbones.text_tower import TextTower

NONE, COOP, MAPLE = "none", "coop", "maple"
RANDOM_LENGTH, MAPLE_LENGTH = 16, 2
"""Numbers of vectors of the main configs of CoOp, without words, and of MaPLe."""


@dataclass(frozen=True)
class ContextOptions:
    """Learnt contexts."""

    kind: str = option(
        NONE,
        "Learnt vectors in the sentences about the classes: `coop` puts them in place of words, `maple` in deeper "
        "blocks and as prompts of the image encoder, too. `none` leaves the sentences of `prompt`.",
        key="context",
        choices=(NONE, COOP, MAPLE),
        zero_shot=False,
    )
    length: int | None = option(
        None,
        f"Number of learnt context vectors. None means {MAPLE_LENGTH} of context maple, and of context coop that of "
        f"context_words, or {RANDOM_LENGTH} without them.",
        as_int,
        key="context_len",
        least=1,
        most=64,
        zero_shot=False,
        read_with=("context",),
    )
    words: str | None = option(
        None,
        'Words whose embeddings the context vectors start from, such as "a photo of a". None means random vectors.',
        as_str,
        key="context_words",
        zero_shot=False,
        read_with=("context",),
    )
    position: str = option(
        "end",
        "Place of the class name among the context vectors of coop.",
        key="context_position",
        choices=("end", "middle", "front"),
        zero_shot=False,
        held_with="texts",
        read_with=(f"context {COOP}",),
    )
    per_class: bool = option(
        False,
        "Each class has context vectors of its own. A rare class then learns them from its few images alone.",
        key="context_per_class",
        zero_shot=False,
        read_with=(f"context {COOP}",),
    )

    depth: int = option(
        9,
        "Number of first blocks of both encoders that have context vectors of their own with context maple.",
        key="context_depth",
        least=1,
        most=1000,
        zero_shot=False,
        read_with=(f"context {MAPLE}",),
    )


class Vectors(nn.Module):
    """Learnt vectors, drawn from N(0, 0.02²).

    Args:
        length: number n of vectors in a sentence.
        width: width D of the text tower.
        copies: number of classes that have vectors of their own; 1: all classes share them.
    """

    def __init__(self, length: int, width: int, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.vectors = nn.Parameter(torch.empty(copies * length, width).normal_(0.0, 0.02))

    def forward(self) -> Tensor:
        """The vectors [copies · n, D]."""
        return self.vectors


def word_embeddings(tower: TextTower, words: str) -> Tensor:
    """Embeddings of the tokens of some words [n, D]."""
    with torch.device("cpu"):
        tokens = tower.tokenizer([words])[0]
    ids = tokens[1 : int(tokens.argmax())]
    if not len(ids):
        raise UserError("context_words: no word is given")
    weight: Tensor = tower.net.token_embedding.weight
    return weight[ids.to(weight.device)].detach()


def add_contexts(tower: TextTower, options: ContextOptions, class_names: Sequence[str], seed: int) -> None:
    """Let context vectors stand in the sentences of the classes (CoOp, Zhou et al., IJCV 2022, section 3.2).

    Args:
        tower: the text tower; its sentences are set.
        options: kind, number and place of the vectors.
        class_names: names of the C classes.
        seed: seed of random vectors.

    Raises:
        UserError: the number of vectors is not that of the words, or a sentence is too long.
    """
    start = None if options.words is None else word_embeddings(tower, options.words)
    length = options.length or (RANDOM_LENGTH if start is None else len(start))
    if start is not None and len(start) != length:
        raise UserError(
            f"context_len {length}: context_words '{options.words}' has {len(start)} tokens; leave context_len out"
        )
    place = ContextPlace(options.position, length, options.per_class)
    with torch.device("cpu"):
        tower.set_texts(place.texts(tower.tokenizer, class_names, tower.vocabulary))
    copies = len(class_names) if options.per_class else 1
    with seeded(seed, "context"):
        tower.context = Vectors(length, tower.width, copies)
    if start is not None:
        with torch.no_grad():
            tower.context.get_parameter("vectors").copy_(start.repeat(copies, 1))
