"""H2T's side, run in a checkout of H2T: `python -m tailtune.parity.h2t.original FOLDER h2t`.

Both stages run by `main_worker` of their scripts; an epoch is one batch. Their data set, test and files are replaced in
memory, as are the things that `parity/experts/original.py` replaces.
"""

import importlib
import pathlib
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.parity.dirmixe.original import positions_as_images
from tailtune.parity.experts.networks import named, shake
from tailtune.parity.experts.original import patch
from tailtune.parity.job import Case, Job, Tensors

SHARES = (0.0, 0.25, 0.29, 0.3, 0.5, 1.0)
"""Shares of the channels, for the masks."""


def main(folder: Path, part: str) -> None:
    """Answer the job in a folder."""
    sys.modules["pathlib2"] = pathlib
    positions_as_images()
    patch()
    job = Job.read(folder, part)
    kinds = {"stages": stage, "losses": loss, "masks": masks, "figures": figures, "tails": tail}
    for kind, function in kinds.items():
        job.answer(kind, function)
    job.write_facts(part, {"rates": rates})


def config_of(case: Case, *words: object) -> Any:
    """Their config of the case's file, with keys and values that are changed in it."""
    logger = importlib.import_module("utils.logger")
    config = logger._C.clone()
    config.set_new_allowed(True)
    if "config" in case:
        logger.update_config(config, Namespace(cfg=case["config"], opts=[]))
    config.merge_from_list(list(words))
    return config


# --- their scripts ---------------------------------------------------------------------------------------------------


class OneBatchAnEpoch:
    """In place of their data loader: each pass over it takes the next of some batches."""

    batch_size, dataset = 1, (None,)

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield next(self.batches)

    def __len__(self) -> int:
        return 1


def launch(case: Case, job: Job, config: Any, batches: Iterator[Any], **replaced: Callable[..., Any]) -> None:
    """Run `main_worker` of a stage.

    Args:
        case: its `stage` names the script, its `data` the class counts.
        job: has the class counts.
        config: theirs.
        batches: one for each epoch.
        **replaced: functions in place of the script's own ones, and `load` in place of torch's.
    """
    script = importlib.import_module(f"train_stage{case['stage']}")
    counts = job.settings["counts"][case["data"]]
    data = SimpleNamespace(train_instance=OneBatchAnEpoch(batches), eval=None, cls_num_list=counts, dist_sampler=None)
    load = replaced.pop("load", None)
    config.resume = "train_stage1.py" if load else ""  # any file that exists
    functions: dict[str, Any] = {"CIFAR100_LT": lambda *_, **__: data, "save_checkpoint": lambda *_: None, **replaced}
    with mock.patch.multiple(script, **functions), mock.patch.object(torch, "load", load):
        script.main_worker(None, 0, config, mock.MagicMock(), "")


def stage(case: Case, job: Job) -> Tensors:
    """Weights to start from, what is drawn, first gradients, and what three epochs of their loop lead to."""
    changes = (word for pair in case["change"].items() for word in pair)
    config = config_of(case, "num_epochs", job.settings["epochs"], *changes)
    tensors: Tensors = {}
    meters: dict[str, list[Any]] = {"Loss": [], "lr": []}
    orders: list[Tensor] = []
    shares: list[float] = []
    last = job.inputs["images"][-1]

    class Meter(importlib.import_module("utils").AverageMeter):  # type: ignore[misc]
        def update(self, value: Any, n: int = 1) -> None:
            meters.setdefault(self.name, []).append(value)

    def load(*_: Any, **__: Any) -> Case:
        networks = importlib.import_module("models.resnet_cifar")
        model, classifier = networks.resnet32_fe(), networks.Classifier(feat_in=64, num_classes=100)
        shake(model)
        shake(classifier)
        tensors.update(named("start", state(model, classifier)))
        tensors["before.logits"] = logits_of(model, classifier, last)
        torch.manual_seed(case["stage"])
        weights = {"state_dict_model": model.state_dict(), "state_dict_classifier": classifier.state_dict()}
        return {"best_acc1": 0, "its_ece": 0, "epoch": 0, **weights}

    def validate(_: Any, model: nn.Module, classifier: nn.Module, *__: Any) -> tuple[float, float]:
        if "after.conv1.weight" not in tensors:
            parts = {"": model, "classifier.": classifier}
            parameters = {f"{prefix}{n}": p for prefix, part in parts.items() for n, p in part.named_parameters()}
            tensors.update(named("gradient", {n: p.grad for n, p in parameters.items() if p.grad is not None}))
        tensors.update(named("after", state(model, classifier)))
        tensors["end.logits"] = logits_of(model, classifier, last)
        return 0.0, 0.0

    partners = [{"sample_image": images} for images in job.inputs["partners"]]
    batches = zip(job.inputs["images"], job.inputs["labels"], partners, strict=True)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "randperm", recorded(torch.randperm, orders)))
        stack.enter_context(mock.patch.object(np.random, "beta", recorded(np.random.beta, shares)))
        launch(case, job, config, batches, load=load, validate=validate, AverageMeter=Meter)
    drawn = {"orders": torch.stack(orders), "shares": torch.tensor(shares)} if orders else {}
    return tensors | drawn | {"losses": torch.tensor(meters["Loss"]), "rates": torch.tensor(meters["lr"])}


def recorded(function: Callable[..., Any], results: list[Any]) -> Callable[..., Any]:
    """The function, appending what it returns to a list."""

    def call(*args: Any, **kwargs: Any) -> Any:
        results.append(function(*args, **kwargs))
        return results[-1]

    return call


def state(model: nn.Module, classifier: nn.Module) -> Tensors:
    """The tensors of both networks."""
    return model.state_dict() | {f"classifier.{name}": tensor for name, tensor in classifier.state_dict().items()}


