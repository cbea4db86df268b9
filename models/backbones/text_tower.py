"""CLIP's text encoder as a host of tuners: class texts → text features, with a graph where something in it trains.

Four facts keep a training step cheap. All are exact up to rounding, because the attention is causal:

* What follows the end of a sentence is cut away.
* What all sentences begin with ("a photo of a", shared contexts, prompts) runs through the blocks once. The other
  tokens attend to its keys and values.
* The last block computes the end token alone.
* Sentences of similar lengths share a batch. Of the batches that do not fit into `memory`, the activations are
  computed again in the backward pass.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tailtune.models.backbones.class_texts import Batch, ClassTexts
from tailtune.models.backbones.plain_vit import NORM_EPS, Block, VitShape, timm_name
from tailtune.models.backbones.transformer_encoder import Attention, TransformerEncoder
from tailtune.models.backbones.vit_layers import apply_tuners, norm

OPENAI_TEXT = {"context_length", "vocab_size", "width", "heads", "layers"}
"""Settings of OpenAI's text encoders in open_clip's configs. One with other settings has other parts."""
SAVED = 14
"""Numbers that autograd keeps of a token in a block, in units of the width."""
GIB = 2**30


def is_openai_text(config: Mapping[str, Any]) -> bool:
    """Whether the text encoder of open_clip's config of a model is of OpenAI's kind."""
    return set(config["text_cfg"]) == OPENAI_TEXT and not config.get("custom_text") and "multimodal_cfg" not in config


class PlainText(nn.Module):
    """The weights of OpenAI's text encoder, under timm's names; on the meta device until they are loaded.

    Args:
        config: open_clip's config of the whole model.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        text = config["text_cfg"]
        width = text["width"]
        shape = VitShape(0, 1, width, text["layers"], text["heads"], 4.0, bool(config.get("quick_gelu")))
        with torch.device("meta"):
            self.token_embedding = nn.Embedding(text["vocab_size"], width)
            self.pos_embed = nn.Parameter(torch.empty(text["context_length"], width))
            self.blocks = nn.Sequential(*(Block(shape) for _ in range(shape.layers)))
            self.norm = nn.LayerNorm(width, NORM_EPS)


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
        return max((self._bytes(batch) for batch, again in self._kept() if again), default=0)

    def _bytes(self, batch: Batch) -> int:
        """Bytes of the activations of a batch."""
        tokens = (batch.stop - batch.start) * batch.length
        return SAVED * self.depth * self.width * tokens * self.compute_dtype.itemsize

    def _kept(self) -> Iterator[tuple[Batch, bool]]:
        """Batches, and whether their activations are computed again, because those before fill the memory."""
        left = self.memory
        for batch in self.batches:
            left -= self._bytes(batch)
            yield batch, left < 0

    def class_features(self) -> Tensor:
        """Encode the sentences of the classes.

        Returns:
            The mean of the normalised text features of each class, [C, d], at least fp32.
        """
        assert self.projection is not None
        features = F.linear(self._end_tokens(), self.projection.to(self.compute_dtype))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        features = F.normalize(features if self.adapter is None else self.adapter(features), dim=-1)
        if len(self.rows) == len(self.starts):  # a sentence for each class
            return features[self.rows]
        return F.embedding_bag(self.rows, features, self.starts, mode="mean")

    def _end_tokens(self) -> Tensor:
        """Features of the different sentences before the projection [n, D]. Unless they train, they are kept."""
        behind = {id(parameter) for parameter in self._behind_blocks()}
        parameters = [parameter for parameter in self.parameters() if id(parameter) not in behind]
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters):
            return self._run()
        state = (self.ids.device, state_of(parameters))
        if self._stored is None or self._stored[0] != state:
            with torch.no_grad():
                self._stored = state, self._run()
        return self._stored[1]

    def _behind_blocks(self) -> Iterator[nn.Parameter]:
        """The parameters that act on the features of the last block."""
        if self.projection is not None:
            yield self.projection
        if self.adapter is not None:
            yield from self.adapter.parameters()

    def _run(self) -> Tensor:
        before, features = self._run_shared(), []
        for batch, again in self._kept():
            run = partial(self._run_batch, batch, before)
            features.append(_computed_again(run) if again and torch.is_grad_enabled() else run())
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

    def _run_batch(self, batch: Batch, before: Sequence[Attention]) -> Tensor:
        """Run the other tokens of a batch, and return the features of its sentences [n, D]."""
        x = self._embed(self.ids[batch.start : batch.stop, self.shared : batch.length], self.shared)
        place = self.ends[batch.start : batch.stop, None, None] - self.shared  # of the end token, [n, 1, 1]
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


def _computed_again(run: Callable[[], Tensor]) -> Tensor:
    """Call a function now, and again in the backward pass, instead of keeping its activations. Dropout is repeated."""
    result: Tensor = checkpoint(run, use_reentrant=False)
    return result


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
