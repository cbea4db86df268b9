"""Our side of the comparison with RIDE, SADE and BatchFormer: through our configs and builders."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tailtune.configs import CfgNode, load_configs
from tailtune.configs.option import options_from
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model, resolve
from tailtune.parity.errors import error, largest_error, number_error, with_prefix
from tailtune.parity.experts.cases import STEPS
from tailtune.parity.job import Case, Job, Tensors
from tailtune.parity.subject import Row
from tailtune.trainers.evaluation.expert_weights import Learner, Recipe
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.foreign_checkpoints import ride
from tailtune.trainers.methods import Earlier, Method, build_method
from tailtune.trainers.methods.dirmixe import Draws
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer, set_lr
from tailtune.trainers.option_schema import declared
from tailtune.trainers.precision import PRECISIONS, cast_trainable

FIGURES = ("logits", "loss", "gradients", "after_3_steps", "rates", "value")
FLOOR = 1e-3
"""As a share of the largest tensor's norm: what the error of a smaller gradient or change is divided by."""


def build(case: Case, options: Case, stage: int = -1) -> tuple[CfgNode, Method]:
    """Config and method of a case in fp64, by the same builders as in a run.

    Args:
        case: its `data` and `model` are our configs.
        options: further options.
        stage: of the model config, which may have several; the last by default.
    """
    pairs = {"prec": "fp64", "pretrained": "none"} | options
    words = [str(part) for pair in pairs.items() for part in pair]
    cfg = resolve(load_configs(case["data"], case["model"], words, declared())[stage])
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, info.class_names), info)
    precision = PRECISIONS[cfg.prec]
    method.model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    return cfg, method.to(torch.float64)


# --- names ----------------------------------------------------------------------------------------------------------

FURTHER_NAMES = (
    (r"^(?:encoder_layers|bt)\.", "mixer.layers.0."),
    (r"^classifier\.fc\.", "model.head."),
    (r"^feat_model\.", "model.encoder.net."),
)
"""What the importer of their checkpoints does not read: BatchFormer's encoder, and the names of its general version."""


def our_name(name: str) -> str:
    """Our name of a tensor of theirs."""
    for pattern, new in FURTHER_NAMES:
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return ride.our_name(name)


def translated(original: Tensors, ours: Tensors) -> Tensors:
    """Their tensors under our names and in our shapes: their cosine heads are [D, C], ours [C, D]."""
    tensors = {}
    for name, tensor in original.items():
        target = ours.get(our_name(name))
        transposed = target is not None and tensor.ndim == 2 and tensor.shape != target.shape
        tensors[our_name(name)] = tensor.T if transposed else tensor
    return tensors


def state(method: Method) -> Tensors:
    """The tensors of a method, each once: one that wraps another holds its model twice."""
    by_place = {tensor.data_ptr(): (name, tensor) for name, tensor in reversed(method.state_dict().items())}
    return dict(by_place.values())


@torch.no_grad()
def fill(method: Method, original: Tensors) -> None:
    """Copy their weights into ours.

    Raises:
        SystemExit: a tensor of either side has no counterpart.
    """
    ours = state(method)
    tensors = translated(original, ours)
    if tensors.keys() != ours.keys():
        raise SystemExit(f"names without a counterpart: {sorted(tensors.keys() ^ ours.keys())[:6]}")
    for name, tensor in tensors.items():
        ours[name].copy_(tensor)


# --- networks --------------------------------------------------------------------------------------------------------


def compare_network(case: Case, job: Job) -> list[Row]:
    """The row of a case: the first forward and backward pass and three steps, from the original's weights."""
    original, images, labels = job.tensors(case), job.inputs[case["images"]], job.inputs[case["labels"]]
    cfg, method = build(case, case["our_options"])
    start(method, case, original)
    before = with_prefix(original, "before.")
    assert "asked" not in before or len(before["asked"].unique()) > 1, "no image asks another number of experts"
    figures = answer_errors(method, images[-1], before)
    plan = Plan.of(cfg, len(images[0]))
    optimizer = build_optimizer(method.param_groups(), plan)
    set_lr(optimizer, plan, 0)
    figures["rates"] = rates_error([group["lr"] for group in optimizer.param_groups], original["rates"].tolist())
    first = {name: tensor.clone() for name, tensor in state(method).items()}
    method.train()
    method.on_epoch(case["epoch"] - 1, cfg.num_epochs)
    losses = []
    for step in range(STEPS):
        batch = {"image": images[step], "label": labels[step], "weight": torch.ones_like(labels[step]).double()}
        method.before_step(step + 1)
        outcome = method({**batch, "index": torch.arange(len(labels[step]))})
        losses.append(outcome.loss_sum / outcome.weight)
        losses[-1].backward()
        if step == 0:
            figures["gradients"] = gradient_error(method, with_prefix(original, "gradient."))
        optimizer.step()
        optimizer.zero_grad()
    figures["loss"] = error(losses[0], original["losses"][0].view(()))
    end = answer_errors(method, images[-1], with_prefix(original, "end."))
    after = [error(torch.stack(losses), original["losses"].flatten()), *end.values()]
    figures["after_3_steps"] = max(*after, change_error(method, first, with_prefix(original, "after.")))
    return [row(case, **figures)]


@torch.no_grad()
def start(method: Method, case: Case, original: Tensors) -> None:
    """Give a method the original's weights, its teacher's, and the test priors that it draws."""
    fill(method, with_prefix(original, "start."))
    if "drawn.priors" in original:
        use_draws(method, original["drawn.experts"], original["drawn.priors"])
    if "drawn.shares" in original:
        use_shares(method, original["drawn.shares"], original["drawn.orders"])
    teacher = with_prefix(original, "teacher.")
    if teacher:
        _, earlier = build(case, {}, stage=0)
        fill(earlier, teacher)
        frozen = earlier.eval().requires_grad_(False)
        method.after(Earlier(True, dict, lambda: frozen))


