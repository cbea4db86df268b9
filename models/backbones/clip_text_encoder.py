"""The text side of a CLIP: sentences about classes become features in the space shared with images."""

import logging
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.models.backbones.prompts import Sentences

CHUNK = 512  # sentences encoded at once
log = logging.getLogger("tailtune")


class ClipTextEncoder:
    """CLIP's text side: frozen, run once to make a head, then dropped with the object."""

    def __init__(self, clip: Any, tokenizer: Any, projection: Tensor | None) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.projection = projection  # [d, D], where the encoder does not project itself
        self.logit_scale = float(clip.logit_scale.exp())

    def weights(self) -> dict[str, Tensor]:
        """Name → tensor of the tower, as open_clip names them."""
        found: dict[str, Tensor] = self.clip.state_dict()
        return found

    @torch.no_grad()
    def class_features(self, sentences: Sentences, device: torch.device | None = None) -> Tensor:
        """Mean of the normalised text features of a class's sentences, [C, d].

        Each different sentence is encoded once, so that classes of one name have the same row to the bit.
        """
        unique = list(dict.fromkeys(chain.from_iterable(sentences)))
        place = {sentence: index for index, sentence in enumerate(unique)}
        log.info("encoding %d sentences about %d classes", len(unique), len(sentences))
        self.clip.to(device or "cpu")
        chunks = [unique[start : start + CHUNK] for start in range(0, len(unique), CHUNK)]
        encoded = [self.clip.encode_text(self.tokenizer(chunk).to(device or "cpu")) for chunk in chunks]
        features = F.normalize(torch.cat(encoded), dim=-1)
        # A bag of sentences a class, of whatever size: the mean of each is one library call.
        bags = torch.tensor([place[sentence] for sentence in chain.from_iterable(sentences)], device=features.device)
        starts = torch.tensor([0, *accumulate(map(len, sentences))][:-1], device=features.device)
        return F.embedding_bag(bags, features, starts, mode="mean")
