"""The sentences of classes as token ids: where learnt contexts stand, what all sentences begin with, and batches.

An id of the vocabulary or above means a learnt context vector: `vocabulary + k` is vector k. So sentences that share
their contexts also share these ids, and contexts of one class have ids of their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models.backbones.prompts import Sentences

Tokenizer = Callable[[Sequence[str]], Tensor]
"""Sentences → token ids [n, length]; the end of a sentence has the largest id."""
PLACEHOLDER = "X"
"""The word, one token, that keeps the place of a context vector."""
COST_OF_BATCH = 512
"""Tokens whose computation takes about as long as starting the kernels of one more batch."""
MOST_TOKENS = 8192
"""Tokens of a batch, of which autograd holds the activations where the batch is computed again."""


@dataclass(frozen=True)
class Batch:
    """Sentences that are computed together: rows `start` to `stop`, cut after `length` tokens."""

    start: int
    stop: int
    length: int


@dataclass(frozen=True)
class ClassTexts:
    """The different sentences about C classes, sorted by their lengths, and which of them describe each class."""

    ids: Tensor
    """Token ids [n, longest]; what follows the end of a sentence is never read."""
    ends: Tensor
    """Position of the last token of each sentence [n], ascending."""
    rows: Tensor
    """Sentences of the classes, one class after the other; all sentences together [s]."""
    starts: Tensor
    """Where the sentences of each class begin in `rows` [C]."""

    @classmethod
    def of(cls, tokens: Tensor, counts: Sequence[int], ends: Tensor | None = None) -> "ClassTexts":
        """Sort sentences and find equal ones.

        Args:
            tokens: ids of all sentences, class by class [s, length].
            counts: number of sentences of each class.
            ends: position of the end of each sentence [s]; None: that of its largest id.
        """
        ends = _ends(tokens) if ends is None else ends
        after = torch.arange(tokens.shape[1]) > ends.unsqueeze(1)
        unique, rows = tokens.masked_fill(after, 0).unique(dim=0, return_inverse=True)
        ends = torch.zeros(len(unique), dtype=torch.int64).scatter_(0, rows, ends)
        order = ends.argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        starts = torch.tensor([0, *accumulate(counts)][:-1])
        return cls(unique[order][:, : int(ends.max()) + 1], ends[order], place[rows], starts)

    @property
    def shared(self) -> int:
        """How many first tokens all sentences share. Under a causal mask they are computed once."""
        same = (self.ids == self.ids[0]).all(0)[: int(self.ends[0])]
        return int(same.long().cumprod(0).sum())

    def batches(self) -> list[Batch]:
        """Batches of all sentences, see `batches_of`."""
        return batches_of(self.ends, self.shared)


def batches_of(ends: Tensor, shared: int) -> list[Batch]:
    """Batches of sentences of similar length, of which no one has more than MOST_TOKENS tokens.

    A sentence is padded to the longest of its batch. The lengths at which batches end are those with the least cost,
    where a batch costs its tokens and COST_OF_BATCH.

    Args:
        ends: position of the last token of each sentence [n], ascending.
        shared: number of first tokens that cost nothing.
    """
    lengths = (ends + 1 - shared).tolist()
    groups = [0, *(i + 1 for i, length in enumerate(lengths) if lengths[i + 1 : i + 2] != [length])]
    cheapest = [(0, 0)]  # cost of all sentences up to the end of each group, and the number of the last cut before
    for number in range(1, len(groups)):
        longest = lengths[groups[number] - 1]
        costs = (
            (cheapest[cut][0] + COST_OF_BATCH + (groups[number] - groups[cut]) * longest, cut) for cut in range(number)
        )
        cheapest.append(min(costs))
    batches, number = [], len(groups) - 1
    while number:
        start, stop = groups[cheapest[number][1]], groups[number]
        most = max(1, MOST_TOKENS // lengths[stop - 1])
        for first in range(start, stop, most):
            last = min(first + most, stop)
            batches.append(Batch(first, last, int(ends[last - 1]) + 1))
        number = cheapest[number][1]
    return batches


def tokenized(tokenizer: Tokenizer, sentences: Sentences) -> ClassTexts:
    """The texts of one or more sentences of each class."""
    return ClassTexts.of(tokenizer(list(chain.from_iterable(sentences))), [len(each) for each in sentences])


@dataclass(frozen=True)
class ContextPlace:
    """Where context vectors stand in a sentence."""

    position: str = "end"
    """`end`: before the name, which is at the end; `front`: behind the name; `middle`: half of them on each side."""
    length: int = 16
    """Number of vectors n."""
    per_class: bool = False
    """Whether each class has vectors of its own."""
    words: str | None = None
    """Words before the name, whose first tokens the vectors replace (`end` only); None: nothing but the vectors."""

    def template(self) -> str:
        """The sentence, with {} in the place of the class name and placeholders for the vectors."""
        if self.words is not None:
            return f"{self.words} {{}}."
        words = [*[PLACEHOLDER] * self.before, "{}", *[PLACEHOLDER] * (self.length - self.before)]
        return " ".join(words) + "."

    @property
    def before(self) -> int:
        """How many of the vectors stand before the name."""
        return {"end": self.length, "front": 0, "middle": self.length // 2}[self.position]

    def texts(self, tokenizer: Tokenizer, class_names: Sequence[str], vocabulary: int) -> ClassTexts:
        """The sentences of C classes with ids of context vectors.

        Args:
            tokenizer: the text encoder's.
            class_names: C names; an underscore is read as a space.
            vocabulary: number of ids of the vocabulary.

        Raises:
            UserError: a sentence is longer than the text encoder takes.
        """
        template = self.template()
        tokens = tokenizer([template.replace("{}", name.replace("_", " ")) for name in class_names])
        ends = _ends(tokens)
        too_long = (ends >= tokens.shape[1] - 1).nonzero()
        if len(too_long):
            raise UserError(
                f"context_len {self.length}: with so many vectors, the sentence about "
                f"'{class_names[int(too_long[0])]}' is longer than the {tokens.shape[1]} tokens of the text encoder; "
                "choose fewer"
            )
        vector = torch.arange(self.length)
        # Those before the name stand behind the start token, the others before the full stop and the end token.
        behind = ends.unsqueeze(1) - 1 - self.length + vector
        places = torch.where(vector < self.before, 1 + vector, behind)  # [C, n]
        of_class = torch.arange(len(tokens)).unsqueeze(1) * (self.length if self.per_class else 0)
        return ClassTexts.of(tokens.scatter(1, places, vocabulary + of_class + vector), [1] * len(tokens), ends)


def _ends(tokens: Tensor) -> Tensor:
    """Position of the end token, the largest id, of each sentence [n, length]."""
    return tokens.argmax(-1)
