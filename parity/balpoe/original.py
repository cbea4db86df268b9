"""The side of BalPoE and LGLA, run in a checkout: `python -m tailtune.parity.balpoe.original FOLDER balpoe | lgla`.

Networks run as those of `parity/experts/original.py`, by their train.py.
"""

import importlib
import random
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as pixels

from tailtune.parity.balpoe.cases import SAMPLES, SCALE, SEEDS
from tailtune.parity.experts.original import SMALL, patch, traced_rates, train
from tailtune.parity.job import Case, Job, Tensors

ONLY_LOG = ("pytorch_lightning", "pytorch_lightning.loggers", "torchsummary", "thop")
"""Packages that only log or count, or that are not called."""


def main(folder: Path, part: str) -> None:
    """Answer the cases of one original in a folder."""
    for name in ONLY_LOG:
        sys.modules[name] = mock.MagicMock(__spec__=ModuleSpec(name, None))
    job = Job.read(folder, part)
    job.answer("pictures", augmented)
    patch()
    job.answer("losses", loss)
    job.answer("networks", train_mixed, seed=1000)
    job.write_facts(part, {"strengths": strengths, "rates": rates})


def train_mixed(case: Case, job: Job) -> Tensors:
    """As `train`, with the shares λ and the orders of the second images that mixup draws."""
    shares: list[float] = []
    orders: list[Tensor] = []

    def noted(function: Callable[..., Any], drawn: list[Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            drawn.append(function(*arguments))
            return drawn[-1]

        return call

    with (
        mock.patch.object(np.random, "beta", noted(np.random.beta, shares)),
        mock.patch.object(torch, "randperm", noted(torch.randperm, orders)),
    ):
        tensors = train(case, job)
    if not shares:
        return tensors
    return tensors | {"drawn.shares": torch.tensor(shares, dtype=torch.float64), "drawn.orders": torch.stack(orders)}


def loss(case: Case, job: Job) -> Tensors:
    """LGLA's loss of logits, and its gradient."""
    experts, data = case["experts"], case["data"]
    criterion = importlib.import_module("model.loss").DiverseExpertLoss
    loss_of_case = criterion(job.settings["counts"][data], num_experts=experts, s=SCALE, tau=case["tau"])
    logits = job.inputs[f"logits.{data}"][:, :experts].clone().requires_grad_()
    value = loss_of_case(None, job.inputs[f"labels.{SAMPLES}.{data}"], {"logits": logits.transpose(0, 1)})
    value.backward()
    assert logits.grad is not None
    return {"loss": value, "gradient": logits.grad}


def strengths(case: Case, _: Job) -> dict[str, list[list[float]]]:
    """τ of 1, 2, … experts, for both ways to space them."""
    parse, config = importlib.import_module("utils").parse_tau_list, {"tau_min": -1.0, "tau_max": 3.0}
    return {
        spacing: [
            parse({"arch": {"args": {"num_experts": n}}, "loss": {**config, "args": {"tau_list": spacing}}})
            for n in range(1, case["most"] + 1)
        ]
        for spacing in ("limits", "uniform")
    }


def augmented(_: Case, job: Job) -> Tensors:
    """The pictures after RandAugment [SEEDS, N, 3, H, W]."""
    made = importlib.import_module("dataset.others").aug_plus(dataset="ImageNet_LT", mode="train")
    (policy,) = (step for step in made.transforms if type(step).__name__ == "RandAugment")
    return {"pictures": torch.stack([changed(policy, job.inputs["pictures"], seed) for seed in range(SEEDS)])}


def changed(policy: Callable[..., Any], pictures: Tensor, seed: int) -> Tensor:
    """Pictures uint8 [N, 3, H, W] after a change that draws from the generators of Python and NumPy."""
    random.seed(seed), np.random.seed(seed)
    return torch.stack([pixels.pil_to_tensor(policy(pixels.to_pil_image(picture))) for picture in pictures])


def rates(case: Case, job: Job) -> list[list[float]]:
    """Learning rates of all parameter groups in every epoch, with a small network."""
    return traced_rates({**case, "change": {**case["change"], "arch": SMALL}}, job)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
