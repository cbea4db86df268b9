"""CLIP's text encoder as a host of tuners: class texts → text features, with a graph where something in it trains.

Four facts keep a training step cheap. All are exact up to rounding, because the attention is causal:

* What follows the end of a sentence is cut away.
* What all sentences begin with ("a photo of a", shared contexts, prompts) runs through the blocks once. The other
  tokens attend to its keys and values.
* The last block computes the end token alone.
* Sentences of similar lengths share a batch. Of the batches that do not fit into `memory`, the activations are
  computed again in the backward pass.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.models.backbones.class_texts import Batch, ClassTexts, batches_of
from tailtune.models.backbones.plain_text import PlainText
from tailtune.models.backbones.plain_vit import timm_name
from tailtune.models.backbones.recomputation import computed_again
from tailtune.models.backbones.transformer_encoder import Attention, TransformerEncoder
from tailtune.models.backbones.vit_layers import apply_tuners, norm

SAVED = 14
"""Numbers that autograd keeps of a token in a block, in units of the width."""
GIB = 2**30


class TextTower(TransformerEncoder):
    """Class texts → text features [C, d] in the space shared with images.

    Prompts stand behind the start token. Those of a block replace those of the block before.

    Args:
        net: the network.
        projection: [d, D] weight.
        logit_scale: the scale σ with which the model was trained to compare images and texts.
        tokenizer: sentences → token ids [n, length].

    Attributes:
        context: the learnt context vectors [V, D], of which ids above the vocabulary choose some; None: there are none.
        adapter: acts on the features of the sentences [n, d]; None: nothing does.
        memory: bytes of activations that are kept for the backward pass.
    """

    ids: Tensor
    ends: Tensor
    rows: Tensor
    starts: Tensor

    def __init__(
        self, net: PlainText, projection: Tensor, logit_scale: float, tokenizer: Any, fast: bool = True
    ) -> None:
        super().__init__(net, projection, fast)
        self.logit_scale = logit_scale
        self.tokenizer = tokenizer
        self.context: nn.Module | None = None
        self.adapter: nn.Module | None = None
        self.memory = 8 * GIB
        self._stored: tuple[object, Tensor] | None = None
        self._plan: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self.shared = 0
        self.batches: Sequence[Batch] = ()

    @property
    def width(self) -> int:
        return int(self.net.token_embedding.embedding_dim)

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.net.token_embedding.num_embeddings)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.net.token_embedding.weight.dtype

    def set_texts(self, texts: ClassTexts) -> None:
        """Set the sentences of the classes."""
        place = self.net.pos_embed.device
        for name in ("ids", "ends", "rows", "starts"):
            self.register_buffer(name, getattr(texts, name).to(place), persistent=False)
        self.shared, self.batches, self._stored = texts.shared, texts.batches(), None
        self._plan = texts.ends, texts.rows  # on the CPU, where batches of some of the classes are chosen

    @property
    def tokens(self) -> int:
        """Number of tokens that run through the blocks."""
        return self.shared + sum((each.stop - each.start) * (each.length - self.shared) for each in self.batches)

    @property
    def trains(self) -> bool:
        """Whether the text features change while training."""
        return any(parameter.requires_grad for parameter in self.parameters())

    @property
    def largest_again(self) -> int:
        """Bytes of the largest batch of texts whose activations are computed again."""
        return max((self._bytes(batch) for batch, again in self._kept(self.batches) if again), default=0)

    def _bytes(self, batch: Batch) -> int:
        """Bytes of the activations of a batch."""
        tokens = (batch.stop - batch.start) * batch.length
        return SAVED * self.depth * self.width * tokens * self.compute_dtype.itemsize

    def _kept(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, bool]]:
        """Batches, and whether their activations are computed again, because those before fill the memory."""
        left = self.memory
        for batch in batches:
            left -= self._bytes(batch)
            yield batch, left < 0

    @property
    def one_sentence_each(self) -> bool:
        """Whether each class has one sentence."""
        return len(self.rows) == len(self.starts)

    def class_features(self) -> Tensor:
        """Encode the sentences of the classes.

        Returns:
            The mean of the normalised text features of each class, [C, d], at least fp32.
        """
        features = self._projected(self._end_tokens())
        if self.one_sentence_each:
            return features[self.rows]
        return F.embedding_bag(self.rows, features, self.starts, mode="mean")

    def features_of(self, classes: Tensor) -> Tensor:
        """Encode the sentences of some classes, each of which has one.

        Args:
            classes: their numbers, on the CPU [S].

        Returns:
            Normalised text features [S, d].
        """
        ends, rows = self._plan
        chosen, place = rows[classes].unique(return_inverse=True)
        device = self.ids.device
        if not self._blocks_train:
            return self._projected(self._end_tokens()[chosen.to(device)])[place.to(device)]
        batches = batches_of(ends[chosen], self.shared)
        return self._projected(self._run(batches, chosen.to(device)))[place.to(device)]

    def _projected(self, features: Tensor) -> Tensor:
        """Features of sentences before the projection [n, D] → normalised in the shared space [n, d]."""
        assert self.projection is not None
        features = F.linear(features, self.projection.to(self.compute_dtype))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        return F.normalize(features if self.adapter is None else self.adapter(features), dim=-1)

    def _end_tokens(self) -> Tensor:
        """Features of the different sentences before the projection [n, D]. Unless they train, they are kept."""
        if torch.is_grad_enabled() and self._blocks_train:
            return self._run(self.batches)
        state = (self.ids.device, state_of(self._of_blocks()))
        if self._stored is None or self._stored[0] != state:
            with torch.no_grad():
                self._stored = state, self._run(self.batches)
        return self._stored[1]

    @property
    def _blocks_train(self) -> bool:
        """Whether something trains before the projection."""
        return any(parameter.requires_grad for parameter in self._of_blocks())

    def _of_blocks(self) -> Iterator[nn.Parameter]:
        """The parameters that act before the projection."""
        behind = {id(self.projection)} | {id(each) for each in (self.adapter.parameters() if self.adapter else ())}
        return (parameter for parameter in self.parameters() if id(parameter) not in behind)

    def _run(self, batches: Sequence[Batch], chosen: Tensor | None = None) -> Tensor:
        """Features before the projection [n, D] of the sentences `chosen` [n], or of all."""
        ids, ends = (self.ids, self.ends) if chosen is None else (self.ids[chosen], self.ends[chosen])
        before, features = self._run_shared(), []
        for batch, again in self._kept(batches):
            rows = slice(batch.start, batch.stop)
            inputs = ids[rows, self.shared : batch.length], ends[rows], before
            run = self._run_batch
            features.append(computed_again(run, [self], *inputs) if again else run(*inputs))
        return torch.cat(features)

    def _embed(self, ids: Tensor, start: int) -> Tensor:
        """Token ids [n, N] of positions from `start` on → [n, N, D]."""
        net, dtype = self.net, self.residual_dtype or self.compute_dtype
        x = net.token_embedding(ids.clamp_max(self.vocabulary - 1)).to(dtype)
        if self.context is not None:
            learnt = F.embedding((ids - self.vocabulary).clamp_min(0), self.context()).to(dtype)
            x = torch.where((ids < self.vocabulary).unsqueeze(-1), x, learnt)
        return x + net.pos_embed[start : start + ids.shape[1]].to(dtype)

    def _run_shared(self) -> list[Attention]:
        """Run what all sentences begin with; returns the keys and values of each block."""
        x, seen = self._embed(self.ids[:1, : self.shared], 0), []
        for index, sites in enumerate(self.sites[0]):
            if sites["tokens"]:
                x = torch.cat([x[:, :1], x[:, x.shape[1] - self.shared + 1 :]], dim=1)
                x = apply_tuners(sites["tokens"], x, x)
            length = x.shape[1]
            attention = Attention(_causal(length, length, x.device))
            x = self.run_block(x, index, sites, None, attention)
            seen.append(attention)
        return seen

    def _run_batch(self, ids: Tensor, ends: Tensor, before: Sequence[Attention]) -> Tensor:
        """Run the other tokens of a batch.

        Args:
            ids: ids of its tokens without the shared ones [n, N].
            ends: position of the end of each sentence [n].
            before: keys and values of the shared tokens, for each block.

        Returns:
            Features of the sentences before the projection [n, D].
        """
        x = self._embed(ids, self.shared)
        place = ends[:, None, None] - self.shared  # of the end token, [n, 1, 1]
        end = partial(_token_at, place)
        last = self.depth - 1 if self.fast else self.depth
        for index, (sites, shared) in enumerate(zip(self.sites[0], before, strict=True)):
            assert shared.own is not None, "the shared tokens have run"
            length = shared.own[0].shape[2]
            mask = _causal(x.shape[1], length + x.shape[1], x.device)
            if index == last:  # [n, 1, 1, P + N]
                mask = (torch.arange(length + x.shape[1], device=x.device) <= length + place).unsqueeze(1)
            x = self.run_block(x, index, sites, end if index == last else None, Attention(mask, shared.own))
        x = x if self.fast else end(x)
        return norm(x[:, 0], self.net.norm).to(self.compute_dtype)


def state_of(parameters: Iterable[Tensor]) -> object:
    """Something that differs after a change of tensors: one in place raises their version, others have an address."""
    return tuple((each.data_ptr(), each._version, each.dtype) for each in parameters)


def _token_at(place: Tensor, x: Tensor) -> Tensor:
    """The token of x [n, N, D] at a place [n, 1, 1], [n, 1, D]."""
    return x.gather(1, place.expand(-1, -1, x.shape[2]))


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """The mask of `queries` tokens that are the last of `keys` tokens, [queries, keys]: True where one may be seen."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def load_text_tower(
    config: Mapping[str, Any], state: Mapping[str, Tensor] | None, tokenizer: Any, fast: bool
) -> TextTower:
    """The text tower of a CLIP of OpenAI's kind.

    Args:
        config: open_clip's config of the whole model.
        state: state dict of the whole model under open_clip's names; None: on the meta device, shapes only.
        tokenizer: sentences → token ids [n, length].
        fast: False computes every token in the last block.
    """
    net = PlainText(config)
    if state is None:
        projection = torch.empty(config["embed_dim"], config["text_cfg"]["width"], device="meta")
        return TextTower(net, projection, 100.0, tokenizer, fast)
    renamed = {
        timm_name(name.replace("ln_final", "norm").replace("positional_embedding", "pos_embed")): tensor
        for name, tensor in state.items()
        if not name.startswith("visual.") and name not in ("text_projection", "logit_scale", "attn_mask")
    }
    net.load_state_dict(renamed, assign=True)
    return TextTower(net, state["text_projection"].T.contiguous(), float(state["logit_scale"].exp()), tokenizer, fast)
