"""DirMixE's side, run in a checkout of DirMixE: `python -m tailtune.parity.dirmixe.original FOLDER dirmixe`.

Networks run as those of `parity/experts/original.py`, by their train.py. What is drawn in fp32 comes before the patches
that turn everything into fp64.
"""

import functools
import importlib
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
import torchvision
from torch import Tensor

from tailtune.parity.experts.original import SMALL, patch, traced_rates, train
from tailtune.parity.job import Case, Job, Tensors

TRIALS = ("uniform",) * 3 + ("forward",) * 3 + ("backward",) * 3


def main(folder: Path, part: str) -> None:
    """Answer the job in a folder."""
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.sort = functools.partial(torch.sort, stable=True)
    sys.modules["pandas"] = MagicMock(__spec__=ModuleSpec("pandas", None))
    positions_as_images()
    job = Job.read(folder, part)
    job.answer("pools", pool)
    job.answer("sets", test_sets)
    patch()
    job.answer("losses", loss)
    job.answer("networks", train, seed=1000)
    job.write_facts(part, {"phases": final_epochs, "rates": rates})


def positions_as_images() -> None:
    """Let every image of torchvision's CIFAR be its position, of shape [1], and let the classes take turns."""

    def without_files(self: Any, root: str, train: bool = True, *_: Any, **__: Any) -> None:
        size = 50000 if train else 10000
        hundred = isinstance(self, torchvision.datasets.CIFAR100) or getattr(self, "cls_num", 10) == 100
        self.data = np.arange(size).reshape(-1, 1)
        self.targets = [index % (100 if hundred else 10) for index in range(size)]

    for dataset in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        dataset.__init__ = without_files


# --- the loss --------------------------------------------------------------------------------------------------------


def criterion(counts: list[int], arguments: Case) -> Any:
    """The original's loss."""
    return importlib.import_module("model.loss").LogitAdjustExpertLoss(counts, **arguments)


def drawn(pool_of_loss: list[tuple[Tensor, int]]) -> Tensors:
    """A pool as tensors: k [M], w [M, C]."""
    priors, experts = zip(*pool_of_loss, strict=True)
    return {"experts": torch.tensor(experts), "priors": torch.stack(list(priors))}


def pool(case: Case, _: Job) -> Tensors:
    """The pool of each epoch, after its shuffle. Before them the data set chooses its images, if it is CIFAR."""
    np.random.seed(0)
    counts = case["counts"]
    if case["chooses"]:
        dataset = getattr(importlib.import_module("data_loader.imbalance_cifar"), f"IMBALANCECIFAR{len(counts)}")
        counts = dataset("", imb_type="exp", imb_factor=0.01).get_cls_num_list()
    loss_of_case = criterion(counts, case["arguments"])
    loss_of_case.generate_weights_pool(case["per_epoch"])
    tensors: Tensors = {"counts": torch.tensor(counts)}
    for epoch in range(case["epochs"]):
        loss_of_case.start_new_epoch(epoch + 1, 201)
        tensors |= {f"{name}.{epoch}": tensor for name, tensor in drawn(loss_of_case.pool).items()}
    return tensors


def final_epochs(case: Case, _: Job) -> dict[int, list[int]]:
    """Length of a run → its epochs, counted from 1, in which the semi-variance counts."""
    epochs_of_runs: dict[int, list[int]] = {}
    for epochs in case["runs"]:
        loss_of_run = criterion(case["counts"], {})
        loss_of_run.pool = []
        epochs_of_runs[epochs] = []
        for epoch in range(1, epochs + 1):
            loss_of_run.start_new_epoch(epoch, epochs + 1)  # as their trainer calls it
            epochs_of_runs[epochs] += [] if loss_of_run.flag else [epoch]
    return epochs_of_runs


def loss(case: Case, job: Job) -> Tensors:
    """The loss of random logits and its gradient."""
    np.random.seed(0)
    loss_of_case = criterion(case["counts"], case["arguments"])
    loss_of_case.generate_weights_pool(1)
    loss_of_case.start_new_epoch(case["epoch"], 201)
    logits = job.inputs[f"logits.{case['data']}"].clone().requires_grad_()
    value = loss_of_case(None, job.inputs[case["labels"]], {"logits": logits.transpose(0, 1)})
    value.backward()
    assert logits.grad is not None
    return {"loss": value, "gradient": logits.grad, **drawn(loss_of_case.pool)}


def rates(case: Case, job: Job) -> list[list[float]]:
    """Learning rates of all parameter groups in every epoch, with a small network."""
    return traced_rates({**case, "change": {**case["change"], "arch": SMALL}}, job)


# --- test sets -------------------------------------------------------------------------------------------------------


def test_sets(case: Case, job: Job) -> Tensors:
    """The images of all trials to learn from and to evaluate, as positions in the list that the script reads."""
    script = importlib.import_module(case["script"])
    script.fix_numpy_seed(0)
    lists, positions = _lists(case, job.folder) if case["list"] else ({}, _first_columns)
    tensors: Tensors = {}
    for trial, component in enumerate(TRIALS):
        options = {"batch_size": 128, "training": False, "num_workers": 0, "reverse": component == "backward"}
        options["test_imb_factor"] = 1 if component == "uniform" else case["ratio"]
        loader = getattr(script, case["loader"])("", **options, **lists)
        tensors[f"learn.{trial}"] = positions(loader.train_dataset)
        tensors[f"evaluate.{trial}"] = positions(loader.val_dataset)
    return tensors


def _first_columns(dataset: Any) -> Tensor:
    return torch.from_numpy(dataset.data[:, 0])


def _lists(case: Case, folder: Path) -> tuple[Case, Callable[[Any], Tensor]]:
    """Options of the loader, with a training list of our counts; and a function, data set → positions of its images."""
    path = folder / "train.txt"
    path.write_text("".join(f"- {k}\n" * count for k, count in enumerate(case["counts"])))
    lines = Path(case["list"]).read_text().splitlines()
    position = {line.split()[0]: index for index, line in enumerate(lines)}
    return {"train_txt": str(path)}, lambda dataset: torch.tensor([position[name] for name in dataset.img_path])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
