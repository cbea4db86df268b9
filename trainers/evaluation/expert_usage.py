"""How many experts were asked about each image, by a method that asks only some, and what that saves."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tailtune.models import ClassificationModel

GIGA = 1e9


def asked(logits: Tensor) -> Tensor:
    """[N, E, C] → whether an expert was asked about an image, bool [N, E]; logits of one that was not are NaN."""
    return ~logits.isnan().all(-1)


def is_finite(logits: Tensor, asks_every_expert: bool) -> bool:
    """Whether the logits [N, E, C] are numbers; where not every expert is asked, those of the experts that were."""
    if asks_every_expert:
        return bool(logits.isfinite().all())
    used = asked(logits)
    return bool(used[:, 0].all() and logits[used].isfinite().all())


def expert_usage(logits: Tensor) -> list[float]:
    """Percentage of the images [N, E, C] about which exactly 1, …, E experts were asked."""
    numbers = asked(logits).sum(1)
    found = torch.bincount(numbers, minlength=logits.shape[1] + 1)[1:]
    return (100 * found.double() / len(logits)).tolist()


def flops_by_experts(model: ClassificationModel, resolution: int) -> list[int]:
    """FLOPs of one image in eval when 1, …, E experts are asked: convolutions, matrix products, attention products.

    The model is moved to the meta device.
    """
    model = model.eval().to("meta")
    images = torch.empty(1, 3, resolution, resolution, device="meta")
    try:
        return _count(model, images)
    except (NotImplementedError, AssertionError):  # some tuners of peft do not run without numbers, or uncounted
        with model.encoder.untuned():
            return _count(model, images)


@torch.no_grad()
def _count(model: ClassificationModel, images: Tensor) -> list[int]:
    found = []
    with FlopCounterMode(display=False) as counter:
        shared = model.trunk(images)
        for expert in range(model.num_experts):
            model.expert(shared, expert)
            found.append(int(counter.get_total_flops()))
    return found


def mean_flops(model: ClassificationModel, resolution: int, shares: Sequence[float]) -> dict[str, float]:
    """What an image costs where a percentage `shares[i]` of them asks i + 1 experts: Σ_i p_i · FLOPs(i + 1).

    Without the few operations that decide who is asked. The model is moved to the meta device.
    """
    flops = flops_by_experts(model, resolution)
    mean = sum(share / 100 * each for share, each in zip(shares, flops, strict=True))
    return {
        "gflops_per_image": mean / GIGA,
        "gflops_all_experts": flops[-1] / GIGA,
        "saved_percent": 100 * (1 - mean / flops[-1]),
    }


def usage_report(
    logits: Tensor, labels: Tensor, groups: Mapping[str, Tensor], model: ClassificationModel, resolution: int
) -> dict[str, Any]:
    """`experts_used` of metrics.json: shares of all images and of each group's (None: it has none), and the cost."""
    chosen = {name: torch.isin(labels, classes) for name, classes in groups.items()}
    shares = {name: expert_usage(logits[each]) if each.any() else None for name, each in chosen.items()}
    every = expert_usage(logits)
    return {"all": every, **shares, **mean_flops(model, resolution, every)}
