"""The encoder for all plain ViTs: timm's weights, and a forward of our own with named sites where tuners act.

The network is timm's `VisionTransformer` or our `PlainViT`, which only hold the weights. The blocks and their sites are
those of `TransformerEncoder`. Where only the class token is read, the last block computes it alone.

Where nothing trains in the first blocks, an image may be replaced by its tokens before the first block that trains.
"""

import re
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.models.backbones.plain_vit import PlainViT
from tailtune.models.backbones.transformer_encoder import Sites, TransformerEncoder
from tailtune.models.backbones.vit_compatibility import unsupported_part
from tailtune.models.backbones.vit_layers import apply_tuners, norm

OF_BLOCK = re.compile(r"(?:net\.blocks|tuners\.\w+)\.(\d+)")
"""Name of what acts in a block → index of the block."""
AFTER_BLOCKS = re.compile(r"|(tuners|projection|net\.(norm|fc_norm))(\..+)?")
"""Names of what acts after the blocks, and of modules that only hold others."""


class ViTEncoder(TransformerEncoder):
    """A plain ViT with tuners → the pooled feature after the last norm, projected if a projection is given.

    Class and register tokens, layer scale, normed queries and keys, and all of timm's poolings are supported. The
    class token attends to tokens that a prompt tuner has added; pooling never includes them.

    Checkpoints name tensors after the attributes `net`, `tuners` and `projection`.

    Args:
        net: the network without its classifier.
        projection: [d, D] weight that is applied to the feature (CLIP's visual projection), or None.
        fast: False computes the plain formulation, for comparison.

    Attributes:
        starts_at: index of the block to which tokens in the place of images go, see `tokens_before`.

    Raises:
        ValueError: the network has parts that this forward would leave out, see `unsupported_part`.
    """

    def __init__(self, net: Any, projection: Tensor | None = None, fast: bool = True) -> None:
        reason = unsupported_part(net)
        if reason is not None:
            raise ValueError(f"ViTEncoder cannot run this network: it has {reason}; use WholeNetworkEncoder")
        super().__init__(net, projection, fast)
        self.starts_at = 0

    @property
    def width(self) -> int:
        """Width D of the transformer."""
        return int(self.net.embed_dim)

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return int(self.net.patch_embed.patch_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.net.patch_embed.grid_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: patches, class and register tokens, but no prompts."""
        return int(self.net.patch_embed.num_patches + self.net.num_prefix_tokens)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the frozen weights, and so of the features."""
        return self.net.patch_embed.proj.weight.dtype

    @property
    def pools_class_token(self) -> bool:
        """Whether the feature is made of the class token alone."""
        return bool(self.net.global_pool == "token")

    @property
    def constant_blocks(self) -> int:
        """How many of the first blocks give the same tokens of an image while a run trains, for all experts."""
        if self.prompted_by_texts or self._batch_norms_train:
            return 0
        trained = [self.first_use(name) for name, each in self.named_parameters() if each.requires_grad]
        return max(0, min([self.depth - self.num_expert_blocks, *trained]))

    def first_use(self, name: str) -> int:
        """Index of the first block that depends on a tensor or module of the encoder.

        Args:
            name: its name within the encoder.

        Returns:
            −1 for what acts before the blocks, and the number of blocks for what acts after them.
        """
        if found := OF_BLOCK.match(name):
            return int(found[1])
        return self.depth if AFTER_BLOCKS.fullmatch(name) else -1

    def tokens_before(self, images: Tensor, block: int) -> Tensor:
        """The residual stream where it enters a block, or after the last one.

        Args:
            images: normalised images [B, 3, H, W].
            block: index of the block, at most the number of blocks that experts share.

        Returns:
            [B, 1, N, D], which `trunk` takes in the place of the images if `starts_at` is this block. N is 1 after the
            last block where the class token is enough.
        """
        return self._run_blocks(self._embedded(images), range(block), self.sites[0]).unsqueeze(1)

    def trunk(self, images: Tensor) -> Tensor:
        """Run the blocks that all experts share.

        Args:
            images: normalised images [B, 3, H, W], or tokens [B, 1, N, D] that enter block `starts_at`.

        Returns:
            Features [B, feature_dim] in the compute dtype; where experts have blocks of their own, the residual
            stream [B, N, D] before these blocks, prompts included.
        """
        x, start = (images[:, 0], self.starts_at) if images.shape[1] == 1 else (self._embedded(images), 0)
        x = self._run_blocks(x, range(start, self.depth - self.num_expert_blocks), self.sites[0])
        return x if self.num_expert_blocks else self._pool(x)

    def _embedded(self, images: Tensor) -> Tensor:
        """The residual stream before the first block, [B, 3, H, W] → [B, N, D]."""
        net: Any = self.net
        add_positions = net.add_positions if isinstance(net, PlainViT) else net._pos_embed
        x = norm(add_positions(net.patch_embed(images.to(self.compute_dtype))), net.norm_pre)
        return x.to(self.residual_dtype or x.dtype)

    def branch(self, shared: Tensor, expert: int) -> Tensor:
        if not self.num_expert_blocks:
            return shared
        indices = range(self.depth - self.num_expert_blocks, self.depth)
        return self._pool(self._run_blocks(shared, indices, self.sites[expert]))

    def _run_blocks(self, x: Tensor, indices: range, sites: Sequence[Sites]) -> Tensor:
        """Run blocks in turn, [B, N, D] → [B, N, D]; after the last block [B, 1, D] if the class token is enough."""
        for index in indices:
            run = partial(self._run_one, index, sites[index])
            if self.run_part is None:
                x = run(x)
            else:
                tuners = chain.from_iterable(sites[index].values())
                x = self.run_part(run, [self.net.blocks[index], *tuners], x)
        return x

    def _run_one(self, index: int, sites: Sites, x: Tensor) -> Tensor:
        """Run one block, and the tuners at its input."""
        if sites["tokens"]:
            x = apply_tuners(sites["tokens"], x[:, : self.num_tokens], x)
        class_token_only = self.fast and self.pools_class_token and index == self.depth - 1
        return self.run_block(x, index, sites, _class_token if class_token_only else None)

    def _pool(self, x: Tensor) -> Tensor:
        """Last norm, pooling and projection, [B, N, D] → [B, feature_dim]."""
        net: Any = self.net
        x = norm(x[:, : 1 if self.pools_class_token else self.num_tokens], net.norm).to(self.compute_dtype)
        features = norm(net.pool(x), net.fc_norm)
        return features if self.projection is None else F.linear(features, self.projection.to(self.compute_dtype))


def _class_token(x: Tensor) -> Tensor:
    """The class token of [B, N, D], [B, 1, D]."""
    return x[:, :1]
