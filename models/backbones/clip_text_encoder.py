"""The text side of a CLIP: sentences about classes become features in the space shared with images."""

import logging
from itertools import accumulate, chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tailtune.configs.launch_environment import is_first_process
from tailtune.models.backbones.prompts import Sentences

CHUNK = 512  # sentences encoded at once
log = logging.getLogger("tailtune")


class ClipTextEncoder:
    """CLIP's text side, frozen. It runs once, to make a head, and is then dropped.

    Args:
        clip: open_clip's model; its image side is not used.
        tokenizer: sentences → token ids [n, length].
        projection: [d, D] weight from image features to the shared space; None if the image encoder projects itself.
    """

    def __init__(self, clip: Any, tokenizer: Any, projection: Tensor | None) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.projection = projection
        self.logit_scale = float(clip.logit_scale.exp())

    def weights(self) -> dict[str, Tensor]:
        """Name → tensor of the text encoder, under open_clip's names."""
        state: dict[str, Tensor] = self.clip.state_dict()
        return state

    @torch.no_grad()
    def class_features(self, sentences: Sentences, device: torch.device | None = None) -> Tensor:
        """Encode the sentences of each class.

        Each different sentence is encoded once, so classes of the same name get exactly the same row.

        Args:
            sentences: one or more sentences of each of C classes.
            device: where to compute; None: the CPU.

        Returns:
            The mean of the normalised text features of each class, [C, d].
        """
        unique = list(dict.fromkeys(chain.from_iterable(sentences)))
        row_of = {sentence: index for index, sentence in enumerate(unique)}
        log.info("encoding %d sentences about %d classes", len(unique), len(sentences))
        self.clip.to(device or "cpu")
        chunks = [unique[start : start + CHUNK] for start in range(0, len(unique), CHUNK)]
        hidden = None if is_first_process() else True  # None: shown on a terminal only
        bar = tqdm(chunks, desc="class texts", unit="batch", delay=2, leave=False, disable=hidden)
        encoded = [self.clip.encode_text(self.tokenizer(chunk).to(device or "cpu")) for chunk in bar]
        features = F.normalize(torch.cat(encoded), dim=-1)  # [sentences, d]
        # The classes have different numbers of sentences: one call takes the mean of each class's bag of rows.
        rows = torch.tensor([row_of[sentence] for sentence in chain.from_iterable(sentences)], device=features.device)
        starts = torch.tensor([0, *accumulate(map(len, sentences))][:-1], device=features.device)
        return F.embedding_bag(rows, features, starts, mode="mean")
