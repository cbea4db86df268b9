"""`sam`: steps that look for flat minima. They take the gradient at weights that are moved a little (SAM_MODES).

Each entry is for any method. It leaves gradients for the one update that the trainer makes of them at the weights θ,
with weight decay and momentum. The move is computed from the whole step: from the gradients of all micro-batches and
processes. So it does not depend on how a batch is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError, lookup
from tailtune.configs.option import NoOptions, option
from tailtune.configs.seeding import generator
from tailtune.configs.value_parsers import as_float, as_str
from tailtune.trainers.losses import moved
from tailtune.trainers.methods import Method
from tailtune.trainers.optimizers_and_schedules import Plan
from tailtune.trainers.sharding import is_sharded
from tailtune.trainers.step_passes import StepPasses, displaced, put_gradients, take_gradients


@dataclass(frozen=True)
class SamChoice:
    """The option that chooses a mode."""

    sam: str | None = option(
        None,
        "At which weights near the present ones the gradient of a step is taken, to find a flat minimum. None means at "
        "the present ones.",
        as_str,
        table="SAM_MODES",
    )


@dataclass(frozen=True)
class RhoOptions:
    """How far the weights are moved."""

    rho: float = option(
        0.05, "Length ρ of the move of the weights in `sam`; with gnm, a factor on the noise.", key="sam_rho", least=0.0
    )


@dataclass(frozen=True)
class SamOptions(RhoOptions):
    """Sharpness-aware minimisation."""

    rho_late: float | None = option(
        None,
        "The length ρ in the last fifth of the epochs, with sam sam and focal. None means `sam_rho`.",
        as_float,
        key="sam_rho_late",
        least=0.0,
    )


@dataclass(frozen=True)
class FocalOptions(SamOptions):
    """Focal-SAM."""

    gamma: float = option(
        1.0,
        "Exponent γ of sam focal: how much more the flatness counts for rare classes. 0 means the same for all.",
        key="sam_gamma",
        least=0.0,
    )
    strength: float = option(
        0.5,
        "Factor λ of sam focal: the share of the loss of the rarest classes that is taken at the moved weights.",
        key="sam_lambda",
        least=0.0,
    )


@dataclass(frozen=True)
class NoiseOptions(RhoOptions):
    """Gaussian neighbourhood minimisation."""

    scale: float = option(0.1, "Factor m on the noise of sam gnm, beside `sam_rho`.", key="gnm_scale", least=0.0)
    half_life: int = option(
        59, "Number of epochs after which the noise of sam gnm is halved.", key="gnm_half_life", least=1, most=10**6
    )


def plain(passes: StepPasses, plan: Plan, epoch: int) -> Tensor:
    """The gradient at θ."""
    return passes.counted(passes.incoming)


def sharpness_aware(passes: StepPasses, plan: Plan, epoch: int) -> Tensor:
    """SAM (Foret et al., ICLR 2021, eq. 2 and 3): the gradient at θ + ρ g/‖g‖, where g is the gradient at θ."""
    with passes.repeatable():
        totals = passes.counted(passes.keeping())
    parameters = passes.parameters
    with displaced(parameters, ascent(take_gradients(parameters), rho_at(plan, epoch))), passes.again():
        for _ in passes.over(passes.kept):
            pass
    return totals


def focal(passes: StepPasses, plan: Plan, epoch: int) -> Tensor:
    """Focal-SAM (Li et al., ICML 2025): the gradient of mean (1 − c) ℓ at θ, plus that of mean c ℓ at θ + ρ g/‖g‖.

    g is the gradient of mean c ℓ at θ, and c = λ (1 − π_y)^γ. Both gradients at θ come from one forward pass. DDP
    allows one backward pass for each forward pass, so that the method is used without it here.
    """
    method, parameters = passes.method, passes.parameters
    wide = torch.promote_types(parameters[0].dtype, torch.float32)
    shares = class_shares(method.class_counts, plan.sam_gamma, plan.sam_lambda).to(wide)
    rest: list[Tensor | None] = [None] * len(parameters)
    flat, counts = list(rest), []
    with passes.repeatable():
        for batch in passes.keeping():
            batch["share"] = shares[batch["label"]]
            outcome = method(batch)
            put_gradients(parameters, rest)
            passes.backward(outcome.loss_sum - outcome.shared_sum, retain_graph=True)
            rest = take_gradients(parameters)
            put_gradients(parameters, flat)
            passes.backward(outcome.shared_sum)
            flat = take_gradients(parameters)
            counts.append(passes.count(batch, outcome))
    put_gradients(parameters, rest)
    with displaced(parameters, ascent(passes.synchronise(flat), rho_at(plan, epoch))), passes.again():
        for batch in passes.kept:
            passes.backward(method(batch).shared_sum)
    put_gradients(parameters, passes.synchronise(take_gradients(parameters)))
    return torch.stack(counts).sum(0)


def noisy(passes: StepPasses, plan: Plan, epoch: int) -> Tensor:
    """GNM (Li et al., NeurIPS 2024): the gradient at θ + ρ m ½^⌊(e − 1)/h⌋ · clamp(N(0, 1/3²), ±1), in epoch e from 0.

    The noise is the same for all micro-batches and processes. It depends on the seed and the step only.
    """
    random = generator(plan.seed, "gnm", passes.method.at_step)
    factor, parameters = noise_factor(plan, epoch), passes.parameters
    noise: list[Tensor | None] = [factor * like(gaussian(each.shape, random), each) for each in parameters]
    with displaced(parameters, noise):
        return passes.counted(passes.incoming)


@dataclass(frozen=True)
class SamMode:
    """An entry of SAM_MODES."""

    gradients: Callable[[StepPasses, Plan, int], Tensor]
    """(passes of the step, training settings, epoch from 0) → the counted sums. It leaves the gradients of the step."""
    Options: type
    """Dataclass of the options that this mode reads."""
    copies: int
    """Number of tensors of a parameter's size that a step holds for each trained parameter, beside its gradient."""
    by_class: bool = False
    """Whether the loss of each image is weighted by its class."""
    keeps_graph: bool = False
    """Whether a forward pass has two backward passes."""


