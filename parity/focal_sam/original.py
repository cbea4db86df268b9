"""Focal-SAM's side, run in a checkout of it: `python -m tailtune.parity.focal_sam.original FOLDER focal_sam`."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import torch
from torch import Tensor

from tailtune.parity.job import Case, Job, Tensors


def main(folder: Path, part: str) -> None:
    """Answer the job in a folder."""
    torch.set_default_dtype(torch.float64)
    torch.cuda.FloatTensor = torch.DoubleTensor  # type: ignore[attr-defined]
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    sys.modules["utils"] = MagicMock()
    Job.read(folder, part).answer("steps", steps)


def steps(case: Case, job: Job) -> Tensors:
    """The parameters at the start and after the steps, in the order of the network."""
    counts, given = job.settings["counts"][case["data"]], case["given"]
    net = importlib.import_module("models").resnet32(num_classes=len(counts))
    start = [parameter.detach().clone() for parameter in net.parameters()]
    criterion = importlib.import_module("losses").LALoss(cls_num_list=counts, reduction="none")
    kinds = {"focal": ("focal_sam", "FocalSAM"), "sam": ("sam", "SAM")}
    module, kind = kinds[given["mode"]]
    optimizer = getattr(importlib.import_module(module), kind)(
        params=net.parameters(), base_optimizer=torch.optim.SGD, rho=given["rho"], **case["optimizer"]
    )
    take = importlib.import_module("train_step").focal_sam_step
    args = Namespace(prec="fp32", flat_gamma=given["gamma"], sharpness=given["strength"])
    for images, labels in zip(job.inputs["images"], job.inputs[f"labels.{case['data']}"], strict=True):
        if given["mode"] == "focal":
            take(args, net, criterion, images, labels, optimizer, counts)
            continue
        for step in (optimizer.first_step, optimizer.second_step):  # as in the script's loop
            criterion(net(images), labels).mean().backward()
            step(zero_grad=True)
    after = [parameter.detach() for parameter in net.parameters()]
    return {
        f"{name}.{i}": each for name, all_of in (("start", start), ("after", after)) for i, each in enumerate(all_of)
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
