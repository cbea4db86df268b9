"""What is compared with LIFT: cases in its option names, small versions of its backbones, and the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tailtune.parity.clips import openai_arguments
from tailtune.parity.job import Case, Tensors

BATCH, BATCHES = 12, 4
"""Images of a batch, and batches: three to train on, and one to evaluate before and after training."""
COUNTS = (1280, 600, 250, 110, 100, 45, 20, 19, 8, 5)
"""Training images of each class."""
NAMES = (
    *("tench", "great white shark", "sea_lion", "missile", "missile", "airplane-cabin", "sunglasses", "a_b c"),
    *("toilet tissue", "espresso"),
)
DESCRIBED = ("tench", "hen", "goose", "koala", "llama", "missile", "sunglasses", "espresso", "pizza", "bagel")
"""Class names that the original has descriptors of."""
SIDES = {"CLIP-ViT-small": 32, "CLIP-RN-small": 64, "IN21K-ViT-small": 48}
"""Backbone → pixels of the sides of its images."""

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
VIT = {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "head_width": 64}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
OPEN_CLIP = {
    name: {"embed_dim": 64, "quick_gelu": True, "vision_cfg": vision, "text_cfg": TEXT}
    for name, vision in (("CLIP-ViT-small", VIT), ("CLIP-RN-small", RESNET))
}
"""Backbone → the model config that open_clip builds it from."""
TIMM = "vit_tiny_patch16_224"

MODULES = ("vpt_shallow", "vpt_deep", "adapter", "adaptformer", "lora", "lora_mlp", "ssf_attn", "ssf_mlp", "ssf_ln")
OF_VIT = ("full_tuning", "bias_tuning", "ln_tuning", "mask", *MODULES)
OF_RESNET = ("full_tuning", "bias_tuning", "bn_tuning", "ssf_attn")
TOGETHER = (
    ("lora", "ssf_attn", "ssf_ln"),
    ("adaptformer", "bias_tuning"),
    ("full_tuning", "adaptformer"),
    ("vpt_deep", "adapter", "adaptformer", "lora", "lora_mlp", "ssf_attn", "ssf_mlp", "ssf_ln", "mask"),
)
WITH_PARTIAL = (
    *("full_tuning", "vpt_deep", "adapter", "adaptformer", "lora", "lora_mlp", "ssf_attn", "ssf_mlp", "ssf_ln"),
    "mask",
)
HEADS = ("CosineClassifier", "LinearClassifier", "L2NormedClassifier", "LayerNormedClassifier")
LOSSES = ("CE", "Focal", "LDAM", "CB", "GRW", "BS", "LA", "LADE")
INITS = ("class_mean", "linear_probe")  # on backbones with which the solver of linear_probe converges
PROMPTS = ("default", "classname", "ensemble")

NOTES = {  # tuner or loss → what a reader of its row has to know
    "lora_mlp": "the original stops with a TypeError: compared after its LoRA was given the missing out_dim",
    "BS": "the original compares instead of assigning: compared after the loss was assigned",
    "LDAM": "the original needs CUDA: compared after its tensor types were replaced",
    "CB": "with the class weights of fp32 on both sides also in fp64, because those of fp64 differ in the fifth digit",
}


def builds() -> dict[str, Case]:
    """Backbone → arguments of the original's CLIP class, or of `timm.create_model`."""
    arguments = {name: {"clip": openai_arguments(config)} for name, config in OPEN_CLIP.items()}
    timm = {"model_name": TIMM, "img_size": SIDES["IN21K-ViT-small"], "num_classes": 0}
    return arguments | {"IN21K-ViT-small": {"timm": timm}}


def ask(checkouts: Mapping[str, Path]) -> tuple[dict[str, list[Case]], Case]:
    """All cases by kind, and the settings that they share."""
    cases: dict[str, list[Case]] = {
        "networks": networks(),
        "metrics": [{"name": "metrics"}],
        "schedule": [{"name": f"learning rate, {epochs} epochs", "epochs": epochs} for epochs in EPOCHS],
        "size": sizes(),
    }
    descriptors = checkouts["lift"] / "utils" / "descriptors_imagenet.json"
    settings = {"backbones": builds(), "counts": COUNTS, "groups": GROUPS, "descriptors": str(descriptors)}
    return cases, settings


