"""The original's side of parity_lift.py: a process of its own whose working folder is a checkout of LIFT.

Its packages have the names of ours, so the two never meet: what goes in and comes out are files of the folder named on
the command line. Nothing of the original is changed on disk; what fails without CUDA or is a known bug is replaced in
memory, here, where `patch` and `Run` say so.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path[0] = str(Path.cwd())  # `models`, `datasets`, `utils`, `clip`, `trainer` are the original's here
trainer, clip, config, peft, evaluator, losses = (
    importlib.import_module(name)
    for name in ("trainer", "clip.model", "utils.config", "models.peft_vit", "utils.evaluator", "utils.losses")
)
Case = dict[str, Any]


def main(folder: Path) -> None:
    """Do everything that job.json asks for; `original.json` and one file of tensors a case and precision come out."""
    job = json.loads((folder / "job.json").read_text())
    for index, (name, build) in enumerate(job["backbones"].items()):
        save_file(random_backbone(build, index), folder / f"{name}.safetensors")
    patch(job, folder)
    for index, case in enumerate(job["cases"]):
        for prec in case["prec"]:
            set_precision(prec)
            save_file(play(job, case, folder, f"{index}.{prec}"), folder / f"{index}.{prec}.safetensors")
    set_precision("float32")
    facts = {"metrics": metrics(folder, job), "lr": learning_rates(job), "sizes": sizes(job)}
    (folder / "original.json").write_text(json.dumps(facts))


# --- the original, made to run on a CPU ----------------------------------------------------------------------------


def patch(job: Case, folder: Path) -> None:
    """Backbones from our files; no TensorBoard; LDAM without CUDA types; a LoRA that takes `out_dim`."""

    def load(name: str, prec: str) -> nn.Module:
        model = empty_backbone(job["backbones"][name])
        model.load_state_dict(load_file(folder / f"{name}.safetensors"))
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


def set_precision(prec: str) -> None:
    """What the original makes without naming a dtype, and the two places where it names fp32."""
    torch.set_default_dtype(getattr(torch, prec))
    clip.LayerNorm.forward = nn.LayerNorm.forward if prec == "float64" else NORM
    losses.torch.cuda.FloatTensor = torch.DoubleTensor if prec == "float64" else torch.FloatTensor


NORM = clip.LayerNorm.forward


class Run(trainer.Trainer):  # type: ignore[misc,name-defined]
    """The original's trainer on tensors instead of images, with the loss `BS` assigned instead of compared."""

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
        if self.cfg.loss_type == "CB":  # the class weights of its runs, which are in fp32
            weights = losses.ClassBalancedLoss(torch.tensor(self.cls_num_list, dtype=torch.float32)).per_cls_weights
            self.criterion.per_cls_weights = weights.to(torch.get_default_dtype())


# --- backbones ---------------------------------------------------------------------------------------------------


def empty_backbone(build: Case) -> nn.Module:
    return timm.create_model(**build["timm"]) if "timm" in build else clip.CLIP(**build["clip"])


