"""LIFT's side, run in a checkout of LIFT: `python -m tailtune.parity.lift.original FOLDER lift`.

Nothing of the original is changed on disk. What fails without CUDA or is a known bug is replaced in memory: `patch` and
`Run` say what.
"""

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tailtune.parity.clips import random_weights, shake
from tailtune.parity.job import Case, Job, Tensors, in_precisions

# the original's modules
trainer: Any = importlib.import_module("trainer")
clip: Any = importlib.import_module("clip.model")
config: Any = importlib.import_module("utils.config")
peft: Any = importlib.import_module("models.peft_vit")
evaluator: Any = importlib.import_module("utils.evaluator")
losses: Any = importlib.import_module("utils.losses")


def main(folder: Path, part: str) -> None:
    """Answer the job in a folder."""
    job = Job.read(folder, part)
    for index, (name, build) in enumerate(job.settings["backbones"].items()):
        save_file(random_weights(partial(empty_backbone, build), index), folder / f"{name}.safetensors")
    patch(job)
    job.answer("networks", in_precisions(set_precision, played), seed=1000)
    set_precision("float32")
    job.write_facts(part, {"metrics": metrics, "schedule": learning_rates, "size": sizes})


# --- the original, made to run on a CPU ------------------------------------------------------------------------------


def patch(job: Job) -> None:
    """Backbones from our files; no TensorBoard; LDAM without CUDA types; a LoRA that takes `out_dim`."""

    def load(name: str, prec: str) -> nn.Module:
        model = empty_backbone(job.settings["backbones"][name])
        model.load_state_dict(load_file(job.folder / f"{name}.safetensors"))
        return model.to(torch.get_default_dtype()).eval()

    trainer.load_clip_to_cpu = trainer.load_vit_to_cpu = load
    trainer.SummaryWriter = MagicMock()
    where, lora = torch.where, peft.LoRA
    losses.torch.where = lambda condition, *others: where(condition.bool(), *others)

    class WideLora(lora):  # type: ignore[misc,valid-type]
        def __init__(self, in_dim: int, bottle_dim: int, out_dim: int | None = None, dtype: Any = None) -> None:
            super().__init__(in_dim, bottle_dim, dtype)
            if out_dim is not None:
                self.lora_B = nn.Parameter(torch.zeros(bottle_dim, out_dim, dtype=dtype))

    peft.LoRA = WideLora


FP32_NORM = clip.LayerNorm.forward


def set_precision(prec: str) -> None:
    """Set the default dtype, and change the two places where the original names fp32."""
    torch.set_default_dtype(getattr(torch, prec))
    clip.LayerNorm.forward = nn.LayerNorm.forward if prec == "float64" else FP32_NORM
    losses.torch.cuda.FloatTensor = torch.DoubleTensor if prec == "float64" else torch.FloatTensor


class Run(trainer.Trainer):
    """The original's trainer on tensors instead of images, with the loss `BS` assigned instead of compared.

    Args:
        cfg: the original's configuration.
        counts: training images of each class.
        names: class names.
        images: batches of images [4, B, 3, H, W]; the last one is for evaluation.
        labels: their labels [4, B].
    """

    def __init__(self, cfg: Any, counts: list[int], names: list[str], images: Tensor, labels: Tensor) -> None:
        self.classnames, self.cls_num_list = names, counts
        batches = list(zip(images, labels, strict=True))
        self.train_loader = self.train_init_loader = batches[:3]
        self.test_loader = [(images[-1].unsqueeze(1), labels[-1])]
        super().__init__(cfg)

    def build_data_loader(self) -> None:
        self.num_classes, self.accum_step = len(self.classnames), 1
        self.many_idxs, self.med_idxs, self.few_idxs = np.array_split(np.arange(self.num_classes), 3)

    def build_criterion(self) -> None:
        if self.cfg.loss_type == "BS":
            self.criterion = losses.BalancedSoftmaxLoss(torch.Tensor(self.cls_num_list))
        else:
            super().build_criterion()
        if self.cfg.loss_type == "CB":  # its runs compute the class weights in fp32
            weights = losses.ClassBalancedLoss(torch.tensor(self.cls_num_list, dtype=torch.float32)).per_cls_weights
            self.criterion.per_cls_weights = weights.to(torch.get_default_dtype())


# --- backbones -------------------------------------------------------------------------------------------------------


def empty_backbone(build: Case) -> nn.Module:
    """A backbone from its arguments, as `cases.builds` has them."""
    return timm.create_model(**build["timm"]) if "timm" in build else clip.CLIP(**build["clip"])


# --- networks --------------------------------------------------------------------------------------------------------


