"""The side of CoOp, MaPLe and CLIP-LoRA: `python -m tailtune.parity.text.original FOLDER coop | maple | clip_lora`.

It runs in a checkout of the original. The trainers of CoOp and MaPLe are those of Dassl, whose checkout is on the path,
and their `build_model` and `forward_backward` run as they are. CLIP-LoRA's training is one function that needs CUDA, so
its layers and optimizer are used in a loop of our own. Nothing is changed on disk; `patch` says what is in memory.
"""

import importlib
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tailtune.parity.clips import random_weights, shake
from tailtune.parity.job import Case, Job, Tensors, in_precisions

MAPLE = {"trainer": "MaPLe", "vision_depth": 0, "language_depth": 0, "vision_ctx": 0, "language_ctx": 0}


def main(folder: Path, part: str) -> None:
    """Answer the cases of one original in a folder."""
    job = Job.read(folder, part)
    sys.path.append(job.settings["dassl"])
    patch()
    job.answer("networks", in_precisions(set_precision, played), seed=1000)


def patch() -> None:
    """No conversions to half precision and to fp32; what only downloads, reads or prints tables is a stand-in."""
    Tensor.half = lambda self, *_: self  # type: ignore[method-assign]
    nn.Module.half = nn.Module.float = lambda self: self  # type: ignore[method-assign]
    for name in ("gdown", "tabulate", "wilds", "pandas"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))


def set_precision(prec: str) -> None:
    """Set the default dtype, and change the one place where CLIP names fp32."""
    torch.set_default_dtype(getattr(torch, prec))
    norm: Any = importlib.import_module("clip.model").LayerNorm
    norm.as_written = getattr(norm, "as_written", norm.forward)
    norm.forward = nn.LayerNorm.forward if prec == "float64" else norm.as_written


def played(case: Case, job: Job, prec: str) -> Tensors:
    """What a case leads to."""
    torch.manual_seed(1000 + case["number"])
    return PARTS[case["repository"]](case, job, backbone(case, job))


def backbone(case: Case, job: Job) -> Any:
    """The CLIP of a case, in the default dtype. Its weights are left in the job's folder for our side."""
    name, model, more = case["backbone"], importlib.import_module("clip.model"), {}
    if case["repository"] == "maple":
        more = {"design_details": {**MAPLE, "maple_length": case["theirs"]["N_CTX"]}}

    def build() -> nn.Module:
        return model.CLIP(**job.settings["backbones"][name], **more)

    path, default = job.folder / f"{name}.safetensors", torch.get_default_dtype()
    if not path.exists():
        torch.set_default_dtype(torch.float32)
        save_file(random_weights(build, seed=len(name)), path)
        torch.set_default_dtype(default)
    clip = build()
    clip.load_state_dict(load_file(path))
    return clip.to(default).eval()


def trained(
    case: Case,
    job: Job,
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    answer: Callable[[Tensor], Tensor],
    step: Callable[[Tensor, Tensor], Tensor | float],
) -> Tensors:
    """The start, the answer in evaluation mode, and what three steps lead to.

    Args:
        case: the case.
        job: the job.
        model: what is set to the mode of evaluation or training.
        parameters: what trains, by name.
        answer: images → logits.
        step: images and labels → their loss, after the optimizer's step. It leaves the gradients.
    """
    images, labels = job.inputs["images"].to(torch.get_default_dtype()), job.inputs["labels"]
    if not case["untouched"]:
        shake(parameters.values(), case["number"])
    tensors = {f"start.{name}": value.detach().clone() for name, value in parameters.items()}
    with torch.no_grad():
        model.eval()
        tensors["logits"] = answer(images[-1])
        model.train()
        losses = []
    for batch, targets in zip(images[:-1], labels[:-1], strict=True):
        losses.append(torch.as_tensor(step(batch, targets), dtype=torch.get_default_dtype()).detach())
        if len(losses) == 1:
            tensors |= {
                f"gradient.{n}": value.grad.clone() for n, value in parameters.items() if value.grad is not None
            }
    with torch.no_grad():
        model.eval()
        tensors["after_logits"] = answer(images[-1])
    after = {f"after.{name}": value for name, value in parameters.items()}
    return {**tensors, **after, "losses": torch.stack(losses)}


