"""The side of RIDE, SADE and BatchFormer, run in a folder of their code.

`python -m tailtune.parity.experts.original FOLDER ride | sade | batchformer | balanced`. Nothing of an original is
changed on disk. What it cannot do without CUDA or with a new PyTorch is replaced in memory; PATCHES of subject.py says
what.
"""

import functools
import importlib
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torchvision  # noqa: F401  before the patches
from torch import Tensor, nn

from tailtune.parity.experts.networks import ask_half, evaluated, named, shake, without_dropout
from tailtune.parity.experts.other_scripts import aggregation, general_batchformer
from tailtune.parity.job import Case, Job, Tensors

SMALL = {"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 3}}
"""A network in place of those whose learning rates alone are compared."""


def main(folder: Path, part: str) -> None:
    """Answer the cases of one original in a folder."""
    job = Job.read(folder, part)
    patch()
    job.answer("networks", general_batchformer if part == "balanced" else train, seed=1000)
    job.answer("scripts", aggregation)
    job.write_facts(part, {"rates": rates})


def patch() -> None:
    """fp64 where the originals write `float`, no CUDA, boolean masks, stand-ins for packages that only log."""
    torch.set_default_dtype(torch.float64)
    torch.float = torch.float64
    torch.FloatTensor = torch.DoubleTensor  # type: ignore[assignment,misc]
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.uint8 = torch.bool
    torch.sort = functools.partial(torch.sort, stable=True)
    for name in ("pandas", "higher", "h5py"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


class Loader:
    """In place of the original's data loader: batches of images and labels, and class counts."""

    n_samples = batch_size = 1

    def __init__(self, batches: list[tuple[Tensor, Tensor]], counts: list[int]) -> None:
        self.batches, self.cls_num_list = batches, counts

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def split_validation(self) -> None:
        return None


# --- their own main(), from the config to the optimizer's step ------------------------------------------------------


def launch(case: Case, loader: Loader, folder: Path, in_place_of_training: Callable[[Any], None]) -> None:
    """Run `main` of their train.py up to the trainer.

    Args:
        case: its `config` is the original's, its `change` what is changed in it.
        loader: in place of theirs.
        folder: where the original may write.
        in_place_of_training: called with the trainer, which does not train.
    """
    script: Any = importlib.import_module("train_places" if case["data"] == "places_lt" else "train")
    config = importlib.import_module("utils").read_json(Path("configs") / case["config"])
    config["n_gpu"], config["trainer"]["save_dir"] = 1, str(folder / "runs")
    change = ({"distill_checkpoint": ""} if config.get("distill") else {}) | case["change"]
    parsed = importlib.import_module("parse_config").ConfigParser(config, None, change, run_id="")

    class Run(importlib.import_module("trainer").Trainer):  # type: ignore[misc]
        train = in_place_of_training

    script.Trainer = Run
    script.module_data = types.SimpleNamespace(**{config["data_loader"]["type"]: lambda **_: loader})
    torch.load = lambda *_, **__: {"state_dict": random_teacher(parsed, script.module_arch)}
    options = Namespace(pretrained=None, rank=-1, add_bt=case["change"].get("arch;args;add_bt", 0))
    script.main(*(parsed, options)[: script.main.__code__.co_argcount])


def random_teacher(parsed: Any, networks: Any) -> Tensors:
    """The weights of a teacher, in place of those in a file."""
    teacher = parsed.init_obj("distill_arch", networks)
    shake(teacher)
    return dict(teacher.state_dict())


def train(case: Case, job: Job) -> Tensors:
    """Weights to start from, first forward pass and gradients, and what three steps of their loop lead to."""
    images, labels = job.inputs[case["images"]], job.inputs[case["labels"]]
    batches = list(zip(images[:-1], labels[:-1], strict=True))
    tensors: Tensors = {}

    def three_steps(run: Any) -> None:
        without_dropout(run.model)
        shake(run.model)
        if run.real_model.requires_target:
            ask_half(run.model, images[-1])
        tensors.update(named("start", run.model.state_dict()))
        if hasattr(run, "teacher_model"):
            run.teacher_model.eval()
            tensors.update(named("teacher", run.teacher_model.state_dict()))
        tensors.update(named("before", evaluated(run.model, images[-1])))
        losses = watch(run, tensors)
        run._train_epoch(*(case["epoch"], run.epochs + 1)[: run._train_epoch.__code__.co_argcount - 1])
        if hasattr(run.criterion, "pool"):  # DirMixE's test priors, in the order in which they were used
            tensors["drawn.priors"] = torch.stack([prior for prior, _ in run.criterion.pool])
            tensors["drawn.experts"] = torch.tensor([expert for _, expert in run.criterion.pool])
        tensors.update(named("after", run.model.state_dict()))
        tensors.update(named("end", evaluated(run.model, images[-1])))
        tensors["losses"] = torch.stack(losses)

    launch(case, Loader(batches, job.settings["counts"][case["data"]]), job.folder, three_steps)
    return tensors


def watch(run: Any, tensors: Tensors) -> list[Tensor]:
    """Note the first gradients and learning rates in `tensors`, and every loss in the list, while their loop runs."""
    losses: list[Tensor] = []
    step, update = run.optimizer.step, run.train_metrics.update

    def note_and_step() -> None:
        if "rates" not in tensors:
            gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
            tensors.update(named("gradient", gradients))
            tensors["rates"] = torch.tensor([group["lr"] for group in run.optimizer.param_groups])
        step()

    def note_and_update(name: str, value: Any, *more: Any) -> None:
        if name == "loss":
            losses.append(torch.tensor(value))
        update(name, value, *more)

    run.optimizer.step, run.train_metrics.update = note_and_step, note_and_update
    return losses


def rates(case: Case, job: Job) -> list[list[float]]:
    """Learning rates of all parameter groups in every epoch, with a small network and no teacher."""
    return traced_rates({**case, "change": {"arch": SMALL, "distill_arch": SMALL, "distill": False}}, job)


def traced_rates(case: Case, job: Job) -> list[list[float]]:
    """Learning rates of all parameter groups in every epoch."""
    rates_of_epochs: list[list[float]] = []

    def trace(run: Any) -> None:
        for _ in range(run.epochs):
            rates_of_epochs.append([group["lr"] for group in run.optimizer.param_groups])
            run.optimizer.step()
            run.lr_scheduler.step()

    launch(case, Loader([], job.settings["counts"][case["data"]]), job.folder, trace)
    return rates_of_epochs


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
