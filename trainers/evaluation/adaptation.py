"""ADAPTS: test-time adaptation, which predicts test images better by looking at them without their labels.

An adaptation gets the trained method and the unlabelled test images (`UnlabelledTest`) and returns its predictions for
each test distribution. It may learn from stored logits, as the weights of experts do, or update the network itself.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tailtune.configs.errors import UserError, lookup
from tailtune.configs.option import NoOptions, option
from tailtune.configs.value_parsers import as_str
from tailtune.datasets import View
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.trainers.distributed import to_device
from tailtune.trainers.evaluation.expert_weights import Learner, Recipe, StreamLearner, adapt, of_predictions
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.methods import Method


@dataclass(frozen=True)
class AdaptOptions:
    """Whether predictions are adapted to the test images, and from which views."""

    adapt: str | None = option(
        None,
        "Test-time adaptation: how predictions are improved from test images without labels. None means not at all.",
        as_str,
        cls="test",
        logits=False,
        table="ADAPTS",
    )
    adapt_views: str = of_predictions(
        "sade_imagenet", "Random transform that makes the two views of an image for `adapt`.", table="AUGMENTS"
    )


class UnlabelledBatch(NamedTuple):
    """Test images for an adaptation."""

    images: Tensor  # uint8 [B, 3, R, R], on the device
    positions: Tensor  # [B], of the images in the test split


@dataclass(frozen=True)
class UnlabelledTest:
    """What an adaptation gets. It holds no labels but those in `plain`, which only metrics may read."""

    method: Method
    """The trained method, on the device and in eval mode."""
    distributions: Sequence[TestDistribution]
    plain: Logits | None
    """Logits of all test images; None on processes other than the first."""
    views: Callable[[int], Logits | None]
    """Number of a pass → logits of two random views of each test image. All processes must call it together."""
    accelerator: Accelerator
    images: View
    num_workers: int = 0

    def batches(self, positions: Tensor, batch_size: int) -> Iterator[UnlabelledBatch]:
        """Test images, the same on every process; images that cannot be read are left out.

        Args:
            positions: of the images in the test split, in the wanted order [n].
            batch_size: images of a batch.
        """
        for batch in eval_loader(self.images.take(positions.numpy()), batch_size, self.num_workers):
            batch = to_device(batch, self.accelerator.device)
            readable = batch["weight"] > 0
            if readable.any():
                yield UnlabelledBatch(batch["image"][readable], positions[batch["index"][readable].cpu()])


class AdaptedPredictions(NamedTuple):
    """An adaptation's predictions for one test distribution, on the CPU."""

    logits: Tensor  # [n, C]
    positions: Tensor  # [n], of the images in the test split
    facts: Mapping[str, Any]
    """What metrics.json records besides the metrics, such as the weights of the experts."""


@dataclass(frozen=True)
class Adaptation:
    """An entry of ADAPTS."""

    run: Callable[[UnlabelledTest, Any], dict[str, AdaptedPredictions]]
    """Test images and options → name of a distribution → predictions. All processes call it; the first one's count."""
    Options: type = NoOptions
    """Dataclass of its options."""
    check: Callable[[Method, str], str] = field(default=lambda method, name: "")
    """The method on the meta device and its name → why it cannot be adapted; an empty text if it can."""


def needs_experts(method: Method, name: str) -> str:
    """Why the experts of a method cannot be weighed; an empty text if they can."""
    if method.model.num_experts == 1:
        return "weighs experts, and this run has one; set num_experts, or adapt none"
    if not method.asks_every_expert:
        return (
            f"weighs all experts, and method {name} asks only some of them about an image; set adapt none, or adapt "
            "the run that this one started from"
        )
    return ""


def expert_weights(kind: type[Learner]) -> Adaptation:
    """The adaptation that learns a weight for each expert, by a class of `expert_weights.py`."""

    def run(test: UnlabelledTest, recipe: Recipe) -> dict[str, AdaptedPredictions]:
        learners = adapt(kind, recipe, test.plain, test.distributions, test.views, test.accelerator)
        return {name: AdaptedPredictions(*learner.predictions(), learner.facts()) for name, learner in learners.items()}

    return Adaptation(run, kind.Options, needs_experts)


ADAPTS: Mapping[str, Adaptation] = {
    "sade": expert_weights(Learner),
    "sade_online": expert_weights(StreamLearner),
}


def check_adapt(adapt: str | None, method: Method, name: str) -> None:
    """Refuse what cannot be adapted, without images or weights.

    Args:
        adapt: the option; None passes.
        method: what predicts, on the meta device.
        name: name of the method, for the message.

    Raises:
        UserError: an unknown entry, or a method that it does not fit.
    """
    if adapt is not None and (reason := lookup(ADAPTS, adapt, "adapt").check(method, name)):
        raise UserError(f"adapt {adapt} {reason}")


@contextmanager
def restored_after(method: Method, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block these parameters ask for gradients; after it the method is as it was, to the bit.

    Args:
        method: its parameters, buffers and modes are restored.
        parameters: what the block trains, in place.
    """
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    asked = [parameter.requires_grad for parameter in method.parameters()]
    modes = [module.training for module in method.modules()]
    for parameter in method.parameters():
        parameter.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        method.load_state_dict(state)
        for parameter, before in zip(method.parameters(), asked, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None
        for module, mode in zip(method.modules(), modes, strict=True):
            module.training = mode
