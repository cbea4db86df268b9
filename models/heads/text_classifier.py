"""The classifier whose rows are the text features of the classes, which the text tower computes while it trains."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_float, as_int
from tailtune.models.backbones.text_tower import TextTower, state_of
from tailtune.models.heads.classifier import Classifier


@dataclass(frozen=True)
class TextScaleOptions:
    """Option of the classifier whose rows are text features."""

    scale: float | None = option(
        None,
        "Factor of the cosine similarities between image and text features. None means the one that the model was "
        "trained with.",
        as_float,
        least=0.0,
        held_with="head",
    )
    samples: int | None = option(
        None,
        "Number of classes whose texts TextClassifier encodes for a micro-batch in addition to those of its labels. "
        "They are drawn at random, and their logits stand for those of all others. None means all classes.",
        as_int,
        least=1,
        most=10**6,
    )


class TextClassifier(Classifier):
    """z_c = σ · cos(f, t_c) with the text features t_c. Features have to be in the space shared with texts.

    It has no weights of its own: `attach` gives it the text tower, which stays a part of the model. While the tower
    trains, the features are computed once in an optimizer step; otherwise only when its tensors have changed.

    Args:
        dim: width d of the shared space.
        num_classes: number C of classes.
        scale: σ; None: that of the tower.
        samples: number of classes K beside those of the labels in a training forward; None: all.
    """

    Options = TextScaleOptions

    def __init__(self, dim: int, num_classes: int, scale: float | None, samples: int | None = None) -> None:
        super().__init__()
        self.dim, self.num_classes, self.scale, self.samples = dim, num_classes, scale, samples
        self.adapter: nn.Module | None = None
        """Acts on the features of images [B, d]; None: nothing does."""
        self._tower: tuple[TextTower, ...] = ()  # in a tuple, so that its tensors are not also those of the head
        self._stored: tuple[object, Tensor] | None = None
        self._step: _Step | None = None
        self._chosen: tuple[Tensor, Tensor] | None = None

    def attach(self, tower: TextTower) -> None:
        """Set the tower that computes the text features."""
        self._tower = (tower,)
        self.scale = tower.logit_scale if self.scale is None else self.scale

    @property
    def tower(self) -> TextTower:
        """The text tower."""
        return self._tower[0]

    def class_features(self) -> Tensor:
        """The text features of the classes, [C, d]."""
        tower = self.tower
        if tower.training and torch.is_grad_enabled() and tower.trains:
            return tower.class_features() if self._step is None else self._step.class_features(tower)
        state = (tower.ids.device, state_of(tower.parameters()))
        if self._stored is None or self._stored[0] != state:
            with torch.no_grad():
                self._stored = state, tower.class_features()
        return self._stored[1]

    def choose(self, labels: Tensor, draws: torch.Generator) -> None:
        """Choose the classes of the next training forward, if `samples` says so: the labels and some of the others.

        Args:
            labels: labels of the images [B].
            draws: a generator on the CPU.
        """
        if self.samples is None:
            return
        present = labels.unique().cpu()
        others = torch.ones(self.num_classes, dtype=torch.bool, device="cpu").index_fill_(0, present, False).nonzero()
        drawn = others[torch.randperm(len(others), generator=draws, device="cpu")[: self.samples], 0]
        # Each of the drawn classes stands for several, so its probability is raised by their number.
        raised = math.log(len(others) / len(drawn)) if len(drawn) else 0.0
        added = torch.tensor([0.0] * len(present) + [raised] * len(drawn), device="cpu")
        self._chosen = torch.cat([present, drawn]), added

    def forward(self, features: Tensor) -> Tensor:
        """Features [B, d] → logits [B, C]; those of classes that were not chosen are -inf."""
        if self._chosen is not None and torch.is_grad_enabled() and self.tower.training:
            classes, added = self._chosen
            logits = self._compare(features, self.tower.features_of(classes)) + added.to(features.device)
            everywhere = logits.new_full((len(logits), self.num_classes), -torch.inf)
            return everywhere.index_copy(1, classes.to(features.device), logits)
        return self._compare(features, self.class_features())

    def _compare(self, features: Tensor, texts: Tensor) -> Tensor:
        assert self.scale is not None, "attached"
        features = features.to(texts.dtype)
        features = F.normalize(features if self.adapter is None else self.adapter(features), dim=-1)
        return self.scale * F.linear(features, F.normalize(texts, dim=-1))

    @contextmanager
    def one_step(self) -> Iterator[Callable[[bool], None]]:
        """Within this block, which is one optimizer step, the text features are computed once.

        Yields:
            A function to call before each micro-batch, with whether it is the last one. The backward pass through the
            tower is that of the last one, with the gradients of all.
        """
        self._step = _Step()
        try:
            yield self._step.begin
        finally:
            self._step = None


class _Step:
    """The text features of one optimizer step."""

    def __init__(self) -> None:
        self.last = True
        self.computed: Tensor | None = None
        self.earlier: Tensor | None = None
        """The features as micro-batches before the last one see them. Their gradients are collected in it."""
        self.joined: Tensor | None = None

    def begin(self, last: bool) -> None:
        self.last = last

    def class_features(self, tower: TextTower) -> Tensor:
        if self.computed is None:
            self.computed = tower.class_features()
        if not self.last:
            self.earlier = self.computed.detach().requires_grad_() if self.earlier is None else self.earlier
            return self.earlier
        if self.joined is None:
            self.joined = self.computed.view_as(self.computed)
            if self.earlier is not None:
                earlier = self.earlier
                self.joined.register_hook(lambda grad: grad if earlier.grad is None else grad + earlier.grad)
        return self.joined
