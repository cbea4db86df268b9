"""Decoupled training: new classifiers for a representation that an earlier run has learnt (Kang et al., ICLR 2020).

The methods are those of section 4. The frozen weights are those of the earlier run. In the paper the classifiers are
linear, and cRT and LWS sample all classes equally often (`sampler balanced`).
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
from tailtune.models.heads.head_init import HeadContext
from tailtune.trainers.methods.base import Method, Objective
from tailtune.trainers.methods.batchformer_layer import BATCH_MIXER


class Retrained(Method):
    """cRT: trains a new classifier on the frozen encoder of the earlier run."""

    continues_from_earlier_run = True
    trains_new_head = True

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        self.freeze_trained(model.encoder)

    def discards(self, name: str) -> bool:
        return name.startswith(("model.head.", BATCH_MIXER))


class WeightScaling(Method):
    """LWS: w̃_c = f_c w_c. Only the scales f [E, C] are trained; the earlier run's model is frozen.

    As in the authors' code, f_c multiplies the logit and therefore also the bias.
    """

    continues_from_earlier_run = True
    changes_head_logits = True
    can_be_wrapped = False
    takes_features = True

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        self.scales = nn.Parameter(torch.ones(model.num_experts, len(objective.class_counts)))
        self.freeze_trained(model)

    def discards(self, name: str) -> bool:
        return name.startswith(BATCH_MIXER)

    def prepare(self, context: HeadContext) -> None:
        """Do nothing: the heads are those of the earlier run."""

    def head_logits(self, features: Tensor) -> Tensor:
        return super().head_logits(features) * self.scales


@dataclass(frozen=True)
class Options:
    power: float = option(
        0.7,
        "Exponent τ of τ-normalisation: 0 leaves the classifier as it is, 1 gives its rows the same length.",
        least=0.0,
    )


class Normalised(Method):
    """τ-normalisation: w̃_c = w_c / |w_c|^τ without bias, in the model of the earlier run. Nothing is trained."""

    Options = Options
    continues_from_earlier_run = True
    changes_start = True

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        if not all(isinstance(head, LinearClassifier) for head in heads_of(model.head)):
            raise UserError(
                "tau_norm scales the rows of a linear classifier, and this one's lengths count for nothing; "
                "set classifier LinearClassifier in both runs"
            )
        self.freeze_trained(model)

    def discards(self, name: str) -> bool:
        return name.startswith(BATCH_MIXER)

    def prepare(self, context: HeadContext) -> None:
        """Do nothing: the heads are those of the earlier run."""

    def assumed_prior(self) -> Tensor:
        """Uniform, as an approximation: normalised rows reduce the effect of the prior but do not invert it exactly."""
        return torch.zeros_like(super().assumed_prior()).log_softmax(1)

    @torch.no_grad()
    def start_from(self, tensors: dict[str, Tensor]) -> None:
        super().start_from(tensors)
        for head in heads_of(self.model.head):
            weight = head.get_parameter("weight")
            weight.div_(weight.norm(dim=1, keepdim=True) ** self.options.power)
            head.get_parameter("bias").zero_()
