"""The originals' scripts beside train.py: SADE's test-time aggregation and the general BatchFormer."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from tailtune.parity.experts.networks import named, shake, without_dropout
from tailtune.parity.job import Case, Job, Tensors


class Logits(nn.Module):
    """A network whose images are their logits already."""

    def forward(self, logits: Tensor) -> Tensors:
        return {"logits": logits}


def aggregation(case: Case, job: Job) -> Tensors:
    """`path`: SADE's weights of the experts before softmax after every epoch [epochs, 3].

    By the function of the case's script and the optimizer of its config. Of CIFAR also the weights of the network.
    """
    module = importlib.import_module(case["script"])
    settings = importlib.import_module("utils").read_json(Path("configs") / case["config"])
    model: nn.Module = Logits()
    names = ("view1", "view2")
    tensors: Tensors = {}
    if case["script"] == "test_training_cifar":
        model, names = module.module_arch.ResNet32Model(**settings["arch"]["args"]), ("crop1", "crop2")
        shake(model)
        tensors = named("start", model.state_dict())
    weight = nn.Parameter(torch.full((3,), 1 / 3))
    options = {name: value for name, value in settings["optimizer"]["args"].items() if name != "share_lr"}
    optimizer, path, function = torch.optim.SGD([weight], **options), [], module.test_training
    arguments: Case = {"model": model, "aggregation_weight": weight, "optimizer": optimizer}
    for first, second in zip(job.inputs[names[0]], job.inputs[names[1]], strict=True):
        arguments["train_data_loader"] = [([a, b], None) for a, b in zip(first, second, strict=True)]
        rounded = function(*(arguments.get(name) for name in inspect.signature(function).parameters))
        path.append(weight.detach().clone())
        if min(rounded) < 0.05:
            break
    return {**tensors, "path": torch.stack(path)}


def general_batchformer(case: Case, job: Job) -> Tensors:
    """Three steps of the general BatchFormer: its functions for a batch, in the order of its training loop."""
    images, labels = job.inputs[case["images"]], job.inputs[case["labels"]]
    config = _config(job.settings["counts"][case["data"]], job.folder)
    with mock.patch.object(np, "load", lambda *_, **__: np.ones(1)):
        run = importlib.import_module("run_networks").model(config, {"train": mock.MagicMock()}, add_bt=1)
    run.centroids = None
    parts = {**run.networks, "bt": run.encoder_layers}
    for part in parts.values():
        without_dropout(part)
        shake(part)
    tensors = named("start", state(parts))
    tensors["before.logits"] = shared_logits(run, images[-1])
    tensors["rates"] = torch.tensor([group["lr"] for group in run.model_optimizer.param_groups])
    losses = []
    for batch, targets in zip(images[:-1], labels[:-1], strict=True):
        for part in parts.values():
            part.train()
        run.batch_forward(batch, targets, phase="train")
        run.batch_loss(torch.cat([targets, targets]))
        run.batch_backward(targets)
        losses.append(run.loss.detach())
        if len(losses) == 1:
            gradients = {f"{k}.{n}": p.grad for k, part in parts.items() for n, p in part.named_parameters()}
            tensors |= named("gradient", {name: grad for name, grad in gradients.items() if grad is not None})
    tensors |= {**named("after", state(parts)), "losses": torch.stack(losses)}
    tensors["end.logits"] = shared_logits(run, images[-1])
    return {name.replace("module.", ""): tensor for name, tensor in tensors.items()}


def _config(counts: list[int], folder: Path) -> Case:
    """Its config with our class counts, for a loss that is a third of its sum of three means."""
    path = folder / "class_counts.json"
    path.write_text(json.dumps(counts))
    config: Case = yaml.safe_load(Path("config/ImageNet_LT/balanced_softmax_resnet10.yaml").read_text())
    config["training_opt"]["log_dir"] = str(folder)
    config["criterions"]["PerformanceLoss"]["loss_params"] = {"freq_path": str(path)}
    config["criterions"]["PerformanceLoss"]["weight"] = 1 / 3
    return config | {"coslrwarmup": False}


def state(parts: dict[str, nn.Module]) -> Tensors:
    """The tensors of several networks, each name below that of its network."""
    return {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in module.state_dict().items()}


@torch.no_grad()
def shared_logits(run: Any, images: Tensor) -> Tensor:
    """Logits [B, 1, C] in evaluation mode."""
    for part in run.networks.values():
        part.eval()
    run.batch_forward(images, phase="test")
    return run.logits.unsqueeze(1).clone()