@torch.no_grad()
def logits_of(model: nn.Module, classifier: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, 1, C] in evaluation mode."""
    logits: Tensor = classifier.eval()(model.eval()(images))
    return logits.unsqueeze(1)


def rates(case: Case, job: Job) -> Case:
    """Learning rates of the parameter groups in every epoch, weight decay, momentum and batch size."""
    rates_of_epochs: list[list[float]] = []
    facts: Case = {}

    def train(_: Any, __: Any, ___: Any, ____: Any, optimizer: Any, *_____: Any) -> None:
        rates_of_epochs.append([group["lr"] for group in optimizer.param_groups])
        facts.update({name: optimizer.param_groups[0][name] for name in ("weight_decay", "momentum")})

    config = config_of(case)
    launch(case, job, config, iter(()), train=train, validate=lambda *_: (0.0, 0.0))
    return {"rates": rates_of_epochs, **facts, "batch_size": config.batch_size}


# --- functions by themselves -----------------------------------------------------------------------------------------


def loss(case: Case, job: Job) -> Tensors:
    """The loss of random logits and its gradient; of ResLT also the loss `as_it_is`, with what it adds."""
    of_config = {name: value for name, value in case["change"].items() if "." in name}
    config = config_of({}, *(word for name, value in of_config.items() for word in (f"loss.{name}", value)))
    config.dataset = case["data"].split("_")[0]
    loss_type, counts = case["change"]["type"], job.settings["counts"][case["data"]]
    arguments = {name: v for name, v in case["change"].items() if name not in of_config and name != "type"}
    arguments |= {} if loss_type == "LabelAwareSmoothing" else {"config": config}
    criterion = getattr(importlib.import_module("loss"), loss_type)(cls_num_list=counts, **arguments)
    if hasattr(criterion, "_hook_before_epoch"):
        criterion._hook_before_epoch(job.settings["reweighted"] + 1)
    logits = job.inputs[f"logits.{case['data']}"][:, : case["experts"]].clone().requires_grad_()
    target = job.inputs[f"labels.{case['data']}"]
    tensors: Tensors = {}
    if loss_type == "ResLoss":
        tensors["as_it_is"] = criterion(list(logits.unbind(1)), target)
        criterion.softmax = SoftmaxWithoutConstant()
    output = list(logits.unbind(1)) if loss_type == "ResLoss" else logits.mean(1)
    value = criterion(output, target, {"logits": list(logits.unbind(1))} if loss_type == "RIDELoss" else None)
    value.backward()
    assert logits.grad is not None
    return tensors | {"loss": value, "gradient": logits.grad}


class SoftmaxWithoutConstant(nn.Module):
    """A softmax that takes off the constant which ResLT's loss adds to it."""

    def forward(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, 1) - 1e-7


def masks(case: Case, _: Job) -> Tensors:
    """Which channels their function overwrites, for every share in turn: zeros and ones [E, D]."""
    function, width, experts = importlib.import_module("methods").H2T, case["width"], case["experts"]
    torch.manual_seed(width)
    tensors = {}
    for share in SHARES:
        first = torch.zeros(experts, 1, width, 2, 2)
        second = torch.ones_like(first)
        fused = function(first[0], second[0], share) if experts == 1 else function(first, second, share)
        tensors[f"share.{share}"] = fused.view(experts, width, 2, 2).mean((2, 3))
    return tensors


def figures(case: Case, job: Job) -> Tensors:
    """What `validate` returns and prints: accuracy, ECE, MCE, accuracy of three groups; bins of the diagram."""
    script, config, logger = importlib.import_module("train_stage2"), config_of(case), mock.MagicMock()
    diagrams: list[Any] = []
    loader = list(zip(job.inputs["test.logits"].split(500), job.inputs["test.labels"].split(500), strict=True))
    same, in_full = nn.Identity(), lambda self, _: repr(self.item())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(script, "calibration", recorded(script.calibration, diagrams)))
        stack.enter_context(mock.patch.object(Tensor, "__format__", in_full))
        accuracy, ece = script.validate(loader, same, same, F.cross_entropy, config, logger)
    printed = " ".join(str(call.args[0]) for call in logger.info.call_args_list)
    groups = [float(re.findall(rf" {name}Acc ([0-9.e-]+)%", printed)[-1]) for name in "HMT"]
    diagram = diagrams[0]
    bins = {name: torch.tensor(np.asarray(diagram[name])) for name in ("counts", "accuracies", "confidences")}
    mce = 100 * diagram["max_calibration_error"]
    return bins | {"figures": torch.tensor([float(accuracy), float(ece), mce, *groups])}


def tail(case: Case, _: Job) -> Tensors:
    """The long tail: positions of its images, class counts, and class frequencies that two pair samplers draw."""
    name = case["data"].split("_")[0]
    module = importlib.import_module(f"datasets.{name}")
    words = ("sampler.dual_sample.enable", True, "sampler.dual_sample.type", "long-tailed")
    dataset = getattr(module, f"IMBALANCE{name.upper()}")(config_of({}, *words), "", imb_factor=case["factor"])
    dataset.transform, dataset.target_transform = lambda image: image, None
    with mock.patch.object(module.Image, "fromarray", lambda image: image):
        partners = [dataset[index][2]["sample_label"] for index in range(len(dataset.targets))]
    return {
        "positions": torch.from_numpy(dataset.data[:, 0]),
        "counts": torch.tensor(dataset.get_cls_num_list()),
        "reverse": torch.tensor(dataset.class_weight) / dataset.sum_weight,
        "shuffle": torch.tensor(partners).bincount() / len(partners),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
