"""BalPoE: a balanced product of calibrated experts (Sanchez Aimar et al., CVPR 2023, arXiv 2206.05260)."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_numbers
from tailtune.models import ClassificationModel
from tailtune.trainers.methods.base import Batch, Method, Objective

SPACINGS = ("limits", "uniform")


@dataclass(frozen=True)
class Options:
    taus: list[float] | None = option(
        None,
        "Strengths τ of the experts' logit adjustment, such as [0, 1, 2]. None means that they are evenly spaced from "
        "`balpoe.tau_min` to `balpoe.tau_max`.",
        as_numbers,
    )
    tau_min: float = option(0.0, "Smallest strength τ where `balpoe.taus` is none.")
    tau_max: float = option(2.0, "Largest strength τ where `balpoe.taus` is none.")
    spacing: str = option(
        "limits",
        "Where evenly spaced strengths lie: the first and the last are `balpoe.tau_min` and `balpoe.tau_max` (limits), "
        "or each is in the middle of its share of the range (uniform).",
        choices=SPACINGS,
    )


class BalPoE(Method):
    """Loss: mean_e L(z_e + τ_e log π), where the strength τ_e of the adjustment differs by expert (eq. 8).

    L is the configured loss; the paper uses CE. Expert e is right for the test prior ∝ π^(1 − τ_e). The mean of the
    logits is a product of experts, whose prior is ∝ π^(1 − mean τ): uniform if the mean of τ is 1. The product assumes
    calibrated experts, so the paper trains them with `mixup`.
    """

    Options = Options
    adjustments: Tensor

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any = None) -> None:
        super().__init__(model, objective, options)
        objective.refuse_adjusting_loss("balpoe")
        taus = self.options.taus
        if taus is not None and len(taus) != model.num_experts:
            raise UserError(
                f"balpoe.taus has {len(taus)} numbers, and num_experts is {model.num_experts}: make them equal, or set "
                "balpoe.taus none for evenly spaced ones"
            )
        counts = objective.class_counts.double()
        log_prior = (counts / counts.sum() + 1e-9).log()  # 1e-9 as the original
        strengths = log_prior.new_tensor(self._spaced(model.num_experts) if taus is None else taus)  # τ [E]
        self.register_buffer("adjustments", strengths.outer(log_prior), persistent=False)  # [E, C]

    def _spaced(self, experts: int) -> list[float]:
        """Evenly spaced τ of each expert."""
        lowest, highest = self.options.tau_min, self.options.tau_max
        if self.options.spacing == "uniform" or experts == 1:
            places = [(expert + 0.5) / experts for expert in range(experts)]
        else:
            places = [expert / (experts - 1) for expert in range(experts)]
        return [lowest + (highest - lowest) * place for place in places]

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        total, weight = self.loss_of_each(logits + self.adjustments.to(logits.dtype), batch)
        return total / logits.shape[1], weight

    def assumed_prior(self) -> Tensor:
        """The prior that the loss assumes for z_e + τ_e log π, minus τ_e log π, in logarithms [E, C]."""
        return (super().assumed_prior() - self.adjustments.cpu()).log_softmax(1)
