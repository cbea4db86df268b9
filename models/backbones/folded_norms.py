"""Batch norms whose statistics were folded into the convolutions, as converters for inference leave them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError


def are_folded(norms: Sequence[nn.BatchNorm2d]) -> bool:
    """Whether batch norms only add a bias: their mean is 0, their variance and weight are 1, and not all biases are 0.

    Random weights, whose biases are all 0, are not folded, and neither are those on the meta device.
    """
    affine = [norm for norm in norms if norm.affine and norm.running_mean is not None and not norm.weight.is_meta]
    zeros = [norm.running_mean for norm in affine if norm.running_mean is not None]
    ones = [each for norm in affine for each in (norm.running_var, norm.weight) if each is not None]
    added = any(bool(norm.bias.any()) for norm in affine)
    return added and not any(bool(each.any()) for each in zeros) and all(bool((each == 1).all()) for each in ones)


def refuse_folded_norms(norms: Sequence[nn.BatchNorm2d], tuner: str) -> None:
    """Refuse to normalise by training images with batch norms that have never normalised.

    Raises:
        UserError: the norms are folded, so that statistics of images would replace features that they were not made of.
    """
    if are_folded(norms):
        raise UserError(
            f"{tuner} normalises by the training images, and the batch norms of these weights are folded into the "
            "convolutions (mean 0, variance 1), so that all features would change; measure their statistics with "
            "scripts/unfold_batch_norms.py, or choose another tuner"
        )


@torch.no_grad()
def unfold(network: nn.Module, norms: Sequence[nn.BatchNorm2d], batches: Iterable[Tensor]) -> None:
    """Give folded batch norms the statistics of images; in eval mode the network computes the same as before.

    With the mean μ and variance σ² of a norm's inputs, its weight becomes γ·√(σ² + ε) and its bias β + γ·μ, where γ and
    β are the factor and the shift that the norm has applied so far.

    Args:
        network: the network, in eval mode, which takes images.
        norms: batch norms in it.
        batches: images [B, 3, H, W], as the network takes them.
    """
    sums = [torch.zeros(3, norm.num_features, dtype=torch.float64, device=norm.weight.device) for norm in norms]

    def observer(total: Tensor) -> object:
        def observe(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            values = inputs[0].double()
            count = torch.full_like(total[0], values.numel() / values.shape[1])
            total.add_(torch.stack([count, values.sum((0, 2, 3)), values.square().sum((0, 2, 3))]))

        return observe

    hooks = [norm.register_forward_pre_hook(observer(total)) for norm, total in zip(norms, sums, strict=True)]
    for images in batches:
        network(images)
    for hook in hooks:
        hook.remove()
    for norm, (count, first, second) in zip(norms, sums, strict=True):
        mean = first / count
        variance = second / count - mean.square()
        assert norm.running_mean is not None and norm.running_var is not None
        factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        shift = norm.bias.double() - factor * norm.running_mean.double()
        norm.weight.copy_(factor * (variance + norm.eps).sqrt())
        norm.bias.copy_(shift + factor * mean)
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)
