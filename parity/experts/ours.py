"""Our side of parity_experts.py: through our configs and builders, compared with what the originals left in files."""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tailtune.configs import load_configs
from tailtune.datasets import DataInfo, build_info
from tailtune.models import build_model, resolve
from tailtune.parity.experts.cases import STEPS, Case
from tailtune.parity.lift.ours import error, gap, largest, part
from tailtune.trainers.evaluation.expert_weights import Learner, Recipe
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.foreign_checkpoints import ride
from tailtune.trainers.methods import Earlier, Method, build_method
from tailtune.trainers.methods.dirmixe import Draws
from tailtune.trainers.optim import Plan, build_optimizer, set_lr
from tailtune.trainers.options import declared
from tailtune.trainers.precision import PRECISIONS, cast_trainable

FLOOR = 1e-3
"""Of the largest tensor's norm: the measure of gradients and changes that are smaller, some of which are 0."""
Tensors = dict[str, Tensor]
FIGURES = ("logits", "loss", "gradients", "after_3_steps", "rates", "value")


def build(case: Case, pairs: Case, stage: int = -1) -> tuple[Any, Method, DataInfo]:
    """Config, method and data facts of a case, by the same builders as a run."""
    words = [str(part) for pair in ({"prec": "fp64", "pretrained": "none"} | pairs).items() for part in pair]
    cfg = resolve(load_configs(case["data"], case["model"], words, declared())[stage])
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, info.class_names), info)
    precision = PRECISIONS[cfg.prec]
    method.model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    return cfg, method.to(torch.float64), info


# --- names ----------------------------------------------------------------------------------------------------------

OTHERS = (
    (r"^(?:encoder_layers|bt)\.", "mixer.layers.0."),
    (r"^classifier\.fc\.", "model.head."),
    (r"^feat_model\.", "model.encoder.net."),
)
"""What the importer of their checkpoints does not read: BatchFormer's encoder, and the names of its general version."""


def ours_of(name: str) -> str:
    for pattern, new in OTHERS:
        if re.match(pattern, name):
            return re.sub(pattern, new, name)
    return ride.our_name(name)


def translate(theirs: Tensors, own: Tensors) -> Tensors:
    """Their tensors under our names and in our shapes: their cosine heads are [D, C], ours [C, D]."""
    found = {}
    for name, each in theirs.items():
        mine = own.get(ours_of(name))
        transposed = mine is not None and each.ndim == 2 and each.shape != mine.shape
        found[ours_of(name)] = each.T if transposed else each
    return found


def state(method: Method) -> Tensors:
    """Each tensor once: a method that wraps another holds its model twice."""
    found = {each.data_ptr(): (name, each) for name, each in reversed(method.state_dict().items())}
    return dict(found.values())


def fill(method: Method, theirs: Tensors) -> None:
    """Put their weights into ours; every tensor of both has its counterpart."""
    own = state(method)
    given = translate(theirs, own)
    if given.keys() != own.keys():
        raise SystemExit(f"names without a counterpart: {sorted(given.keys() ^ own.keys())[:6]}")
    for name, each in given.items():
        own[name].copy_(each)


# --- cases ----------------------------------------------------------------------------------------------------------


def compare(folder: Path, case: Case) -> Case:
    """The row of a case: from the original's weights the first forward and backward, and three steps."""
    found = row(case)
    theirs, given = load_file(folder / case["file"]), load_file(folder / "inputs.safetensors")
    images, labels = given[case["images"]], given[case["labels"]]
    cfg, method, _ = build(case, case["ours"])
    start(method, case, theirs)
    with torch.no_grad():
        before = part(theirs, "before.")
        assert "asked" not in before or len(before["asked"].unique()) > 1, "nothing of the routing is compared"
        found |= compare_answers(method, images[-1], before)
    plan = Plan.of(cfg, len(images[0]))
    optimizer = build_optimizer(method.param_groups(), plan)
    set_lr(optimizer, plan, 0)
    found["rates"] = rate_gap([group["lr"] for group in optimizer.param_groups], theirs["rates"].tolist())
    first = {name: each.clone() for name, each in state(method).items()}
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
            found["gradients"] = compare_gradients(method, part(theirs, "gradient."))
        optimizer.step()
        optimizer.zero_grad()
    found["loss"] = error(losses[0], theirs["losses"][0].view(()))
    with torch.no_grad():
        end = compare_answers(method, images[-1], part(theirs, "end."))
    after = [error(torch.stack(losses), theirs["losses"].flatten()), *filter(None, end.values())]
    found["after_3_steps"] = max(*after, compare_changes(method, first, part(theirs, "after.")))
    return found


