"""`TokenStore`: the tokens of a ViT before its first block that trains are computed once, and kept on disk.

They are too large for the memory, so they are read from the file batch by batch. Like features, they are those of one
pass over the images, in batches of `test_batch_size` and in eval mode.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, TypeGuard

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.datasets.feature_view import FeatureView
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.view import View
from tailtune.models import ClassificationModel
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.trainers.storage.kept_rows import KeptRows

TOKENS_NOTE = "the first blocks, where nothing trains, were computed once for each image (feature_cache)"
log = logging.getLogger("tailtune")


class Unreadable(Exception):
    """An image cannot be read."""


@dataclass(frozen=True)
class TokenStore:
    """Gives a view of tokens in place of a view of images."""

    kept: KeptRows
    accelerator: Accelerator
    batch_size: int
    """Number of images that are encoded at once."""
    num_workers: int | None
    refused: set[View] = field(default_factory=set)
    """Views whose tokens could not be kept, so that nobody tries and warns in every epoch."""

    def applies(self, encoder: Encoder, view: View) -> TypeGuard[ViTEncoder]:
        """Whether tokens may stand for the images of a view: one process, which finds half of the blocks constant."""
        if not isinstance(encoder, ViTEncoder) or self.accelerator.num_processes > 1 or view in self.refused:
            return False
        block = encoder.constant_blocks
        return 2 * block >= encoder.depth and encoder.starts_at in (0, block)  # others may have other tokens already

    def view_of(self, model: ClassificationModel, encoder: ViTEncoder, view: View, facts: Mapping[str, Any]) -> View:
        """The view of the tokens of the images; the view itself if they cannot be kept, which a warning says.

        Args:
            model: the model.
            encoder: its encoder, in eval mode, for which `applies` is true.
            view: the images. Its transform draws no random numbers.
            facts: everything that the tokens depend on, as JSON.
        """
        block, started = encoder.constant_blocks, time.perf_counter()
        title = f"tokens of {len(view):,} images before block {block}"
        tokens = self.kept.open(facts)
        if tokens is not None:
            log.info("%s: read from the feature cache", title)
        elif problem := self._write(view, facts, lambda images: encoder.tokens_before(model.normalised(images), block)):
            log.warning("warning: feature_cache: %s are not kept, so every image is encoded again: %s", title, problem)
        elif (tokens := self.kept.open(facts)) is not None:
            size, seconds = prod(tokens.shape) * tokens.dtype.itemsize, time.perf_counter() - started
            log.info("%s: computed in %.1f s, %s MB kept in %s", title, seconds, f"{size / 1e6:,.1f}", self.kept.folder)
        if tokens is None:
            self.refused.add(view)
            return view
        encoder.starts_at = block
        return FeatureView(view, tokens, torch.ones(len(view), dtype=torch.bool))

    @torch.no_grad()
    def _write(self, view: View, facts: Mapping[str, Any], encode: Callable[[Tensor], Tensor]) -> str | None:
        """Write the tokens of all images. Returns why they are not written; None if they are."""
        device = self.accelerator.device
        first = encode(view[0]["image"][None].to(device))
        loader = eval_loader(view, self.batch_size, self.num_workers, device=device, title="tokens")

        def parts() -> Iterator[Tensor]:
            for batch in loader:
                if not (batch["weight"] > 0).all():
                    raise Unreadable
                yield encode(batch["image"]).cpu()

        try:
            return self.kept.write(facts, first.dtype, (len(view), *first.shape[1:]), parts())
        except Unreadable:
            return "an image cannot be read"
