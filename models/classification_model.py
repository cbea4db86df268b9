"""Encoder + head, the thing that methods train."""

import torch
from torch import Tensor, nn

from tailtune.models.backbones.backbone_types import Stats, Text
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.heads.expert_heads import ExpertHeads, apart, heads_of
from tailtune.models.heads.head_init import HeadContext, HeadInit
from tailtune.models.tuners.peft_adapter import PeftAdapter


class ClassificationModel(nn.Module):
    """Images → features → logits of each expert.

    Args:
        encoder: normalised images → features [B, D], or [B, E, D] of experts with parts of their own.
        head: features → logits [B, C], or `ExpertHeads`.
        stats: mean and std that the encoder expects.
        init: fills the head before the first step; dropped afterwards, and with it the text tower.
        random_base: the encoder's weights are random although pre-trained ones exist.
        peft: what the peft library has put around the encoder.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        stats: Stats,
        init: HeadInit | None = None,
        random_base: bool = False,
        peft: PeftAdapter | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.init = init
        self.random_base = random_base
        self.peft = peft
        for name, values in zip(("mean", "std"), stats, strict=True):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] (or floats, taken as normalised) → features [B, D] or [B, E, D]."""
        return self.encoder(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images [B, 3, H, W] → what the encoder takes; floats pass as they are."""
        return (images.float() / 255 - self.mean) / self.std if images.dtype == torch.uint8 else images

    def logits(self, features: Tensor) -> Tensor:
        """Features [B, D] or [B, E, D] → logits of each expert [B, E, C]; one head is one expert.

        At least fp32: class counts, which losses use in the logits' dtype, are beyond fp16's range.
        """
        logits = self.head(features)
        logits = logits if isinstance(self.head, ExpertHeads) else logits.unsqueeze(1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → logits of each expert [B, E, C]."""
        return self.logits(self.features(images))

    def trunk(self, images: Tensor) -> Tensor:
        """What is computed once for all experts: the encoder's trunk, or the feature where they share all of it."""
        return self.encoder.trunk(self.normalised(images)) if self.encoder.experts > 1 else self.features(images)

    def expert(self, shared: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """What `trunk` gave, of some images → feature [B, D] and logits [B, C] of one expert, as `forward`."""
        features = self.encoder.branch(shared, expert) if self.encoder.experts > 1 else shared
        logits = heads_of(self.head)[expert](features)
        return features, logits.to(torch.promote_types(logits.dtype, torch.float32))

    @property
    def text(self) -> Text | None:
        """The text tower, as long as the head is still to be made of it."""
        return self.init.text if self.init else None

    @property
    def num_experts(self) -> int:
        return len(heads_of(self.head))

    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Arithmetic of the frozen encoder; the head stays in its own dtype."""
        self.encoder.set_precision(compute, residual)

    @property
    def batch_coupled(self) -> bool:
        """Whether the logits of an image depend on the others in the batch while training."""
        return self.encoder.batch_coupled

    def penalty(self) -> Tensor | None:
        """What the tuners add to the mean loss, a scalar."""
        return self.peft.penalty() if self.peft else None

    def before_training(self, steps: int) -> None:
        """Once a launch, before the first step; `steps` is the length of the whole run."""
        if self.peft:
            self.peft.before_training(steps)

    def after_step(self, step: int) -> None:
        """After each optimizer step, counted from 1, while its gradients are still there."""
        if self.peft:
            self.peft.after_step(step)

    def init_head(self, context: HeadContext) -> None:
        """Fill the head's weight once, of several experts almost alike, then let go of what that needed."""
        if self.init is not None:
            with torch.no_grad():
                weight = self.init(context)
                for expert, head in enumerate(heads_of(self.head)):
                    head.get_parameter("weight").copy_(apart(weight, expert, context.seed))
        self.init = None

    def counts(self) -> dict[str, int]:
        """Parameters: `total` each once, `tuner` what trains outside the head, `head`, `trainable`."""
        head = sum(each.numel() for each in self.head.parameters())
        trains = sum(each.numel() for each in self.parameters() if each.requires_grad)
        head_trains = sum(each.numel() for each in self.head.parameters() if each.requires_grad)
        return {
            "total": sum(each.numel() for each in self.parameters()),
            "tuner": trains - head_trains,
            "head": head,
            "trainable": trains,
        }
