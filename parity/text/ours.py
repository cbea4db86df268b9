"""Our side of the comparison with CoOp, MaPLe and CLIP-LoRA: through our configs and builders."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tailtune.configs import CfgNode, load_configs
from tailtune.models import ClassificationModel, resolve
from tailtune.parity.errors import with_prefix
from tailtune.parity.job import Case, Job, Tensors
from tailtune.parity.subject import Row
from tailtune.parity.text.cases import BATCH, CLIPS, NAMES, SIDE
from tailtune.parity.trained import PREC, built, exact_scale, of_precisions, register_clips, training_errors
from tailtune.trainers.methods import Method
from tailtune.trainers.option_schema import declared

FIGURES = ("logits", "loss", "gradients", "after_3_steps", "float64")


def build(job: Job, case: Case, prec: str) -> tuple[CfgNode, Method]:
    """Config and method of a case, by the same builders as in a run."""
    register_clips(job.folder, CLIPS)
    options = {"backbone": case["backbone"], "pretrained": job.folder / f"{case['backbone']}.safetensors"}
    options |= {"resolution": SIDE, "classifier": "TextClassifier", "init_head": "none", "loss_type": "CE"}
    options |= {"prec": PREC[prec], "num_epochs": 1, "batch_size": BATCH, **case["our_options"]}
    if prec == "float64":
        options |= exact_scale(job.folder / f"{case['backbone']}.safetensors")
    words = [str(word) for pair in options.items() for word in pair]
    cfg = resolve(load_configs("fake_lt", "tiny_clip", words, declared())[-1])
    return cfg, built(cfg, NAMES, torch.ones(len(NAMES)))


def compare_network(case: Case, job: Job) -> list[Row]:
    """The row of a case."""
    tensors, errors = job.tensors(case), {}
    for prec in PREC:
        original, images = with_prefix(tensors, f"{prec}."), job.inputs["images"].to(getattr(torch, prec))
        cfg, method = build(job, case, prec)
        start = with_prefix(original, "start.")
        load = partial(fill, start=start)
        read = partial(values, shapes={name: tensor.shape for name, tensor in start.items()})
        of_all = prec == "float32"
        errors[prec] = training_errors(cfg, method, load, read, original, images, job.inputs["labels"], of_all)
    facts = {key: case[key] for key in ("repository", "name", "backbone")}
    return [facts | dict.fromkeys(FIGURES) | of_precisions(errors) | {"note": case["note"]}]


def values(model: ClassificationModel, shapes: dict[str, torch.Size]) -> Tensors:
    """What trains in our model, under the original's names and in its shapes."""
    return {name: view.reshape(shapes[name]).clone() for name, view in places(model)}


@torch.no_grad()
def fill(model: ClassificationModel, start: Tensors) -> None:
    """Copy the original's values into our model.

    Raises:
        SystemExit: a tensor of either side has no counterpart.
    """
    targets = dict(places(model))
    if targets.keys() != start.keys():
        raise SystemExit(f"names without a counterpart: {sorted(targets.keys() ^ start.keys())[:6]}")
    for name, target in targets.items():
        target.copy_(start[name].reshape(target.shape))


def places(model: ClassificationModel) -> Iterator[tuple[str, Tensor]]:
    """Names of the originals → views of our tensors, some of which are transposed."""
    tower: Any = model.text
    if tower.context is not None:
        yield from ((context_name(name), each.data) for name, each in tower.context.named_parameters())
    hosts: list[tuple[str, Any]] = [("transformer", tower), ("visual.transformer", model.encoder)]
    for prefix, encoder in hosts:
        for index, sites in encoder.tuners["clip_lora"].items() if "clip_lora" in encoder.tuners else ():
            for site, lora in sites.items():
                stem = f"{prefix}.resblocks.{index}.attn.{'proj' if site == 'proj' else f'{site}_proj'}.w_lora_"
                yield f"{stem}A", lora.lora_A.data.T
                yield f"{stem}B", lora.lora_B.data.T


def context_name(name: str) -> str:
    """CoOp's or MaPLe's name of a tensor of our contexts."""
    if name in ("vectors", "vectors.0"):
        return "ctx"
    if match := re.fullmatch(r"vectors\.(\d+)", name):
        return f"compound_prompts_text.{int(match[1]) - 1}"
    match = re.fullmatch(r"couplings\.(\d+)\.(weight|bias)", name)
    assert match is not None, name
    index, kind = int(match[1]), match[2]
    return f"compound_prompt_projections.{index - 1}.{kind}" if index else f"proj.{kind}"
