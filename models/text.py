"""The text side of a CLIP: sentences about classes become features in the space shared with images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import lookup
from models.prompts import PROMPTS, fill


class TextTower:
    """CLIP's text side: frozen, run once to make a head, then dropped with the object."""

    def __init__(self, clip: Any, tokenizer: Any, projection: Tensor | None) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.projection = projection  # [d, D], where the encoder does not project itself
        self.logit_scale = float(clip.logit_scale.exp())

    @torch.no_grad()
    def class_features(self, class_names: Sequence[str], prompt: str, device: torch.device | None = None) -> Tensor:
        """Mean of the normalised text features of a class's prompts, [C, d]; encoded in chunks of 512 sentences."""
        templates = lookup(PROMPTS, prompt, "prompt")
        sentences = [sentence for name in class_names for sentence in fill(name, templates)]
        tokens = self.tokenizer(sentences)
        self.clip.to(device or "cpu")
        encoded = [self.clip.encode_text(chunk.to(device or "cpu")) for chunk in tokens.split(512)]
        return F.normalize(torch.cat(encoded), dim=-1).unflatten(0, (len(class_names), -1)).mean(1)