@torch.no_grad()
def random_backbone(build: Case, seed: int) -> dict[str, Tensor]:
    """Random weights, biases, norms and running statistics included.

    The shifts of batch norms are near 1 and -1: then few ReLUs stand where rounding decides between on and off, which
    moves a gradient by a percent.
    """
    torch.manual_seed(seed)
    model = empty_backbone(build)
    for each in model.parameters():
        if each.ndim <= 1:
            each += 0.2 * torch.randn_like(each)
    for norm in (each for each in model.modules() if isinstance(each, nn.BatchNorm2d)):
        norm.bias += torch.tensor((1.0, -1.0)).repeat(len(norm.bias) // 2)
    for name, each in model.named_buffers():
        if name.endswith("running_mean"):
            each.normal_(std=0.2)
        elif name.endswith("running_var"):
            each.uniform_(0.5, 1.5)
    return {name: each.clone() for name, each in model.state_dict().items()}


# --- one case ----------------------------------------------------------------------------------------------------


def settings(options: Case, backbone: str, folder: Path) -> Any:
    """The original's configuration with the case's options."""
    cfg = config._C.clone()
    cfg.merge_from_list([part for pair in options.items() for part in pair])
    cfg.backbone, cfg.prec, cfg.num_epochs, cfg.output_dir = backbone, "fp32", 1, str(folder / "run")
    return cfg


def play(job: Case, case: Case, folder: Path, name: str) -> dict[str, Tensor]:
    """A checkpoint to start from, first forward and gradients, and what three steps of the original's loop lead to."""
    seed = int(name.split(".")[0])
    inputs = load_file(folder / "inputs.safetensors")
    images, labels = inputs[case["backbone"]].to(torch.get_default_dtype()), inputs["labels"]
    torch.manual_seed(1000 + seed)
    run = Run(settings(case["options"], case["backbone"], folder), job["counts"], case["names"], images, labels)
    if case["options"].get("zero_shot"):
        return {"logits": run.model(images[-1]).detach()}
    if case["kind"] == "init":
        return {"weight": run.head.weight.detach().contiguous()}
    shake(run, seed)
    (folder / name).mkdir()
    run.save_model(folder / name)
    with torch.no_grad():
        run.tuner.eval()
        out = {"features": run.model(images[-1], return_feature=True), "logits": run.model(images[-1])}
    found: list[Tensor] = []
    gradients: dict[str, Tensor] = {}
    criterion, step = run.criterion, run.optim.step

    def criterion_and_note(logits: Tensor, targets: Tensor) -> Tensor:
        found.append(criterion(logits, targets))
        return found[-1]

    def note_and_step() -> None:
        gradients.update({} if gradients else gradients_of(run))
        step()

    run.criterion, run.optim.step = criterion_and_note, note_and_step
    run.train()
    out |= {f"gradient.{name}": each for name, each in gradients.items()}
    out |= {f"after.{name}": each for name, each in values(run).items()}
    with torch.no_grad():
        out["after_logits"] = run.model(images[-1])
    return {**out, "losses": torch.stack(found).detach()}


@torch.no_grad()
def shake(run: Run, seed: int) -> None:
    """Every value that trains away from its special start (zeros, ones, the backbone's own), exactly in fp32."""
    generator = torch.Generator().manual_seed(seed)
    for part in (run.tuner, run.head):
        for each in part.parameters():
            noise = 0.05 * torch.randn(each.shape, generator=generator, dtype=torch.float32)
            each.copy_((each.float() + noise).to(each.dtype))


def values(run: Run) -> dict[str, Tensor]:
    """The checkpoint that the original would write, without the file."""
    parts = {"tuner": run.tuner, "head": run.head}
    return {f"{part}.{k}": v.clone() for part, module in parts.items() for k, v in module.state_dict().items()}


def gradients_of(run: Run) -> dict[str, Tensor]:
    parts = {"tuner": run.tuner, "head": run.head}
    return {f"{part}.{k}": v.grad.clone() for part, module in parts.items() for k, v in module.named_parameters()}


# --- what is not of a model --------------------------------------------------------------------------------------


def metrics(folder: Path, job: Case) -> dict[str, float]:
    inputs = load_file(folder / "inputs.safetensors")
    judge = evaluator.Evaluator(None, *(np.array(group) for group in job["groups"]))
    judge.process(inputs["metric_logits"], inputs["metric_labels"])
    confidences = judge._y_conf, judge._y_pred, judge._y_true
    ece = 100 * evaluator.expected_calibration_error(*confidences)
    return {**{name: float(each) for name, each in judge.evaluate().items()}, "ece": float(ece)}


def learning_rates(job: Case) -> dict[str, list[float]]:
    """Of each epoch, by the number of epochs."""
    found: dict[str, list[float]] = {}
    for epochs in job["epochs"]:
        run = MagicMock(cfg=MagicMock(lr=0.01, weight_decay=5e-4, momentum=0.9, num_epochs=epochs, prec="fp32"))
        run.model = run.tuner = run.head = nn.Linear(1, 1)
        run.tuner = nn.Linear(1, 1)
        trainer.Trainer.build_optimizer(run)
        found[str(epochs)] = []
        for _ in range(epochs):
            found[str(epochs)].append(run.optim.param_groups[0]["lr"])
            run.optim.step()
            run.sched.step()
    return found


def sizes(job: Case) -> list[int]:
    """Parameters of a tuner whose size follows from the number of classes."""
    found = []
    for case in job["sizes"]:
        model = empty_backbone(job["backbones"][case["backbone"]])
        cfg = settings(case["options"], case["backbone"], Path())
        tuner = peft.ViT_Tuner(cfg, getattr(model, "visual", model), case["classes"])
        found.append(sum(each.numel() for each in tuner.parameters()))
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
