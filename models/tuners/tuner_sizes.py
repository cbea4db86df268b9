"""The rules of LIFT and LIFT+ for the sizes of tuners that nobody gives."""

import math


def bottleneck_dim(num_classes: int, depth: int) -> int:
    """LIFT's rule for the LoRA rank and the width of adapters: r = 2^max(0, ⌊log2(C / 2L)⌋).

    Tuners then stay smaller than the head.

    Args:
        num_classes: number C of classes.
        depth: number L of blocks.
    """
    return power_of_two(num_classes / (2 * max(1, depth)))


def power_of_two(number: float) -> int:
    """The largest power of two that is not above a number, at least 1."""
    return int(2 ** max(0, int(math.log2(number))))


def mask_ratio(num_classes: int, depth: int, width: int) -> float:
    """LIFT's rule for the share of weights that `mask` trains: ρ = C / 12LD in whole thousandths, at least one.

    About as many parameters then train as the head has.

    Args:
        num_classes: number C of classes.
        depth: number L of blocks.
        width: width D of the transformer.
    """
    return max(1, 1000 * num_classes // (12 * max(1, depth) * width)) / 1000


def aft_ratio(num_classes: int, selected: int, width: int, loc: str) -> float:
    """LIFT+'s rule for the share of values that `aft` trains: C / (ℓ (12D + 9)), the head's size over the blocks' size.

    For the attention alone it is C / (ℓ (4D + 4)), and for the MLP alone C / (ℓ (8D + 5)).

    Args:
        num_classes: number C of classes.
        selected: number ℓ of blocks that the tuner acts on.
        width: width D of the transformer.
        loc: `all`, `attn` or `mlp`.
    """
    weights, biases = {"all": (12, 9), "attn": (4, 4), "mlp": (8, 5)}[loc]
    return min(1.0, num_classes / (max(1, selected) * (weights * width + biases)))
