"""LIFT+'s side, run in a checkout of LIFT+: `python -m tailtune.parity.lift_plus.original FOLDER lift_plus`.

It needs OpenAI's package `clip`, whose checkout is on the path. Nothing is changed on disk. What fails without CUDA is
replaced in memory: `patch`, `set_precision` and `run_of` say what.
"""

import importlib
import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tailtune.parity.clips import random_weights, shake
from tailtune.parity.job import Case, Job, Tensors, in_precisions


def main(folder: Path, part: str) -> None:
    """Answer the job in a folder."""
    job = Job.read(folder, part)
    sys.path.append(job.settings["clip"])
    for index, (name, build) in enumerate(job.settings["backbones"].items()):
        save_file(random_weights(partial(empty_backbone, build), index), folder / f"{name}.safetensors")
    patch()
    job.answer("networks", in_precisions(set_precision, played), seed=1000)
    set_precision("float32")
    job.answer("pictures", changed_pictures)
    job.write_facts(part, {"size": sizes, "schedule": learning_rates})


def original(name: str) -> Any:
    """A module of the original, or of OpenAI's package."""
    return importlib.import_module(name)


def empty_backbone(build: Case) -> nn.Module:
    """A backbone from its arguments."""
    if "timm" in build:
        return timm.create_model(**build["timm"])
    clip: nn.Module = original("clip.model").CLIP(**build["clip"])
    return clip


# --- the original, made to run on a CPU ------------------------------------------------------------------------------


def patch() -> None:
    """No TensorBoard; LDAM without CUDA types; conversions to the precision of the case; a solver in fp64."""
    trainer = original("trainer")
    trainer.SummaryWriter = MagicMock()

    class Solver(trainer.LogisticRegression):  # type: ignore[name-defined]
        def fit(self, features: Tensor, labels: Tensor) -> None:
            super().fit(features.double(), labels)

    trainer.LogisticRegression = Solver
    where, losses = torch.where, original("utils.losses")
    losses.torch.where = lambda condition, *others: where(condition.bool(), *others)
    nn.Module.float = lambda self: self.to(torch.get_default_dtype())  # type: ignore[method-assign]
    Tensor.float = lambda self: self.to(torch.get_default_dtype())  # type: ignore[method-assign]


@cache
def written_forward(kind: type[nn.Module]) -> Any:
    """The forward function of a class as it is written."""
    return kind.forward


def set_precision(prec: str) -> None:
    """Set the default dtype, and change the layer norms, which compute in fp32."""
    torch.set_default_dtype(getattr(torch, prec))
    for kind in (original("clip.model").LayerNorm, original("models.modules").NonHalfLayerNorm):
        as_written = written_forward(kind)
        kind.forward = nn.LayerNorm.forward if prec == "float64" else as_written
    types = {"float64": torch.DoubleTensor, "float32": torch.FloatTensor}
    original("utils.losses").torch.cuda.FloatTensor = types[prec]


class Batches(list[tuple[Tensor, Tensor]]):
    """In place of the original's loader: batches of images and labels, without a transform."""

    dataset = SimpleNamespace(transform=SimpleNamespace(transforms=()))


def settings(case: Case, folder: Path) -> Any:
    """The original's configuration with the keys of a case."""
    cfg = original("utils.config")._C.clone()
    cfg.merge_from_list([part for pair in case["theirs"].items() for part in pair])
    cfg.prec_train, cfg.output_dir = "fp32", str(folder / "run")
    cfg.num_epochs = case["theirs"].get("num_epochs", 1)
    return cfg


def run_of(case: Case, job: Job, names: list[str], counts: list[int]) -> Any:
    """The original's trainer of a case, on the job's tensors instead of images.

    Args:
        case: the case.
        job: the job.
        names: class names.
        counts: training images of each class.
    """
    trainer = original("trainer")
    backbone = empty_backbone(job.settings["backbones"][case["backbone"]])
    backbone.load_state_dict(load_file(job.folder / f"{case['backbone']}.safetensors"))
    backbone.to(torch.get_default_dtype()).eval()
    trainer.clip.load = lambda *_, **__: (backbone, None)
    trainer.vit_base_patch16_224 = trainer.resnet50 = lambda **_: backbone
    images = job.inputs[case["backbone"]].to(torch.get_default_dtype())
    batches = Batches(zip(images, job.inputs["labels"], strict=True))

    class Run(trainer.Trainer):  # type: ignore[name-defined]
        def build_data(self) -> None:
            self.classnames, self.cls_num_list, self.num_classes = names, counts, len(names)
            self.many_classes, self.med_classes, self.few_classes = torch.arange(len(names)).split(
                [1, 1, len(names) - 2]
            )
            self.train_loader, self.init_loader = Batches(batches[:3]), Batches(batches[:3])

        def build_criterion(self) -> None:
            super().build_criterion()
            if self.cfg.loss_type == "CB":  # its runs compute the class weights in fp32
                losses = original("utils.losses")
                weights = losses.ClassBalancedLoss(torch.tensor(counts, dtype=torch.float32)).per_cls_weights
                self.criterion.per_cls_weights = weights.to(torch.get_default_dtype())

        def build_tuner(self) -> None:
            super().build_tuner()
            self.tuner.to(torch.get_default_dtype())  # its layer norms are made in fp32

        def answer(self, images: Tensor) -> Tensor:
            if self.cfg.classifier:
                logits: Tensor = self.model(images, use_classifier=True)
                return logits
            features = self.compute_class_features(self.generate_class_prompts())
            logits = self.model(images, features, is_text_feature=True)
            return logits

    return Run(settings(case, job.folder))


