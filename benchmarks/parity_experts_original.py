"""The originals' side of parity_experts.py: a process of its own whose working folder is one of their code folders.

Its packages have the names of ours, so the two never meet: what goes in and comes out are files of the folder named on
the command line. Nothing of an original is changed on disk; what it cannot do without CUDA or a new PyTorch is replaced
in memory, here, and PATCHES of parity_experts.py says what.
"""

import functools
import importlib
import inspect
import json
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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Case = dict[str, Any]
Tensors = dict[str, Tensor]
SMALL = {"type": "ResNet32Model", "args": {"num_classes": 10, "num_experts": 3}}
"""In place of a network that a learning-rate trace does not need."""


def main(folder: Path, repository: str) -> None:
    """Every case of a repository, its learning rates and its test-time scripts; files in `folder` come out."""
    patch()
    sys.path[0] = str(Path.cwd())  # `model`, `trainer`, `utils` … are the original's here
    job = json.loads((folder / "asked.json").read_text())
    given = load_file(folder / "inputs.safetensors")
    facts: Case = {"rates": {}}
    for index, case in enumerate(job["cases"]):
        path = folder / case["file"]
        if case["repository"] == repository and not path.exists():
            torch.manual_seed(1000 + index)
            run = balanced if repository == "balanced" else train
            save_file(run(case, job, given, folder), folder / "unfinished")
            path.with_name("unfinished").rename(path)
    for case in job["rates"]:
        if case["repository"] == repository:
            facts["rates"][case["config"]] = rates(case, job, folder)
    if repository == "sade":
        for script, (_, _, config) in job["scripts"].items():
            save_file(aggregate(script, config, given, folder), folder / f"{script}.safetensors")
    (folder / f"{repository}.json").write_text(json.dumps(facts))


