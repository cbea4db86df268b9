"""Our side of the comparison with H2T: through our configs and builders."""

import re
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.datasets.build_data import build_info
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.datasets.long_tail import subsample
from tailtune.parity.errors import error, number_error, with_prefix
from tailtune.parity.experts.cases import STEPS
from tailtune.parity.experts.ours import build, change_error, fill, gradient_error, rates_row, row, state
from tailtune.parity.h2t.cases import SAMPLES, config_of
from tailtune.parity.job import Case, Job, Tensors
from tailtune.parity.subject import Row
from tailtune.trainers.evaluation import metrics
from tailtune.trainers.methods import Method, h2t
from tailtune.trainers.methods.mixup import Mixup
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer, set_lr

GROUPS = {"many": torch.arange(36), "med": torch.arange(36, 71), "few": torch.arange(71, 100)}
"""Classes of the groups in their configs."""
STATISTICS = re.compile(r"running_(mean|var)$")


def compare_stage(case: Case, job: Job) -> list[Row]:
    """The first forward and backward pass and three epochs of a batch each, from the original's weights."""
    original = job.tensors(case)
    epochs = {"num_epochs": STEPS} if case["stage"] == 2 else {}
    cfg, method = build(case, case["our_options"] | epochs)
    fill(method, with_prefix(original, "start."))
    first = {name: tensor.clone() for name, tensor in state(method).items()}
    figures = {"logits": error(logits_of(method, job), original["before.logits"])}
    draws = torch.Generator().manual_seed(case["stage"])
    if isinstance(method, Mixup):
        drawn = zip(original["shares"].tolist(), original["orders"], strict=True)
        method.draw = lambda _: next(drawn)  # type: ignore[assignment]
    with mock.patch.object(h2t, "generator", lambda *_: draws):  # one stream for all steps, as theirs
        losses, rates, figures["gradients"] = three_epochs(cfg, method, job, with_prefix(original, "gradient."))
    figures["loss"] = error(losses[0], original["losses"][0])
    figures["rates"] = max(number_error(*pair) for pair in zip(rates, original["rates"].tolist(), strict=True))
    after = with_prefix(original, "after.")
    figures["after_3_steps"] = max(
        error(losses, original["losses"]),
        error(logits_of(method, job), original["end.logits"]),
        change_error(method, first, after),
    )
    statistics = {name: tensor for name, tensor in state(method).items() if STATISTICS.search(name)}
    figures["value"] = max(
        error(tensor, after[name.removeprefix("model.encoder.net.")]) for name, tensor in statistics.items()
    )
    return [row(case, **figures)]


def three_epochs(cfg: CfgNode, method: Method, job: Job, first: Tensors) -> tuple[Tensor, list[float], float]:
    """Train for three epochs of a batch each.

    Args:
        cfg: config of the method.
        method: with the weights to start from.
        job: has images, second images and labels.
        first: the original's first gradients.

    Returns:
        Losses [3], learning rates of the epochs, and the largest error of the first gradients.
    """
    plan = Plan.of(cfg, cfg.batch_size)
    optimizer = build_optimizer(method.param_groups(), plan)
    method.train()
    losses, rates, errors = [], [], 0.0
    for epoch in range(STEPS):
        method.train().on_epoch(epoch, cfg.num_epochs)
        rates.append(set_lr(optimizer, plan, epoch))
        method.before_step(epoch + 1)
        labels = job.inputs["labels"][epoch]
        batch = {"image": job.inputs["images"][epoch], "partner": job.inputs["partners"][epoch], "label": labels}
        outcome = method({**batch, "weight": torch.ones_like(labels).double(), "index": torch.arange(len(labels))})
        losses.append(outcome.loss_sum / outcome.weight)
        losses[-1].backward()
        if epoch == 0:
            errors = gradient_error(method, first)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).detach(), rates, errors


@torch.no_grad()
def logits_of(method: Method, job: Job) -> Tensor:
    """Logits [B, E, C] of the last batch in evaluation mode."""
    return method.eval().expert_logits(job.inputs["images"][-1])


