"""The originals' side of parity_experts.py beside train.py: SADE's aggregation, the general BatchFormer."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from tailtune.parity.experts.networks import Tensors, named, shake, without_dropout

Case = dict[str, Any]


class Given(nn.Module):
    """A network whose images are their logits already."""

    def forward(self, logits: Tensor) -> Tensors:
        return {"logits": logits}


def aggregate(script: str, config: str, given: Tensors, folder: Path) -> Tensors:
    """Weights before softmax after every epoch, by the script's function and the optimizer of its config."""
    module = importlib.import_module(script)
    from utils import read_json  # theirs

    settings = read_json(Path("configs") / config)
    model: nn.Module = Given()
    names = ("view1", "view2")
    out: Tensors = {}
    if script == "test_training_cifar":
        model, names = module.module_arch.ResNet32Model(**settings["arch"]["args"]), ("crop1", "crop2")
        shake(model)
        out = named("start", model.state_dict())
    weight = nn.Parameter(torch.full((3,), 1 / 3))
    options = {key: each for key, each in settings["optimizer"]["args"].items() if key != "share_lr"}
    optimizer, path, function = torch.optim.SGD([weight], **options), [], module.test_training
    known = {"model": model, "aggregation_weight": weight, "optimizer": optimizer}
    for first, second in zip(given[names[0]], given[names[1]], strict=True):
        known["train_data_loader"] = [([a, b], None) for a, b in zip(first, second, strict=True)]
        rounded = function(*(known.get(name) for name in inspect.signature(function).parameters))
        path.append(weight.detach().clone())
        if min(rounded) < 0.05:
            break
    return {**{name: each.contiguous() for name, each in out.items()}, "path": torch.stack(path)}


def balanced(case: Case, job: Case, given: Tensors, folder: Path) -> Tensors:
    """The general BatchFormer: their forward, loss and step of a batch, in the order of their loop."""
    import numpy as np
    import yaml

    folder.joinpath("freq.json").write_text(json.dumps(job["counts"][case["data"]]))
    config = yaml.safe_load(Path("config/ImageNet_LT/balanced_softmax_resnet10.yaml").read_text())
    config["training_opt"]["log_dir"] = str(folder)
    config["criterions"]["PerformanceLoss"]["loss_params"] = {"freq_path": str(folder / "freq.json")}
    config["criterions"]["PerformanceLoss"]["weight"] = 1 / 3
    config |= {"coslrwarmup": False}
    np.load = lambda *_, **__: np.ones(1)
    images, labels = given[case["images"]], given[case["labels"]]
    run = importlib.import_module("run_networks").model(config, {"train": MagicMock()}, add_bt=1)
    run.centroids = None
    parts = {**run.networks, "bt": run.encoder_layers}
    for each in parts.values():
        without_dropout(each)
        shake(each)
    out = named("start", state(parts))
    out["before.logits"] = shared_logits(run, images[-1])
    out["rates"] = torch.tensor([group["lr"] for group in run.model_optimizer.param_groups])
    losses = []
    for batch, targets in zip(images[:-1], labels[:-1], strict=True):
        for each in parts.values():
            each.train()
        run.batch_forward(batch, targets, phase="train")
        run.batch_loss(torch.cat([targets, targets]))
        run.batch_backward(targets)
        losses.append(run.loss.detach())
        if len(losses) == 1:
            grads = {f"{k}.{n}": p.grad for k, part in parts.items() for n, p in part.named_parameters()}
            out |= named("gradient", {name: each for name, each in grads.items() if each is not None})
    out |= {**named("after", state(parts)), "losses": torch.stack(losses)}
    out["end.logits"] = shared_logits(run, images[-1])
    return {name.replace("module.", ""): each.detach().clone().contiguous() for name, each in out.items()}


def state(parts: dict[str, nn.Module]) -> Tensors:
    return {f"{key}.{name}": each for key, part in parts.items() for name, each in part.state_dict().items()}


@torch.no_grad()
def shared_logits(run: Any, images: Tensor) -> Tensor:
    for part in run.networks.values():
        part.eval()
    run.batch_forward(images, phase="test")
    return run.logits.unsqueeze(1).clone()
