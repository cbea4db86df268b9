"""Encoder and head together: the model that methods train."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tailtune.models.backbones.backbone_types import PixelStats, TextEncoder
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.heads.expert_heads import ExpertHeads, heads_of, perturb_for_expert
from tailtune.models.heads.head_init import HeadContext, HeadInit
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.heads.tip_adapter import TipAdapter
from tailtune.models.tuners.peft_adapter import PeftAdapter


class ClassificationModel(nn.Module):
    """Images → features → logits of each expert.

    Checkpoints name their tensors after the attributes `encoder`, `head`, `peft` and `text`.

    Args:
        encoder: normalised images → features [B, D], or [B, E, D] if experts have parts of the network of their own.
        head: features → logits [B, C], or `ExpertHeads`.
        pixel_stats: mean and deviation of the pixels that the encoder expects.
        init: fills the head before the first step. It is dropped afterwards, together with the text encoder.
        random_base: whether the encoder's weights are random although pre-trained ones exist.
        peft: the adapter of the peft library around the encoder, if there is one.
        text: the text tower of a head that reads text features while they train, if there is one.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        pixel_stats: PixelStats,
        init: HeadInit | None = None,
        random_base: bool = False,
        peft: PeftAdapter | None = None,
        text: TextTower | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.init = init
        self.random_base = random_base
        self.peft = peft
        self.text = text
        for name, values in zip(("mean", "std"), pixel_stats, strict=True):
            self.register_buffer(name, torch.tensor(values, device="cpu").view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> Tensor:
        """Encode images.

        Args:
            images: [B, 3, H, W], uint8, or floats that are normalised already. Features that were computed before, with
                the shape of the result, pass as they are; so do tokens of a ViT [B, 1, N, D], to the encoder.

        Returns:
            Features [B, D], or [B, E, D] if experts have features of their own.
        """
        return images if images.ndim < 4 else self.encoder(self.normalised(images))

    def normalised(self, images: Tensor) -> Tensor:
        """The encoder's input: uint8 images [B, 3, H, W] are normalised, floats pass as they are."""
        # In place, because on a CPU most of the time would go into new memory.
        return images.float().div_(255).sub_(self.mean).div_(self.std) if images.dtype == torch.uint8 else images

    def logits(self, features: Tensor) -> Tensor:
        """Classify features.

        Args:
            features: [B, D] or [B, E, D].

        Returns:
            Logits of each expert [B, E, C]; a single head is one expert. They are at least fp32, because losses use
            class counts in this dtype, and fp16 cannot hold large counts.
        """
        logits = self.head(features)
        logits = logits if isinstance(self.head, ExpertHeads) else logits.unsqueeze(1)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] → logits of each expert [B, E, C]."""
        return self.logits(self.features(images))

    def trunk(self, images: Tensor) -> Tensor:
        """Compute what all experts share.

        Args:
            images: [B, 3, H, W], uint8, or floats that are normalised already.

        Returns:
            The output of the encoder's trunk; the features where experts share the whole encoder.
        """
        return self.encoder.trunk(self.normalised(images)) if self.encoder.experts > 1 else self.features(images)

    def expert(self, shared: Tensor, expert: int) -> tuple[Tensor, Tensor]:
        """Compute what one expert adds.

        Args:
            shared: output of `trunk`, or the rows of it that belong to some of the images.
            expert: index of the expert.

        Returns:
            Its features [B, D] and logits [B, C], the same as `features` and `forward` give.
        """
        features = self.encoder.branch(shared, expert) if self.encoder.experts > 1 else shared
        logits = heads_of(self.head)[expert](features)
        return features, logits.to(torch.promote_types(logits.dtype, torch.float32))

    @property
    def text_encoder(self) -> TextEncoder | None:
        """The text encoder, until the head has been made from it."""
        return self.init.text_encoder if self.init else None

    @property
    def num_experts(self) -> int:
        """Number E of experts; 1 for a single head."""
        return len(heads_of(self.head))

    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Set the arithmetic of the frozen encoder, see `Encoder.set_precision`. The head keeps its own dtype."""
        self.encoder.set_precision(compute, residual)
        if self.text is not None:
            self.text.set_precision(compute, residual)

    @property
    def batch_coupled(self) -> bool:
        """Whether the logits of an image depend on the others in the batch while training."""
        if self.samples_classes:
            return True
        return self.encoder.batch_coupled or self.text is not None and self.text.batch_coupled

    @property
    def samples_classes(self) -> bool:
        """Whether logits while training are those of some of the classes."""
        head = heads_of(self.head)[0]
        return isinstance(head, TextClassifier) and head.samples is not None

    def choose_classes(self, labels: Tensor, draws: Callable[[str], torch.Generator]) -> None:
        """Choose the classes of the next training forward, if the head wants only some.

        Args:
            labels: labels of the images [B].
            draws: purpose of a random draw → its generator.
        """
        head = heads_of(self.head)[0]
        if isinstance(head, TextClassifier) and head.samples is not None:
            head.choose(labels, draws("class samples"))

    @property
    def depends_on_length(self) -> bool:
        """Whether what the tuners do in a step depends on the number of steps of the run."""
        return self.peft is not None and self.peft.depends_on_length

    def penalty(self) -> Tensor | None:
        """What the tuners add to the mean loss, a scalar; None: nothing."""
        return self.peft.penalty() if self.peft else None

    def before_training(self, steps: int) -> None:
        """Prepare the tuners; called once in each launch, before its first step.

        Args:
            steps: optimizer steps of the whole run.
        """
        if self.peft:
            self.peft.before_training(steps)

    def after_step(self, step: int) -> None:
        """Let the tuners follow training; called after each optimizer step, while its gradients still exist.

        Args:
            step: number of the step, counted from 1.
        """
        if self.peft:
            self.peft.after_step(step)

    @contextmanager
    def one_step(self) -> Iterator[Callable[[bool], None]]:
        """Within this block, which is one optimizer step, class texts are encoded once.

        Yields:
            A function to call before each micro-batch, with whether it is the last one.
        """
        head = heads_of(self.head)[0]  # experts share the texts
        if isinstance(head, TextClassifier):
            with head.one_step() as begin:
                yield begin
        else:
            yield lambda last: None

    def init_head(self, context: HeadContext) -> None:
        """Fill the weight of the head, or of every expert's head, and drop what was needed for that.

        Experts get weights that differ a little, see `perturb_for_expert`.

        Args:
            context: the training data.
        """
        if self.init is not None and self.text is None:
            with torch.no_grad():
                weight = self.init(context)
                if isinstance(self.head, TipAdapter):
                    self.head.prepare(weight, context)
                for expert, head in enumerate([] if isinstance(self.head, TipAdapter) else heads_of(self.head)):
                    head.get_parameter("weight").copy_(perturb_for_expert(weight, expert, context.seed))
        self.init = None

    def counts(self) -> dict[str, int]:
        """Numbers of parameters; a parameter that is used twice counts once.

        Returns:
            `total`; `tuner`: trainable ones outside the head; `head`: all of the head; `trainable`.
        """
        trainable = sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)
        trainable_head = sum(parameter.numel() for parameter in self.head.parameters() if parameter.requires_grad)
        return {
            "total": sum(parameter.numel() for parameter in self.parameters()),
            "tuner": trainable - trainable_head,
            "head": sum(parameter.numel() for parameter in self.head.parameters()),
            "trainable": trainable,
        }
