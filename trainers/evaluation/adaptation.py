"""Interface of test-time adaptations, which improve predictions with the unlabelled test images themselves.

An adaptation gets the trained method and the unlabelled test images (`UnlabelledTest`) and returns its predictions for
each test distribution. It may learn from the logits alone, as `expert_weights.py` does, or update the network itself.
The adaptations are listed in `adaptation_table.py`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tailtune.configs.option import NoOptions, option
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.view import View
from tailtune.trainers.distributed import gather_objects_to_main
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.rows import Rows
from tailtune.trainers.methods import Method

of_predictions = partial(option, cls="test", logits=False)
"""An option that affects only what is computed from stored logits, so the logits stay valid."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Options of an adaptation that goes through the test images in batches; its own are fields of a derived class."""

    batch_size: int = of_predictions(
        128,
        "Number of images in one step of `adapt`, and in one batch of target_prior estimate_online. The original SADE "
        "takes 64 online.",
        key="adapt_batch_size",
        least=1,
        most=10**6,
        read_with=("target_prior estimate_online",),
    )
    seed: int = of_predictions(
        0,
        "Random seed of the views and their order in `adapt`, and of the order in target_prior estimate_online.",
        key="adapt_seed",
        least=0,
        most=2**63 - 1,
        read_with=("target_prior estimate_online",),
    )


class UnlabelledBatch(NamedTuple):
    """Test images for an adaptation."""

    images: Tensor  # uint8 [B, 3, R, R], on the device
    positions: Tensor  # [B], of the images in the test split


Learnt = Mapping[str, Any]
"""What an adaptation has learnt for one test distribution, in the types of JSON; numbers are exact."""


@dataclass(frozen=True)
class UnlabelledTest:
    """The input of an adaptation. The only labels in it are those in `plain`; only metrics may read them."""

    method: Method
    """The trained method, on the device and in eval mode."""
    distributions: Sequence[TestDistribution]
    plain: Logits | None
    """Logits of all test images; None on processes other than the first."""
    views: Callable[[int], Logits | None]
    """Number of a pass → logits of two random views of each test image [N, 2, E, C]; None on processes other than the
    first. All processes must call it together."""
    accelerator: Accelerator
    images: View
    num_workers: int | None = None
    learnt: Mapping[str, Learnt] = field(default_factory=dict)
    """Name of a distribution → what an earlier evaluation has learnt from the same images with the same options; empty
    on processes other than the first."""

    def of_each(self, adapt: "Callable[[TestDistribution], AdaptedPredictions]") -> "dict[str, AdaptedPredictions]":
        """Adapt to each test distribution by itself. The distributions are divided among the processes.

        Args:
            adapt: test distribution → its predictions, the same on every process. It is called on one of them.

        Returns:
            Name of a distribution → its predictions, on the first process. All processes must call this together.
        """
        found, world = {}, self.accelerator.num_processes
        for first in range(0, len(self.distributions), world):
            tests = self.distributions[first : first + world]
            own = [adapt(test) for test in tests[self.accelerator.process_index :][:1]]
            for test, adapted in zip(tests, gather_objects_to_main(self.accelerator, own), strict=False):
                found[test.name] = adapted[0]
        return found

    def batches(self, positions: Tensor, batch_size: int) -> Iterator[UnlabelledBatch]:
        """Read test images in batches, on this process alone. Unreadable images are left out.

        Args:
            positions: positions of the images in the test split, in the order in which they are read [n].
            batch_size: number of images in a batch.
        """
        view, device = self.images.take(positions.numpy()), self.accelerator.device
        for batch in eval_loader(view, batch_size, self.num_workers, device=device, title="adaptation"):
            readable = batch["weight"] > 0
            if readable.any():
                yield UnlabelledBatch(batch["image"][readable], positions[batch["index"][readable].cpu()])


class AdaptedPredictions(NamedTuple):
    """An adaptation's predictions for one test distribution, on the CPU."""

    logits: Rows  # [n, C], such as a tensor
    positions: Tensor  # [n], of the images in the test split
    facts: Mapping[str, Any]
    """Entries of metrics.json in addition to the metrics, such as the weights of the experts."""
    learnt: Learnt | None = None
    """What is stored, so that `Adaptation.again` makes the same predictions from it; None: nothing."""


Again = Callable[[Logits, Sequence[TestDistribution], Any, Mapping[str, Learnt]], dict[str, AdaptedPredictions]]


@dataclass(frozen=True)
class Adaptation:
    """An entry of ADAPTS."""

    run: Callable[[UnlabelledTest, Any], dict[str, AdaptedPredictions]]
    """(test images, options) → {name of a distribution: predictions}. All processes must call it together; only the
    result of the first process is used."""
    Options: type = NoOptions
    """Dataclass of the options of this adaptation."""
    check: Callable[[Method, str], str] = field(default=lambda method, name: "")
    """(method on the meta device, its name) → the reason why it cannot be adapted; an empty text if it can."""
    again: Again | None = None
    """(logits of all test images, test distributions, options, what was learnt for each of them) → the predictions that
    `run` has made then, from neither images nor the network; None: this is not possible."""


@contextmanager
def restored_after(method: Method, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context manager in which only some parameters require gradients; on exit the method is restored bit for bit.

    Args:
        method: the method. Its parameters, buffers and training modes are restored.
        parameters: parameters of the method that the block trains in place.
    """
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    required = [parameter.requires_grad for parameter in method.parameters()]
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
        for parameter, before in zip(method.parameters(), required, strict=True):
            parameter.requires_grad_(before)
            parameter.grad = None
        for module, mode in zip(method.modules(), modes, strict=True):
            module.training = mode
