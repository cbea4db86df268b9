"""The loss and the learning rate with which pretrain_tiny_clip.py trains."""

import math

import torch.nn.functional as F
from open_clip.model import CLIP
from torch import Tensor


def contrastive_loss(model: CLIP, images: Tensor, captions: Tensor, classes: Tensor) -> Tensor:
    """Symmetric InfoNCE in which every caption of an image's class is a positive.

    Args:
        model: a CLIP of open_clip.
        images: normalised images [B, 3, H, W].
        captions: tokens of a caption for each image [B, L].
        classes: class of each image [B].
    """
    image_features = model.encode_image(images, normalize=True)
    text_features = model.encode_text(captions, normalize=True)
    logits = (model.logit_scale.exp() * image_features @ text_features.T).float()
    positives = (classes[:, None] == classes[None]).float()
    positives = positives / positives.sum(1, keepdim=True)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


def learning_rate(largest: float, step: int, steps: int, warmup: int) -> float:
    """A linear warm-up, and then the cosine that begins at the first step and ends at 0."""
    return largest * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / steps))