def settings(options: Case, backbone: str, folder: Path) -> Any:
    """The original's configuration with the options of a case."""
    cfg = config._C.clone()
    cfg.merge_from_list([part for pair in options.items() for part in pair])
    cfg.backbone, cfg.prec, cfg.num_epochs, cfg.output_dir = backbone, "fp32", 1, str(folder / "run")
    return cfg


def played(case: Case, job: Job, prec: str) -> Tensors:
    """First forward pass and gradients, and what three steps of the original's loop lead to.

    The checkpoint that it starts from is left in the folder `NUMBER.PREC` of the job. Of a head initialisation there
    is only the head's weight, of zero-shot only the logits.
    """
    images, labels = job.inputs[case["backbone"]].to(torch.get_default_dtype()), job.inputs["labels"]
    torch.manual_seed(1000 + case["number"])
    cfg = settings(case["options"], case["backbone"], job.folder)
    run = Run(cfg, job.settings["counts"], case["names"], images, labels)
    if case["options"].get("zero_shot"):
        return {"logits": run.model(images[-1])}
    if case["kind"] == "init":
        return {"weight": run.head.weight}
    shake((*run.tuner.parameters(), *run.head.parameters()), case["number"])
    start = job.folder / f"{case['number']}.{prec}"
    start.mkdir(exist_ok=True)
    run.save_model(start)
    with torch.no_grad():
        run.tuner.eval()
        tensors = {"features": run.model(images[-1], return_feature=True), "logits": run.model(images[-1])}
    tensors |= trained(run)
    with torch.no_grad():
        return tensors | {"after_logits": run.model(images[-1])}


def trained(run: Run) -> Tensors:
    """Train for the run's three batches: the losses [3], the first gradients and the last values."""
    noted_losses: list[Tensor] = []
    gradients: Tensors = {}
    criterion, step = run.criterion, run.optim.step

    def criterion_and_note(logits: Tensor, targets: Tensor) -> Tensor:
        noted_losses.append(criterion(logits, targets))
        return noted_losses[-1]

    def note_and_step() -> None:
        gradients.update({} if gradients else gradients_of(run))
        step()

    run.criterion, run.optim.step = criterion_and_note, note_and_step
    run.train()
    tensors = {f"gradient.{name}": gradient for name, gradient in gradients.items()}
    tensors |= {f"after.{name}": value for name, value in values(run).items()}
    return {**tensors, "losses": torch.stack(noted_losses)}


def values(run: Run) -> Tensors:
    """The tensors of the checkpoint that the original would write."""
    parts = {"tuner": run.tuner, "head": run.head}
    return {f"{part}.{k}": v.clone() for part, module in parts.items() for k, v in module.state_dict().items()}


def gradients_of(run: Run) -> Tensors:
    """The gradients of tuner and head."""
    parts = {"tuner": run.tuner, "head": run.head}
    return {f"{part}.{k}": v.grad.clone() for part, module in parts.items() for k, v in module.named_parameters()}


# --- numbers ---------------------------------------------------------------------------------------------------------


def metrics(_: Case, job: Job) -> dict[str, float]:
    """Every metric of the original's evaluator on the job's logits, in percent."""
    judge = evaluator.Evaluator(None, *(np.array(group) for group in job.settings["groups"]))
    judge.process(job.inputs["metric_logits"], job.inputs["metric_labels"])
    confidences = judge._y_conf, judge._y_pred, judge._y_true
    ece = 100 * evaluator.expected_calibration_error(*confidences)
    return {**{name: float(value) for name, value in judge.evaluate().items()}, "ece": float(ece)}


def learning_rates(case: Case, job: Job) -> list[float]:
    """The learning rate of each epoch."""
    epochs = case["epochs"]
    run = MagicMock(cfg=MagicMock(lr=0.01, weight_decay=5e-4, momentum=0.9, num_epochs=epochs, prec="fp32"))
    run.model = run.head = nn.Linear(1, 1)
    run.tuner = nn.Linear(1, 1)
    trainer.Trainer.build_optimizer(run)
    rates = []
    for _ in range(epochs):
        rates.append(run.optim.param_groups[0]["lr"])
        run.optim.step()
        run.sched.step()
    return rates


def sizes(case: Case, job: Job) -> list[int]:
    """Parameters of a tuner, for each number of classes."""
    model = empty_backbone(job.settings["backbones"][case["backbone"]])
    cfg = settings(case["options"], case["backbone"], Path())
    make_tuner = partial(peft.ViT_Tuner, cfg, getattr(model, "visual", model))
    return [sum(parameter.numel() for parameter in make_tuner(n).parameters()) for n in case["classes"]]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
