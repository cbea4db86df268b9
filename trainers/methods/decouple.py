"""Classifiers made after the representation has been learnt (Kang et al., ICLR 2020, section 4).

What is held is the earlier run's. Their classifiers are linear, and cRT and LWS draw the classes equally often
(`sampler balanced`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.models import ClassificationModel
from tailtune.models.heads.classifiers import LinearClassifier
from tailtune.models.heads.expert_heads import heads_of
from tailtune.models.heads.initialisation import HeadContext
from tailtune.trainers.methods.base import Method, Objective


class Retrained(Method):
    """cRT: a fresh classifier on the encoder of the earlier run."""

    needs_after = True
    drops = ("model.head.", "mixer.")

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        self.hold(model.encoder)


class WeightScaling(Method):
    """LWS: w̃_c = f_c w_c, of the earlier run's classifier only the scales f [E, C] are learnt.

    As in the authors' code f_c multiplies the logit, and so the bias too.
    """

    needs_after = True
    drops = ("mixer.",)

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        self.scales = nn.Parameter(torch.ones(model.num_experts, len(objective.class_counts)))
        self.hold(model)

    def prepare(self, context: HeadContext) -> None:
        """The heads are the earlier run's."""

    def expert_logits(self, images: Tensor) -> Tensor:
        return super().expert_logits(images) * self.scales


@dataclass(frozen=True)
class Options:
    power: float = option(
        0.7,
        "Exponent τ of τ-normalisation: 0 leaves the classifier as it is, 1 gives its rows the same length.",
        least=0.0,
    )


class Normalised(Method):
    """τ-normalisation: w̃_c = w_c / |w_c|^τ without bias, in the earlier run's model; nothing is trained."""

    Options = Options
    needs_after = True
    drops = ("mixer.",)

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        if not all(isinstance(head, LinearClassifier) for head in heads_of(model.head)):
            raise UserError(
                "tau_norm scales the rows of a linear classifier, and this one's lengths count for nothing; "
                "set classifier LinearClassifier in both runs"
            )
        self.hold(model)

    def prepare(self, context: HeadContext) -> None:
        """The heads are the earlier run's."""

    def assumed_prior(self) -> Tensor:
        """Taken as uniform: rows of equal length are the authors' remedy for the prior, not its exact inverse."""
        return torch.zeros_like(super().assumed_prior()).log_softmax(1)

    @torch.no_grad()
    def start_from(self, tensors: dict[str, Tensor]) -> None:
        super().start_from(tensors)
        for head in heads_of(self.model.head):
            weight = head.get_parameter("weight")
            weight.div_(weight.norm(dim=1, keepdim=True) ** self.options.power)
            head.get_parameter("bias").zero_()