# --- networks --------------------------------------------------------------------------------------------------------


def played(case: Case, job: Job, prec: str) -> Tensors:
    """First forward pass and gradients, and what three steps of the original's loop lead to.

    The checkpoint that it starts from is left in the folder `NUMBER.PREC` of the job. Of a head initialisation there
    is only the head's weight.
    """
    torch.manual_seed(1000 + case["number"])
    run = run_of(case, job, job.settings["names"], job.settings["counts"])
    if case["kind"] == "init":
        tensors = {"weight": run.tuner.classifier.weight}
        if case["name"] == "linear_probing":  # so that both sides fit the same features
            with torch.no_grad():
                tensors["train_features"] = run.compute_train_features()[0]
        return tensors
    shake(run.tuner.parameters(), case["number"])
    start = job.folder / f"{case['number']}.{prec}"
    start.mkdir(exist_ok=True)
    run.save_model(start)
    images = job.inputs[case["backbone"]][-1].to(torch.get_default_dtype())
    with torch.no_grad():
        run.tuner.eval()
        tensors = {"logits": run.answer(images)}
        if case["kind"] != "text":
            tensors["features"] = run.model(images, return_feature=True)
    tensors |= trained(run)
    with torch.no_grad():
        return tensors | {"after_logits": run.answer(images)}


def trained(run: Any) -> Tensors:
    """Train for the run's three batches: the losses [3], the first gradients and the last values."""
    losses: list[Tensor] = []
    gradients: Tensors = {}
    criterion, step = run.criterion, run.optim.step

    def criterion_and_note(logits: Tensor, targets: Tensor) -> Tensor:
        losses.append(criterion(logits, targets))
        return losses[-1]

    def note_and_step() -> None:
        if not gradients:
            gradients.update({name: value.grad.clone() for name, value in run.tuner.named_parameters()})
        step()

    run.criterion, run.optim.step = criterion_and_note, note_and_step
    run.train()
    tensors = {f"gradient.tuner.{name}": gradient for name, gradient in gradients.items()}
    tensors |= {f"after.tuner.{name}": value for name, value in run.tuner.state_dict().items()}
    return {**tensors, "losses": torch.stack(losses)}


# --- numbers and pictures --------------------------------------------------------------------------------------------


def sizes(case: Case, job: Job) -> list[int]:
    """Parameters that train, for each number of classes."""
    found = []
    for classes in case["classes"]:
        run = run_of(case, job, [f"class {number}" for number in range(classes)], [1] * classes)
        found.append(sum(parameter.numel() for parameter in run.tuner.parameters()))
    return found


def learning_rates(case: Case, job: Job) -> list[float]:
    """The learning rate of each epoch."""
    run = SimpleNamespace(cfg=settings(case, job.folder), model=nn.Linear(1, 1), tuner=nn.Linear(1, 1))
    original("trainer").Trainer.build_optimizer(run)
    rates = []
    for _ in range(run.cfg.num_epochs):
        rates.append(run.optim.param_groups[0]["lr"])
        run.optim.step()
        run.sched.step()
    return rates


def changed_pictures(case: Case, job: Job) -> Tensors:
    """The pictures after a transform of the original, for each epoch and random seed."""
    transform = transform_of(case, job)
    tensors: Tensors = {}
    for epoch in range(job.settings["epochs"]):
        for number in range(job.settings["pictures"]):
            picture = Image.fromarray(np.array(job.inputs[f"picture.{number}"]))
            for seed in range(job.settings["seeds"]):
                torch.manual_seed(seed)
                pixels = transform(picture) * 255
                tensors[f"{epoch}.{number}.{seed}"] = pixels.round().to(torch.uint8)
        for step in transform.transforms:
            if hasattr(step, "step"):
                step.step()
    return tensors


def transform_of(case: Case, job: Job) -> Any:
    """The transform of training, of the test, or of the head's initialisation, by the original's own `build_data`."""
    trainer, found = original("trainer"), {}

    class Data:
        labels, num_classes, cls_num_list, classnames = [0, 1], 2, [1, 1], ["a", "b"]

        def __init__(self, _: str, split: str, transform: Any) -> None:
            kind = "init" if split == "train" and "train" in found else split
            found[kind] = transform

        def __len__(self) -> int:
            return 2

    trainer.datasets = SimpleNamespace(Data=Data)
    cfg = settings(case, job.folder)
    cfg.dataset, cfg.root, cfg.mean, cfg.std = "Data", "", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    trainer.Trainer.build_data(SimpleNamespace(cfg=cfg))
    return found[case["split"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
