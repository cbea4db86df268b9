"""ADAPTS: the table of test-time adaptations, and the option that chooses one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tailtune.configs.errors import UserError, lookup
from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_str
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.trainers.evaluation.adaptation import (
    Adaptation,
    AdaptedPredictions,
    Learnt,
    UnlabelledTest,
    of_predictions,
)
from tailtune.trainers.evaluation.expert_weights import Learner, Recipe, StreamLearner, adapt, learners_of
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.methods import Method


@dataclass(frozen=True)
class AdaptOptions:
    """The choice of a test-time adaptation, and the views of the test images from which it learns."""

    adapt: str | None = option(
        None,
        "Test-time adaptation: how predictions are improved from test images without labels. None means not at all.",
        as_str,
        cls="test",
        logits=False,
        table="ADAPTS",
    )
    adapt_views: str = of_predictions(
        "sade_imagenet",
        "Random transform that makes the two views of an image for `adapt`.",
        table="AUGMENTS",
        read_with=("adapt",),
    )


def needs_experts(method: Method, name: str) -> str:
    """The reason why the experts of a method cannot be weighted, as the end of an error message; empty if they can."""
    if method.model.num_experts == 1:
        return "weighs experts, and this run has one; set num_experts, or adapt none"
    if not method.asks_every_expert:
        return (
            f"weighs all experts, and method {name} asks only some of them about an image; set adapt none, or adapt "
            "the run that this one started from"
        )
    return ""


def expert_weights(kind: type[Learner]) -> Adaptation:
    """The adaptation that learns a weight for each expert with the given learner class of `expert_weights.py`."""

    def predictions(learners: Mapping[str, Learner]) -> dict[str, AdaptedPredictions]:
        return {
            name: AdaptedPredictions(*learner.predictions(), learner.facts(), learner.learnt())
            for name, learner in learners.items()
        }

    def run(test: UnlabelledTest, recipe: Recipe) -> dict[str, AdaptedPredictions]:
        return predictions(
            adapt(kind, recipe, test.plain, test.distributions, test.views, test.accelerator, test.learnt)
        )

    def again(
        plain: Logits, tests: Sequence[TestDistribution], recipe: Recipe, learnt: Mapping[str, Learnt]
    ) -> dict[str, AdaptedPredictions]:
        return predictions(learners_of(kind, recipe, plain, tests, learnt))

    return Adaptation(run, kind.Options, needs_experts, again)


ADAPTS: Mapping[str, Adaptation] = {
    "sade": expert_weights(Learner),
    "sade_online": expert_weights(StreamLearner),
}


def check_adapt(adapt: str | None, method: Method, name: str) -> None:
    """Check that a method can be adapted. This needs neither images nor weights.

    Args:
        adapt: the option `adapt`; None is always valid.
        method: the method that predicts, on the meta device.
        name: name of the method, for the error message.

    Raises:
        UserError: an unknown adaptation, or a method for which the adaptation is not possible.
    """
    if adapt is not None and (reason := lookup(ADAPTS, adapt, "adapt").check(method, name)):
        raise UserError(f"adapt {adapt} {reason}")