def start(method: Method, case: Case, theirs: Tensors) -> None:
    """The original's weights; of its teacher too, and what it draws."""
    fill(method, part(theirs, "start."))
    if "drawn.priors" in theirs:
        use_draws(method, theirs["drawn.experts"], theirs["drawn.priors"])
    teacher = part(theirs, "teacher.")
    if teacher:
        _, earlier, _ = build(case, {}, stage=0)
        fill(earlier, teacher)
        frozen = earlier.eval().requires_grad_(False)
        method.after(Earlier(True, dict, lambda: frozen))


def use_draws(method: Any, experts: Tensor, priors: Tensor) -> None:
    """DirMixE's test priors, all steps' one after another."""
    size = method.options.draws
    given = [Draws(*each) for each in zip(experts.split(size), priors.split(size), strict=True)]
    method._pool = SimpleNamespace(at=lambda epoch, step: given[step])


def compare_answers(method: Method, images: Tensor, theirs: Tensors) -> dict[str, float]:
    """Logits of each expert; of an expert assignment the mean, and the share of images that asked another number."""
    logits = method.eval().expert_logits(images)
    if "logits" in theirs:
        return {"logits": error(logits, theirs["logits"])}
    asked = (~logits[:, :, 0].isnan()).sum(1)
    different = float((asked != theirs["asked"]).double().mean())
    return {"logits": error(method.aggregate(logits), theirs["mean"]), "value": different}


def compare_gradients(method: Method, theirs: Tensors) -> float:
    own = {n: p.grad for n, p in method.named_parameters() if p.requires_grad and p.grad is not None}
    given = translate(theirs, own)
    return largest(own, given, FLOOR) if own.keys() == given.keys() else math.inf


def compare_changes(method: Method, first: Tensors, theirs: Tensors) -> float:
    """Weights and running statistics after the steps, and their changes."""
    own = state(method)
    given = translate(theirs, own)
    changes = ({name: (side[name] - first[name]).double() for name in own} for side in (own, given))
    return max(largest(own, given), largest(*changes, FLOOR))


# --- schedules and aggregation --------------------------------------------------------------------------------------


def compare_rates(case: Case, rates: list[list[float]]) -> Case:
    """Learning rates of all epochs."""
    cfg, method, _ = build(case, {})
    plan = Plan.of(cfg, cfg.batch_size)
    optimizer = build_optimizer(method.param_groups(), plan)
    gaps = [math.inf if plan.epochs != len(rates) else 0.0]
    for epoch, theirs in enumerate(rates):
        set_lr(optimizer, plan, epoch)
        gaps.append(rate_gap([group["lr"] for group in optimizer.param_groups], theirs))
    return row({**case, "name": f"learning rates of {len(rates)} epochs", "note": ""}) | {"rates": max(gaps)}


def rate_gap(ours: list[float], theirs: list[float]) -> float:
    """Between the different rates of all groups."""
    mine, other = sorted(set(ours)), sorted(set(theirs))
    return max(map(gap, mine, other)) if len(mine) == len(other) else math.inf


class InOrder(Learner):
    """Batches as they come, as the original got them."""

    def batches(self) -> tuple[Tensor, ...]:
        return self.positions.split(self.recipe.batch_size)


def compare_weights(folder: Path, script: str, data: str, model: str) -> Case:
    """SADE's weights of the experts after every epoch, with the learning rate and the rest of our config."""
    case = {"repository": "sade", "data": data, "model": model, "name": f"{script}.py", "note": ""}
    theirs, given = load_file(folder / f"{script}.safetensors"), load_file(folder / "inputs.safetensors")
    cfg, method, _ = build(case, {})
    network = method.model.eval()
    views = [given["view1"], given["view2"]]
    if "start.conv1.weight" in theirs:
        fill(method, part(theirs, "start."))
        with torch.no_grad():
            crops = (given["crop1"], given["crop2"])
            views = [network(each.flatten(0, 2)).unflatten(0, each.shape[:3]) for each in crops]
    both = torch.stack(views, 3).flatten(1, 2)  # [epochs, N, 2, E, C]
    where = torch.arange(both.shape[1])
    recipe = replace(Recipe.of(cfg), batch_size=given["view1"].shape[2])
    plain = Logits(both[0, :, 0], torch.zeros_like(where), where)
    torch.set_default_dtype(torch.float64)
    learner = InOrder("", plain, where, recipe)
    path = []
    while learner.running:
        learner.learn(Logits(both[learner.epoch], plain.labels, where))
        path.append(learner.w.detach().clone())
    torch.set_default_dtype(torch.float32)
    return row(case) | {"value": error(torch.stack(path), theirs["path"])}


def row(case: Case) -> Case:
    facts = {name: case[name] for name in ("repository", "name", "model", "data")}
    return facts | dict.fromkeys(FIGURES) | {"note": case["note"]}