def compare_loss(case: Case, job: Job) -> list[Row]:
    """The loss of random logits and its gradient."""
    original = job.tensors(case)
    _, method = build(case, case["our_options"])
    logits = job.inputs[f"logits.{case['data']}"][:, : case["experts"]].clone().requires_grad_()
    batch = {"label": job.inputs[f"labels.{case['data']}"], "weight": torch.ones(SAMPLES).double()}
    with mock.patch.object(method.model, "logits", lambda features: features):
        head_logits = method.head_logits(logits)  # as the method changes the logits of its heads
    loss_sum, weight = method.loss(head_logits, batch)
    loss = loss_sum / weight
    loss.backward()
    assert logits.grad is not None
    note = ""
    if "as_it_is" in original:
        difference = error(loss, original["as_it_is"])
        note = f"as it is, log(p + 1e-7) ends at -16: on logits as wide as these the loss differs by {difference:.0e}"
    figures = {"loss": error(loss, original["loss"]), "gradients": error(logits.grad, original["gradient"])}
    return [row(case | {"note": note}, **figures)]


def compare_masks(case: Case, job: Job) -> list[Row]:
    """The largest share of the channels that only one side overwrites."""
    draws = torch.Generator().manual_seed(case["width"])
    zeros, experts, different = torch.zeros(1, case["width"]), case["experts"], []
    for name, mask in sorted(job.tensors(case).items()):
        fused = h2t.fused(zeros, zeros + 1, float(name.removeprefix("share.")), experts, draws)
        different.append(float((fused.view(experts, -1) != mask).double().mean()))
    return [row(case, value=max(different))]


def compare_rates(case: Case, job: Job) -> list[Row]:
    """Learning rates of all epochs; weight decay, momentum and batch size."""
    original = job.fact("rates", case)
    cfg = config_of(case["data"], case["model"])
    names = ("weight_decay", "momentum", "batch_size")
    errors = [number_error(cfg[name], original[name]) for name in names]
    return [rates_row(case, original["rates"]) | {"value": max(errors)}]


def compare_figures(case: Case, job: Job) -> list[Row]:
    """Accuracy, ECE, MCE, accuracy of groups, and the bins of the reliability diagram."""
    original = job.tensors(case)
    ours = metrics.evaluate(job.inputs["test.logits"], job.inputs["test.labels"], GROUPS)
    diagram = ours["calibration"]
    numbers = [ours["accuracy"], diagram["ece"], diagram["mce"], ours["many_acc"], ours["med_acc"], ours["few_acc"]]
    errors = [number_error(*pair) for pair in zip(numbers, original["figures"].tolist(), strict=True)]
    for our_name, name in (("accuracy", "accuracies"), ("confidence", "confidences")):
        bins = torch.tensor([share or 0.0 for share in diagram[our_name]], dtype=torch.float64) / 100
        errors.append(error(bins, original[name]))
    assert original["counts"].tolist() == diagram["counts"], "bins hold other samples"
    return [row(case, value=max(errors))]


def compare_tail(case: Case, job: Job) -> list[Row]:
    """Images in their order: the share that differs. Class frequencies that two pair samplers draw: their errors."""
    original = job.tensors(case)
    counts = build_info(config_of(case["data"], "resnet32_h2t")).class_counts
    classes = len(counts)
    positions = torch.from_numpy(subsample(np.arange(50000) % classes, counts.tolist()))
    assert original["counts"].tolist() == counts.tolist()
    different = float((positions != original["positions"]).double().mean())
    labels = torch.repeat_interleave(torch.arange(classes), counts)
    shuffle = labels[SAMPLERS["shuffle"].order(labels, 0, 0)].bincount().double() / len(labels)
    reverse = SAMPLERS["reverse"].frequencies(counts.double())
    return [
        row(case | {"name": "images of the long tail"}, value=different),
        row(case | {"name": "pair_sampler shuffle"}, value=error(shuffle, original["shuffle"])),
        row(case | {"name": "pair_sampler reverse"}, value=error(reverse, original["reverse"])),
    ]
