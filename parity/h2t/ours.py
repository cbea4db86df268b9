"""Our side of parity_h2t.py: through our configs and builders, compared with what the original left in files."""

import re
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.datasets import build_info
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.datasets.long_tail import subsample
from tailtune.parity.experts.cases import STEPS, Case
from tailtune.parity.experts.ours import (
    Tensors,
    build,
    compare_changes,
    compare_gradients,
    compare_rates,
    fill,
    row,
    state,
)
from tailtune.parity.h2t.cases import SAMPLES, config_of
from tailtune.parity.lift.ours import error, gap, part
from tailtune.trainers.evaluation import metrics
from tailtune.trainers.methods import Method, h2t
from tailtune.trainers.methods.mixup import Mixup
from tailtune.trainers.optim import Plan, build_optimizer, set_lr

GROUPS = {"many": torch.arange(36), "med": torch.arange(36, 71), "few": torch.arange(71, 100)}
"""Classes of their configs' groups."""
STATISTICS = re.compile(r"running_(mean|var)$")


def compare_stage(each: Case, theirs: Tensors, given: Tensors) -> Case:
    """From the original's weights the first forward and backward, and three epochs of a batch each."""
    cfg, method, _ = build(each, {**each["ours"], "num_epochs": STEPS} if each["stage"] == 2 else each["ours"])
    fill(method, part(theirs, "start."))
    first = {name: tensor.clone() for name, tensor in state(method).items()}
    found = row(each) | {"logits": error(answer(method, given), theirs["before.logits"])}
    draws = torch.Generator().manual_seed(each["stage"])
    if isinstance(method, Mixup):
        drawn = zip(theirs["shares"].tolist(), theirs["orders"], strict=True)
        method._draw = lambda _: next(drawn)  # type: ignore
    with mock.patch.object(h2t, "generator", lambda *_: draws):  # one stream for all steps, as theirs
        losses, rates, gradients = three_epochs(cfg, method, given, part(theirs, "gradient."))
    found |= {"loss": error(losses[0], theirs["losses"][0]), "gradients": gradients}
    found["rates"] = max(gap(*pair) for pair in zip(rates, theirs["rates"].tolist(), strict=True))
    after = part(theirs, "after.")
    found["after_3_steps"] = max(
        error(losses, theirs["losses"]),
        error(answer(method, given), theirs["end.logits"]),
        compare_changes(method, first, after),
    )
    held = {name: tensor for name, tensor in state(method).items() if STATISTICS.search(name)}
    same = {name.removeprefix("model.encoder.net."): tensor for name, tensor in held.items()}
    return found | {"value": max(error(tensor, after[name]) for name, tensor in same.items())}


def three_epochs(cfg: CfgNode, method: Method, given: Tensors, first: Tensors) -> tuple[Tensor, list[float], float]:
    """Losses [3] and learning rates of the steps, and the largest error of the first gradients."""
    plan = Plan.of(cfg, cfg.batch_size)
    optimizer = build_optimizer(method.param_groups(), plan)
    method.train()
    losses, rates, gradients = [], [], 0.0
    for epoch in range(STEPS):
        method.train().on_epoch(epoch, cfg.num_epochs)
        rates.append(set_lr(optimizer, plan, epoch))
        method.before_step(epoch + 1)
        labels = given["labels"][epoch]
        batch = {"image": given["images"][epoch], "partner": given["partners"][epoch], "label": labels}
        outcome = method({**batch, "weight": torch.ones_like(labels).double(), "index": torch.arange(len(labels))})
        losses.append(outcome.loss_sum / outcome.weight)
        losses[-1].backward()
        if epoch == 0:
            gradients = compare_gradients(method, first)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach(), rates, gradients


@torch.no_grad()
def answer(method: Method, given: Tensors) -> Tensor:
    return method.eval().expert_logits(given["images"][-1])


def compare_loss(each: Case, theirs: Tensors, given: Tensors) -> Case:
    """Of random logits, and its gradient."""
    _, method, _ = build(each, each["ours"])
    logits = given[f"logits.{each['data']}"][:, : each["experts"]].clone().requires_grad_()
    batch = {"label": given[f"labels.{each['data']}"], "weight": torch.ones(SAMPLES).double()}
    loss_sum, weight = method.loss(logits, batch)
    (loss_sum / weight).backward()
    assert logits.grad is not None
    found = row(each) | {"loss": error(loss_sum / weight, theirs["loss"])}
    found["gradients"] = error(logits.grad, theirs["gradient"])
    if "as_it_is" in theirs:
        away = error(loss_sum / weight, theirs["as_it_is"])
        found["note"] = (
            f"as it is, log(p + 1e-7) ends at -16: on logits as wide as these the loss differs by {away:.0e}"
        )
    return found


def compare_masks(each: Case, theirs: Tensors) -> Case:
    """The share of the channels that only one side overwrites, of all shares."""
    draws = torch.Generator().manual_seed(each["width"])
    zeros, experts, gaps = torch.zeros(1, each["width"]), each["experts"], []
    for name, mask in sorted(theirs.items()):
        fused = h2t.fused(zeros, zeros + 1, float(name.removeprefix("share.")), experts, draws)
        gaps.append(float((fused.view(experts, -1) != mask).double().mean()))
    return row(each) | {"value": max(gaps)}


def compare_rates_and_more(each: Case, theirs: dict[str, Any]) -> Case:
    """Learning rates of all epochs; the optimizer's and the loader's other numbers."""
    cfg = config_of(each["data"], each["model"])
    return compare_rates(each, theirs["rates"]) | {
        "value": max(gap(cfg[name], theirs[name]) for name in ("weight_decay", "momentum", "batch_size"))
    }


def compare_figures(each: Case, theirs: Tensors, given: Tensors) -> Case:
    found = metrics.evaluate(given["test.logits"], given["test.labels"], GROUPS)
    diagram = found["calibration"]
    names = ("many_acc", "med_acc", "few_acc")
    own = [found["accuracy"], diagram["ece"], diagram["mce"], *(found[name] for name in names)]
    bins = [
        torch.tensor([share or 0.0 for share in diagram[name]], dtype=torch.float64) / 100
        for name in ("accuracy", "confidence")
    ]
    gaps = [gap(*pair) for pair in zip(own, theirs["figures"].tolist(), strict=True)]
    gaps += [error(mine, theirs[name]) for mine, name in zip(bins, ("accuracies", "confidences"), strict=True)]
    assert theirs["counts"].tolist() == diagram["counts"], "bins hold other samples"
    return row(each) | {"value": max(gaps)}


def compare_tail(each: Case, theirs: Tensors) -> list[Case]:
    """Images and their order: the share that is not the same; how likely the other sampler draws each class."""
    cfg = config_of(each["data"], "resnet32_h2t")
    counts = build_info(cfg).class_counts
    classes = len(counts)
    positions = torch.from_numpy(subsample(np.arange(50000) % classes, counts.tolist()))
    assert theirs["counts"].tolist() == counts.tolist()
    different = float((positions != theirs["positions"]).double().mean())
    rows = [row({**each, "name": "images of the long tail"}) | {"value": different}]
    labels = torch.repeat_interleave(torch.arange(classes), counts)
    here = labels[SAMPLERS["shuffle"].order(labels, 0, 0)].bincount().double() / len(labels)
    rows.append(row({**each, "name": "pair_sampler shuffle"}) | {"value": error(here, theirs["shuffle"])})
    rare = SAMPLERS["reverse"].frequencies(counts.double())
    return [*rows, row({**each, "name": "pair_sampler reverse"}) | {"value": error(rare, theirs["reverse"])}]