def networks() -> list[Case]:
    """Every tuner, head, loss and head initialisation of LIFT."""
    vit, resnet, timm = SIDES
    cases = [_network("tuner", "none", backbone) for backbone in SIDES]
    cases += [_network("tuner", name, vit, **{name: True}) for name in OF_VIT]
    cases += [_network("tuner", name, timm, **{name: True}) for name in OF_VIT]
    cases += [_network("tuner", name, resnet, **{name: True}) for name in OF_RESNET]
    cases += [_network("tuner", "bias_tuning + ssf_attn", resnet, bias_tuning=True, ssf_attn=True)]
    cases += [_network("tuner", " + ".join(names), vit, **dict.fromkeys(names, True)) for names in TOGETHER]
    for partial in (1, [0, 2]):
        cases += [_network("tuner", f"{n}, partial {partial}", vit, partial=partial, **{n: True}) for n in WITH_PARTIAL]
    cases += [_network("head", name, vit, adaptformer=True, classifier=name) for name in HEADS]
    cases += [_network("loss", name, vit, adaptformer=True, loss_type=name) for name in LOSSES]
    for backbone in (vit, resnet):
        cases += [_network("init", f"text_feat, {p}", backbone, init_head="text_feat", prompt=p) for p in PROMPTS]
        cases += [_network("init", "zero_shot", backbone, zero_shot=True)]
    cases += [_network("init", "text_feat, descriptor", vit, init_head="text_feat", prompt="descriptor")]
    cases += [_network("init", name, backbone, init_head=name) for name in INITS for backbone in (timm, resnet)]
    tuners = {"vpt_deep": True, "ssf_attn": True}
    return [*cases, _network("init", "class_mean, vpt_deep + ssf_attn", vit, init_head="class_mean", **tuners)]


def _network(kind: str, name: str, backbone: str, **options: Any) -> Case:
    if kind != "init":
        options = {"adapter_dim": 4, "vpt_len": 3, "mask_ratio": 0.05, **options}
    return {
        "kind": kind,
        "name": name,
        "names": DESCRIBED if name.endswith("descriptor") else NAMES,
        "backbone": backbone,
        "options": options,
        "prec": ["float32"] if kind == "init" else ["float32", "float64"],
        "note": next((NOTES[part] for part in name.split(",")[0].split(" + ") if part in NOTES), ""),
    }


def sizes() -> list[Case]:
    """Tuners whose size follows from the number of classes, with no option set."""
    return [
        {
            "name": tuner,
            "backbone": backbone,
            "options": {tuner: True},
            # A mask of this many classes is a share above one of networks so small.
            "classes": [classes for classes in (6, 10, 100, 365, 1000, 8142) if tuner != "mask" or classes <= 1000],
        }
        for backbone in ("CLIP-ViT-small", "IN21K-ViT-small")
        for tuner in ("adaptformer", "lora", "vpt_deep", "mask")
    ]


def inputs(_: Mapping[str, Any]) -> Tensors:
    """Images of each backbone [4, B, 3, H, W], labels [4, B], and logits for the metrics [N, 20], from one seed."""
    draws = torch.Generator().manual_seed(0)
    classes = len(COUNTS)
    images = {name: torch.randn(BATCHES, BATCH, 3, side, side, generator=draws) for name, side in SIDES.items()}
    labels = torch.randint(0, classes - 1, (BATCHES, BATCH), generator=draws)
    labels[2:] = torch.arange(BATCH) % classes  # every class is in the third batch of training, and in the last batch
    metric_labels = torch.arange(3000) % 20
    logits = torch.randn(3000, 20, generator=draws) + 2 * torch.eye(20)[metric_labels]
    spread = torch.linspace(0.02, 4, 3000)[torch.randperm(3000, generator=draws)].unsqueeze(1)
    return {**images, "labels": labels, "metric_logits": logits * spread, "metric_labels": metric_labels}


GROUPS = ([*range(7)], [*range(7, 14)], [*range(14, 20)])
"""Classes of the groups many, med and few, for the metrics."""
EPOCHS = (10, 20, 7)
"""Lengths of the schedules."""
