"""The originals' side of parity_experts.py: a process of its own whose working folder is one of their code folders.

Its packages have the names of ours, so the two never meet: what goes in and comes out are files of the folder named on
the command line. Nothing of an original is changed on disk; what it cannot do without CUDA or a new PyTorch is replaced
in memory, here, and PATCHES of parity_experts.py says what.
"""

import functools
import importlib
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

from tailtune.parity.experts.networks import Tensors, evaluate, halfway, named, shake, without_dropout
from tailtune.parity.experts.other_scripts import aggregate, balanced

Case = dict[str, Any]
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
            arch = {"arch": SMALL, "distill_arch": SMALL, "distill": False}
            facts["rates"][case["config"]] = rates(case, job, folder, arch)
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


# --- their own main(), from the config to the optimizer's step ----------------------------------------------------


def launch(case: Case, loader: Loader, folder: Path, instead: Callable[[Any], None]) -> None:
    """`main` of their train.py with a config of theirs; in the place of all epochs `instead(trainer)`."""
    from utils import read_json  # theirs

    script = importlib.import_module("train_places" if case["data"] == "places_lt" else "train")
    config = read_json(Path("configs") / case["config"])
    config["n_gpu"], config["trainer"]["save_dir"] = 1, str(folder / "runs")
    changes = {"distill_checkpoint": ""} if config.get("distill") else {}
    parsed = importlib.import_module("parse_config").ConfigParser(
        config, None, {**changes, **case["theirs"]}, run_id=""
    )

    class Run(importlib.import_module("trainer").Trainer):  # type: ignore[misc,name-defined]
        train = instead

    script.Trainer = Run
    script.module_data = types.SimpleNamespace(**{config["data_loader"]["type"]: lambda **_: loader})
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
        run._train_epoch(*(case["epoch"], run.epochs + 1)[: run._train_epoch.__code__.co_argcount - 1])
        if hasattr(run.criterion, "pool"):  # DirMixE's, in the order in which it was used
            out["drawn.priors"] = torch.stack([prior for prior, _ in run.criterion.pool])
            out["drawn.experts"] = torch.tensor([expert for _, expert in run.criterion.pool])
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


def rates(case: Case, job: Case, folder: Path, theirs: Case) -> list[list[float]]:
    """Learning rates of the groups in every epoch, of a config with these changes."""
    found: list[list[float]] = []

    def trace(run: Any) -> None:
        for _ in range(run.epochs):
            found.append([group["lr"] for group in run.optimizer.param_groups])
            run.optimizer.step()
            run.lr_scheduler.step()

    launch({**case, "theirs": theirs}, Loader([], job["counts"][case["data"]]), folder, trace)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