def patch() -> None:
    """fp64 where the originals write `float`, no CUDA, boolean masks, and packages that they only log with."""
    torch.set_default_dtype(torch.float64)
    torch.float = torch.float64
    torch.FloatTensor = torch.DoubleTensor
    Tensor.float = Tensor.double  # type: ignore[method-assign]
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.uint8 = torch.bool
    torch.sort = functools.partial(torch.sort, stable=True)
    for name in ("pandas", "higher", "h5py"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


class Loader:
    """Their data loaders, of tensors."""

    n_samples = batch_size = 1

    def __init__(self, batches: list[tuple[Tensor, Tensor]], counts: list[int]) -> None:
        self.batches, self.cls_num_list = batches, counts

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def split_validation(self) -> None:
        return None


# --- their own main(), from the config to the optimizer's step ---------------------------------------------------------


def launch(case: Case, loader: Loader, folder: Path, instead: Callable[[Any], None]) -> None:
    """`main` of their train.py with a config of theirs; in the place of all epochs `instead(trainer)`."""
    from utils import read_json  # theirs

    script = importlib.import_module("train_places" if case["data"] == "places_lt" else "train")
    config = read_json(Path("configs") / case["config"])
    config["n_gpu"], config["trainer"]["save_dir"] = 1, str(folder / "runs")
    changes = {"distill_checkpoint": ""} if config.get("distill") else {}
    parsed = importlib.import_module("parse_config").ConfigParser(config, None, {**changes, **case["theirs"]}, run_id="")

    class Run(importlib.import_module("trainer").Trainer):  # type: ignore[misc,name-defined]
        train = instead

    script.Trainer = Run
    script.module_data = types.SimpleNamespace(**{config["data_loader"]["type"]: lambda **_: loader})
    script.module_arch.init_weights = lambda model, **_: model
    torch.load = lambda *_, **__: {"state_dict": fresh_teacher(parsed, script.module_arch)}
    options = Namespace(pretrained=None, rank=-1, add_bt=case["theirs"].get("arch;args;add_bt", 0))
    script.main(*(parsed, options)[: script.main.__code__.co_argcount])


def fresh_teacher(parsed: Any, networks: Any) -> Tensors:
    teacher = parsed.init_obj("distill_arch", networks)
    shake(teacher)
    return dict(teacher.state_dict())


def train(case: Case, job: Case, given: Tensors, folder: Path) -> Tensors:
    """Weights to start from, first forward and gradients, and what three steps of their loop lead to."""
    images, labels = given[case["images"]], given[case["labels"]]
    batches = list(zip(images[:-1], labels[:-1], strict=True))
    out: Tensors = {}

    def play(run: Any) -> None:
        without_dropout(run.model)
        shake(run.model)
        if run.real_model.requires_target:
            halfway(run.model, images[-1])
        out.update(named("start", run.model.state_dict()))
        if hasattr(run, "teacher_model"):
            run.teacher_model.eval()
            out.update(named("teacher", run.teacher_model.state_dict()))
        out.update(named("before", evaluate(run.model, images[-1])))
        losses = watch(run, out)
        run._train_epoch(case["epoch"])
        out.update(named("after", run.model.state_dict()))
        out.update(named("end", evaluate(run.model, images[-1])))
        out["losses"] = torch.stack(losses)

    launch(case, Loader(batches, job["counts"][case["data"]]), folder, play)
    return {name: each.detach().clone().contiguous() for name, each in out.items()}


def watch(run: Any, out: Tensors) -> list[Tensor]:
    """Note the first gradients, the learning rates and every loss while their loop runs."""
    losses: list[Tensor] = []
    step, update = run.optimizer.step, run.train_metrics.update

    def note_and_step() -> None:
        if "rates" not in out:
            grads = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
            out.update(named("gradient", grads))
            out["rates"] = torch.tensor([group["lr"] for group in run.optimizer.param_groups])
        step()

    def note(key: str, value: Any, *more: Any) -> None:
        if key == "loss":
            losses.append(torch.tensor(value))
        update(key, value, *more)

    run.optimizer.step, run.train_metrics.update = note_and_step, note
    return losses


def rates(case: Case, job: Case, folder: Path) -> list[list[float]]:
    """Learning rates of the groups in every epoch."""
    found: list[list[float]] = []

    def trace(run: Any) -> None:
        for _ in range(run.epochs):
            found.append([group["lr"] for group in run.optimizer.param_groups])
            run.optimizer.step()
            run.lr_scheduler.step()

    arch = {"arch": SMALL, "distill_arch": SMALL, "distill": False}
    launch({**case, "theirs": arch}, Loader([], job["counts"][case["data"]]), folder, trace)
    return found


# --- models ------------------------------------------------------------------------------------------------------------


def named(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}.{name.removeprefix('backbone.')}": each.clone() for name, each in tensors.items()}


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Batch norms away from ones and zeros, running statistics too."""
    for name, each in model.state_dict().items():
        if each.is_floating_point() and each.ndim == 1:
            each.mul_(torch.exp(0.1 * torch.randn_like(each))).add_(0 if "var" in name else 0.05 * torch.randn_like(each))


def without_dropout(model: nn.Module) -> None:
    for each in model.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
        elif isinstance(each, nn.MultiheadAttention):
            each.dropout = 0.0


@torch.no_grad()
def halfway(model: nn.Module, images: Tensor) -> None:
    """Shift the bias of expert assignment so that about half of the images ask a second expert."""
    seen: list[Tensor] = []
    layer = model.backbone.expert_help_pred_fc
    hook = layer.register_forward_hook(lambda _, __, out: seen.append(out))
    model.eval()(images)
    hook.remove()
    middle = len(images) // 2
    layer.bias -= seen[0].flatten().sort().values[middle - 1 : middle + 1].mean()


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor) -> Tensors:
    """Logits of the experts [B, E, C], or of an assignment the mean [B, C] and how many experts were asked."""
    output = model.eval()(images)
    if isinstance(output, tuple):
        return {"mean": output[0], "asked": output[1].flatten()}
    if isinstance(output, dict):
        return {"logits": output["logits"]}
    experts = getattr(model.backbone, "logits", None)
    return {"logits": output.unsqueeze(1) if experts is None else torch.stack(list(experts), 1)}


# --- SADE's aggregation, and the general BatchFormer -------------------------------------------------------------------


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
