"""How many experts computed each image, for methods that skip experts, and how many FLOPs that saves."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.lazy_module import lazy_module
from tailtune.models import ClassificationModel
from tailtune.models.text_mode import with_fixed_texts

flop_counter = lazy_module("torch.utils.flop_counter")  # it imports triton
GIGA = 1e9


def asked(logits: Tensor) -> Tensor:
    """Whether each expert computed each image: logits [N, E, C] → bool [N, E]. Logits of a skipped expert are NaN."""
    return ~logits.isnan().all(-1)


def is_finite(used: Tensor, finite: Tensor, asks_every_expert: bool) -> bool:
    """Whether all logits are finite.

    Args:
        used: whether each expert computed each image, bool [N, E].
        finite: whether all its logits for the image are finite, bool [N, E].
        asks_every_expert: whether every expert computed every image. If not, logits of skipped experts may be NaN, but
            the first expert must have computed every image.
    """
    if asks_every_expert:
        return bool(finite.all())
    return bool(used[:, 0].all() and finite[used].all())


def expert_usage(used: Tensor) -> list[float]:
    """Percentages of the images that exactly 1, …, E experts computed, from `asked` [N, E]."""
    images = torch.bincount(used.sum(1), minlength=used.shape[1] + 1)[1:]  # [E]
    return (100 * images.double() / len(used)).tolist()


def flops_by_experts(model: ClassificationModel, resolution: int) -> list[int]:
    """FLOPs of one image in eval mode with 1, …, E experts: convolutions, matrix products and attention products.

    Class texts are left out, because an evaluation encodes them once.

    Args:
        model: the model; it is moved to the meta device.
        resolution: side of the image, in pixels.
    """
    model = with_fixed_texts(model.eval().to("meta"))
    images = torch.empty(1, 3, resolution, resolution, device="meta")
    try:
        return _count(model, images)
    except (NotImplementedError, AssertionError):  # some tuners of peft do not run on the meta device, or uncounted
        with model.encoder.untuned():
            return _count(model, images)


def flops_of_texts(model: ClassificationModel) -> int:
    """FLOPs of the texts of all classes in the forward pass of a training step; 0 for a model without a text tower.

    Args:
        model: the model; it is moved to the meta device.
    """
    tower = model.to("meta").text
    with torch.enable_grad(), flop_counter.FlopCounterMode(display=False) as counter:  # without, stored ones are taken
        if tower is not None:
            tower.class_features()
    return int(counter.get_total_flops())


@torch.no_grad()
def _count(model: ClassificationModel, images: Tensor) -> list[int]:
    flops = []
    with flop_counter.FlopCounterMode(display=False) as counter:
        shared = model.trunk(images)
        for expert in range(model.num_experts):
            model.expert(shared, expert)
            flops.append(int(counter.get_total_flops()))
    return flops


def mean_flops(model: ClassificationModel, resolution: int, shares: Sequence[float]) -> dict[str, float]:
    """Mean cost of an image, Σ_i p_i · FLOPs(i + 1), without the few operations that decide which experts are used.

    Args:
        model: the model; it is moved to the meta device.
        resolution: side of the image, in pixels.
        shares: p in %: `shares[i]` is the percentage of the images that i + 1 experts compute.

    Returns:
        The mean cost and the cost of all experts in GFLOPs, and the saving in %.
    """
    flops = flops_by_experts(model, resolution)
    mean = sum(share / 100 * count for share, count in zip(shares, flops, strict=True))
    return {
        "gflops_per_image": mean / GIGA,
        "gflops_all_experts": flops[-1] / GIGA,
        "saved_percent": 100 * (1 - mean / flops[-1]),
    }


def usage_report(
    used: Tensor, labels: Tensor, groups: Mapping[str, Tensor], model: ClassificationModel, resolution: int
) -> dict[str, Any]:
    """The entry `experts_used` of metrics.json: `expert_usage` of all images and of each group, and the cost.

    Args:
        used: whether each expert computed each image, bool [N, E].
        labels: [N].
        groups: `many`, `med`, `few` → class indices; the usage of a group without images is None.
        model: the model; it is moved to the meta device.
        resolution: side of the images, in pixels.
    """
    masks = {name: torch.isin(labels, classes) for name, classes in groups.items()}  # each [N]
    shares = {name: expert_usage(used[mask]) if mask.any() else None for name, mask in masks.items()}
    overall = expert_usage(used)
    return {"all": overall, **shares, **mean_flops(model, resolution, overall)}