# --- CoOp and MaPLe, with the trainers of Dassl ----------------------------------------------------------------------


def with_dassl(case: Case, job: Job, clip: Any) -> Tensors:
    """Train the prompt learner of CoOp or MaPLe, by the original's own trainer."""
    name, kind, file = DASSL[case["repository"]]
    module: Any = importlib.import_module(f"trainers.{case['repository']}")
    module.load_clip_to_cpu = lambda _: clip
    cfg = importlib.import_module("dassl.config").get_cfg_default()
    cfg.set_new_allowed(True)
    options = {"N_CTX": 16, "CSC": False, "CTX_INIT": "", "CLASS_TOKEN_POSITION": "end", **case["theirs"]}
    cfg.TRAINER[name] = type(cfg)({**options, "PREC": "fp32"})
    cfg.merge_from_file(f"configs/trainers/{file}")
    cfg.TRAINER[name].merge_from_list([word for pair in options.items() for word in pair] + ["PREC", "fp32"])
    cfg.OPTIM.WARMUP_EPOCH = -1
    cfg.INPUT.SIZE = (clip.visual.input_resolution,) * 2
    run = object.__new__(getattr(module, kind))
    run.cfg, run.device, run.batch_idx, run.num_batches = cfg, torch.device("cpu"), 0, -1
    run.dm = Namespace(dataset=Namespace(classnames=job.settings["names"]))
    run._models, run._optims, run._scheds = OrderedDict(), OrderedDict(), OrderedDict()
    run.build_model()
    parameters = dict(run.model.prompt_learner.named_parameters())

    def step(images: Tensor, labels: Tensor) -> float:
        loss: float = run.forward_backward({"img": images, "label": labels})["loss"]
        return loss

    return trained(case, job, run.model, parameters, run.model, step)


DASSL = {
    "coop": ("COOP", "CoOp", "CoOp/vit_b16.yaml"),
    "maple": ("MAPLE", "MaPLe", "MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml"),
}
"""Original → its options, its trainer, and its config, of which the optimizer is taken."""


# --- CLIP-LoRA -------------------------------------------------------------------------------------------------------


def clip_lora(case: Case, job: Job, clip: Any) -> Tensors:
    """Train CLIP-LoRA's layers with its optimizer, as its function `run_lora` does on a GPU."""
    lora: Any = importlib.import_module("loralib.utils")
    layers: Any = importlib.import_module("loralib.layers")
    tokenize = importlib.import_module("clip").tokenize
    args = Namespace(**case["theirs"], backbone="ViT-B/16")
    lora.apply_lora(args, clip)
    clip.to(torch.get_default_dtype())
    lora.mark_only_lora_as_trainable(clip)
    for module in clip.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if not args.dropout_rate:
        layers.LoRALayer.sub_lora_data = subtracted
    optimizer = torch.optim.AdamW(lora.get_lora_parameters(clip), weight_decay=1e-2, betas=(0.9, 0.999), lr=2e-4)
    texts = tokenize([f"a photo of a {name.replace('_', ' ')}." for name in job.settings["names"]])

    def answer(images: Tensor) -> Tensor:
        features, rows = clip.encode_image(images), clip.encode_text(texts)
        features, rows = (each / each.norm(dim=-1, keepdim=True) for each in (features, rows))
        return clip.logit_scale.exp() * features @ rows.t()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(answer(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss

    parameters = {name: each for name, each in clip.named_parameters() if each.requires_grad}
    return trained(case, job, clip, parameters, answer, step)


def subtracted(layer: Any) -> None:
    """Take a layer's update off a copy of its weight, so that the backward pass has the weight of the forward pass."""
    weight = (layer.weight - layer.merge_BA("weight") * layer.scaling).detach()
    del layer.weight  # which may be a parameter
    layer.weight = weight


PARTS: dict[str, Callable[[Case, Job, Any], Tensors]] = {
    "coop": with_dassl,
    "maple": with_dassl,
    "clip_lora": clip_lora,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
