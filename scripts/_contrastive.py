"""How pretrain_tiny_clip.py trains a CLIP: the loss, a step with its moving average, and the file of weights."""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from safetensors.torch import save
from torch import Tensor

from tailtune.trainers.storage.atomic_io import write_bytes


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


class ContrastiveTraining:
    """A CLIP with its optimizer and the moving average of its weights.

    Args:
        model: the model, which is trained in place.
        steps: number of steps of the training.
        lr: the largest learning rate: after a linear warm-up of `warmup` steps, a cosine that ends at 0.
        weight_decay: of AdamW.
        decay: of the moving average, which forgets faster in the first steps.
    """

    def __init__(self, model: CLIP, steps: int, lr: float, weight_decay: float, warmup: int, decay: float) -> None:
        self.model, self.steps, self.lr, self.warmup, self.decay = model, steps, lr, warmup, decay
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=weight_decay)
        self.average = [each.detach().clone() for each in model.parameters()]

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.lr * min((step + 1) / self.warmup, 0.5 + 0.5 * math.cos(math.pi * step / self.steps))

    def update(self, step: int, images: Tensor, captions: Tensor, classes: Tensor, bf16: bool = False) -> float:
        """Train on a batch; see `contrastive_loss`. Returns the loss.

        Args:
            step: number of the step, from 0.
            images, captions, classes: the batch.
            bf16: whether the forward pass runs below autocast to bf16.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = contrastive_loss(self.model, images, captions, classes)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
            decay = min(self.decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        return loss.item()

    @torch.no_grad()
    def finish(self, path: Path) -> CLIP:
        """Write the moving average in fp16. Returns the model with these weights, in evaluation mode."""
        for parameter, value in zip(self.model.parameters(), self.average, strict=True):
            parameter.copy_(value)
        halves = {name: value.half().contiguous() for name, value in self.model.state_dict().items()}
        write_bytes(path, save(halves))
        self.model.load_state_dict({name: value.float() for name, value in halves.items()}, strict=True)
        return self.model.eval()


def running_mean(before: float | None, loss: float) -> float:
    """The loss for the log: a mean in which recent steps count more."""
    return loss if before is None else 0.95 * before + 0.05 * loss