def use_draws(method: Any, experts: Tensor, priors: Tensor) -> None:
    """Give DirMixE the original's draws.

    Args:
        method: DirMixE.
        experts: k of all steps, one step after another [M · steps].
        priors: w of all steps [M · steps, C].
    """
    count = method.options.draws
    draws = [Draws(*pair) for pair in zip(experts.split(count), priors.split(count), strict=True)]
    method.drawn = lambda _: draws[method.at_step - 1]


def use_shares(method: Any, shares: Tensor, orders: Tensor) -> None:
    """Give mixup the original's draws.

    Args:
        method: mixup.
        shares: λ of each step [steps].
        orders: order of the second images of each step [steps, B].
    """
    method.draw = lambda _: (float(shares[method.at_step - 1]), orders[method.at_step - 1])


@torch.no_grad()
def answer_errors(method: Method, images: Tensor, original: Tensors) -> dict[str, float]:
    """Errors in evaluation mode on images [B, 3, H, W].

    Returns:
        The error of the experts' `logits`. Of an expert assignment that of their mean, and as `value` the share of
        images that asked another number of experts.
    """
    logits = method.eval().expert_logits(images)
    if "logits" in original:
        return {"logits": error(logits, original["logits"])}
    asked = (~logits[:, :, 0].isnan()).sum(1)
    different = float((asked != original["asked"]).double().mean())
    return {"logits": error(method.aggregate(logits), original["mean"]), "value": different}


def gradient_error(method: Method, original: Tensors) -> float:
    """Largest error of the gradients; infinite if not the same tensors have one."""
    ours = {name: p.grad for name, p in method.named_parameters() if p.requires_grad and p.grad is not None}
    gradients = translated(original, ours)
    return largest_error(ours, gradients, FLOOR) if ours.keys() == gradients.keys() else math.inf


def change_error(method: Method, first: Tensors, original: Tensors) -> float:
    """Largest error of weights and running statistics, and of their changes since `first`."""
    ours = state(method)
    tensors = translated(original, ours)
    our_changes, changes = ({name: (side[name] - first[name]).double() for name in ours} for side in (ours, tensors))
    return max(largest_error(ours, tensors), largest_error(our_changes, changes, FLOOR))


# --- schedules and aggregation --------------------------------------------------------------------------------------


def compare_rates(case: Case, job: Job) -> list[Row]:
    """Learning rates of all epochs."""
    return [rates_row(case, job.fact("rates", case))]


def rates_row(case: Case, original: Sequence[list[float]]) -> Row:
    """The row of a schedule.

    Args:
        case: its `data` and `model` are our configs.
        original: learning rates of the original's parameter groups in every epoch.
    """
    cfg, method = build(case, {})
    plan = Plan.of(cfg, cfg.batch_size)
    optimizer = build_optimizer(method.param_groups(), plan)
    errors = [math.inf if plan.epochs != len(original) else 0.0]
    for epoch, rates in enumerate(original):
        set_lr(optimizer, plan, epoch)
        errors.append(rates_error([group["lr"] for group in optimizer.param_groups], rates))
    return row({**case, "name": f"learning rates of {len(original)} epochs", "note": ""}, rates=max(errors))


def rates_error(ours: list[float], original: list[float]) -> float:
    """Largest error among the different rates of all parameter groups; infinite if they are not as many."""
    mine, theirs = sorted(set(ours)), sorted(set(original))
    return max(map(number_error, mine, theirs)) if len(mine) == len(theirs) else math.inf


class InOrder(Learner):
    """A learner that takes the images in the order of the original."""

    def batches(self) -> tuple[Tensor, ...]:
        return self.positions.split(self.recipe.batch_size)


def compare_weights(case: Case, job: Job) -> list[Row]:
    """SADE's weights of the experts after every epoch, with the options `adapt_…` of our config."""
    original = job.tensors(case)
    cfg, method = build(case, {})
    views = [job.inputs["view1"], job.inputs["view2"]]  # logits [epochs, batches, B, E, C]
    if "start.conv1.weight" in original:
        fill(method, with_prefix(original, "start."))
        with torch.no_grad():
            network, crops = method.model.eval(), (job.inputs["crop1"], job.inputs["crop2"])
            views = [network(images.flatten(0, 2)).unflatten(0, images.shape[:3]) for images in crops]
    both = torch.stack(views, 3).flatten(1, 2)  # [epochs, N, 2, E, C]
    positions = torch.arange(both.shape[1])
    recipe = replace(options_from(Recipe, cfg, cfg.adapt), batch_size=job.inputs["view1"].shape[2])
    plain = Logits(both[0, :, 0], torch.zeros_like(positions), positions)
    torch.set_default_dtype(torch.float64)
    learner = InOrder("", plain, positions, recipe)
    path = []
    while learner.running:
        learner.learn(Logits(both[learner.epoch], plain.labels, positions))
        path.append(learner.w.detach().clone())
    torch.set_default_dtype(torch.float32)
    return [row(case, value=error(torch.stack(path), original["path"]))]


def row(case: Case, **figures: float) -> Row:
    """A row with the figures that there are."""
    facts = {name: case[name] for name in ("repository", "name", "model", "data")}
    return facts | dict.fromkeys(FIGURES) | figures | {"note": case.get("note", "")}