SAM_MODES: dict[str, SamMode] = {
    "sam": SamMode(sharpness_aware, SamOptions, copies=2),
    "focal": SamMode(focal, FocalOptions, copies=3, by_class=True, keeps_graph=True),
    "gnm": SamMode(noisy, NoiseOptions, copies=2),
}
PLAIN = SamMode(plain, NoOptions, copies=0)


def sam_mode(name: str | None) -> SamMode:
    """The mode of this name; None means the gradient at the present weights.

    Raises:
        UserError: no mode has this name.
    """
    return PLAIN if name is None else lookup(SAM_MODES, name, "sam")


def check_sam(cfg: CfgNode, method: Method) -> None:
    """Check the options of `sam`, and that a method can be trained with it.

    Args:
        cfg: the resolved config.
        method: the method, which may lie on the meta device.

    Raises:
        UserError: an unknown mode, a loss that the mode cannot weigh, or a launch with FSDP.
    """
    mode = sam_mode(cfg.sam)
    if mode is not PLAIN and is_sharded():
        raise UserError(f"sam {cfg.sam} does not go with FSDP: launch with --multi_gpu, or set sam none")
    if mode.by_class and not method.adds_up_samples:
        raise UserError(
            f"sam {cfg.sam} weighs the loss of each image by its class, and method {cfg.method} with loss_type "
            f"{cfg.loss_type} computes its loss from several images or draws; use sam sam, or another method or loss"
        )


def rho_at(plan: Plan, epoch: int) -> float:
    """ρ in an epoch, counted from 0."""
    late = epoch + 1 >= 0.8 * plan.epochs  # as the original's step schedule
    return plan.sam_rho_late if late and plan.sam_rho_late is not None else plan.sam_rho


def noise_factor(plan: Plan, epoch: int) -> float:
    """The factor on the noise of GNM in an epoch, counted from 0. As in the original, epoch 0 has twice that of 1."""
    return plan.sam_rho * plan.gnm_scale * 0.5 ** ((epoch - 1) // plan.gnm_half_life)


def class_shares(counts: Tensor, gamma: float, strength: float) -> Tensor:
    """c = λ (1 − π)^γ for each class, fp64 [C], from the numbers of training images [C]."""
    counts = counts.double()
    return strength * (1 - counts / counts.sum()) ** gamma


def gaussian(shape: torch.Size, random: torch.Generator) -> Tensor:
    """clamp(N(0, 1/3²), ±1) on the CPU."""
    return torch.randn(shape, generator=random, device="cpu").div(3).clamp(-1, 1)


def like(drawn: Tensor, weight: Tensor) -> Tensor:
    """A drawn tensor on the device and in the dtype of a weight."""
    return moved(drawn, weight.device).to(weight.dtype)


@torch.no_grad()
def ascent(gradients: list[Tensor | None], rho: float) -> list[Tensor | None]:
    """ε = ρ g / ‖g‖, with the norm over all tensors. A constant factor on g, as in loss scaling, changes nothing.

    If a gradient is not finite, ε is 0. The second pass then has no finite gradient either, so that loss scaling skips
    the step as usual.
    """
    present = [each for each in gradients if each is not None]
    wide = torch.promote_types(present[0].dtype, torch.float32)
    norm = torch.stack([each.norm(dtype=wide) for each in present]).norm()
    scale = rho / (norm + 1e-12)
    return [  # the factor may be too large for fp16
        None if each is None else torch.where(norm.isfinite(), each.to(wide) * scale, 0.0).to(each.dtype)
        for each in gradients
    ]
