"""What parity_lift.py compares: cases in the original's own option names, its backbones in small, and the inputs."""

from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]

BATCH, BATCHES = 12, 4  # three steps, and a last batch that is looked at before and after
COUNTS = (1280, 600, 250, 110, 100, 45, 20, 19, 8, 5)
NAMES = ("tench", "great white shark", "sea_lion", "missile", "missile", "airplane-cabin", "sunglasses", "a_b c")
NAMES += ("toilet tissue", "espresso")
DESCRIBED = ("tench", "hen", "goose", "koala", "llama", "missile", "sunglasses", "espresso", "pizza", "bagel")
"""Of those the original has descriptors."""
SIDES = {"CLIP-ViT-small": 32, "CLIP-RN-small": 64, "IN21K-ViT-small": 48}

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
WITH_PARTIAL = ("full_tuning", "vpt_deep", "adapter", "adaptformer", "lora", "lora_mlp", "ssf_attn", "ssf_mlp")
WITH_PARTIAL += ("ssf_ln", "mask")
HEADS = ("CosineClassifier", "LinearClassifier", "L2NormedClassifier", "LayerNormedClassifier")
LOSSES = ("CE", "Focal", "LDAM", "CB", "GRW", "BS", "LA", "LADE")
INITS = ("class_mean", "linear_probe")  # the latter not on features with which its solver stops before it converges
PROMPTS = ("default", "classname", "ensemble")

NOTES = {
    "lora_mlp": "the original stops with a TypeError: compared after its LoRA was given the missing out_dim",
    "BS": "the original compares instead of assigning: compared after the loss was assigned",
    "LDAM": "the original needs CUDA: compared after its tensor types were replaced",
    "CB": "with the class weights of fp32 on both sides also in fp64, because those of fp64 differ in the fifth digit",
}


def builds() -> dict[str, Case]:
    """Backbone → what the original's classes, or timm, build it from."""
    found: dict[str, Case] = {}
    for name, config in OPEN_CLIP.items():
        vision, text = config["vision_cfg"], config["text_cfg"]
        assert isinstance(vision, dict) and isinstance(text, dict)
        own = {"embed_dim": config["embed_dim"], "context_length": text["context_length"]}
        own |= {"image_resolution": vision["image_size"], "vocab_size": text["vocab_size"]}
        own |= {f"vision_{key}": vision[key] for key in ("layers", "width", "patch_size")}
        found[name] = {"clip": own | {f"transformer_{key}": text[key] for key in ("width", "heads", "layers")}}
    found["IN21K-ViT-small"] = {"timm": {"model_name": TIMM, "img_size": SIDES["IN21K-ViT-small"], "num_classes": 0}}
    return found


def cases() -> list[Case]:
    """Every tuner, head, loss and head initialisation of LIFT."""
    vit, resnet, timm = SIDES
    chosen = [_case("tuner", "none", backbone) for backbone in SIDES]
    chosen += [_case("tuner", name, vit, **{name: True}) for name in OF_VIT]
    chosen += [_case("tuner", name, timm, **{name: True}) for name in OF_VIT]
    chosen += [_case("tuner", name, resnet, **{name: True}) for name in OF_RESNET]
    chosen += [_case("tuner", "bias_tuning + ssf_attn", resnet, bias_tuning=True, ssf_attn=True)]
    chosen += [_case("tuner", " + ".join(names), vit, **dict.fromkeys(names, True)) for names in TOGETHER]
    for partial in (1, [0, 2]):
        chosen += [_case("tuner", f"{n}, partial {partial}", vit, partial=partial, **{n: True}) for n in WITH_PARTIAL]
    chosen += [_case("head", name, vit, adaptformer=True, classifier=name) for name in HEADS]
    chosen += [_case("loss", name, vit, adaptformer=True, loss_type=name) for name in LOSSES]
    for backbone in (vit, resnet):
        chosen += [_case("init", f"text_feat, {p}", backbone, init_head="text_feat", prompt=p) for p in PROMPTS]
        chosen += [_case("init", "zero_shot", backbone, zero_shot=True)]
    chosen += [_case("init", "text_feat, descriptor", vit, init_head="text_feat", prompt="descriptor")]
    chosen += [_case("init", name, backbone, init_head=name) for name in INITS for backbone in (timm, resnet)]
    chosen += [
        _case("init", "class_mean, vpt_deep + ssf_attn", vit, init_head="class_mean", vpt_deep=True, ssf_attn=True)
    ]
    return chosen


def _case(kind: str, name: str, backbone: str, **options: Any) -> Case:
    if kind != "init":
        options = {"adapter_dim": 4, "vpt_len": 3, "mask_ratio": 0.05, **options}
    prec = ["float32"] if kind == "init" else ["float32", "float64"]
    note = next((NOTES[part] for part in name.split(",")[0].split(" + ") if part in NOTES), "")
    names = DESCRIBED if name.endswith("descriptor") else NAMES
    return {
        "kind": kind,
        "name": name,
        "names": names,
        "backbone": backbone,
        "options": options,
        "prec": prec,
        "note": note,
    }


def sizes() -> list[Case]:
    """Tuners whose size follows from the number of classes, with nothing else said."""
    backbones = ("CLIP-ViT-small", "IN21K-ViT-small")
    tuners = ("adaptformer", "lora", "vpt_deep", "mask")
    return [
        {"backbone": backbone, "options": {tuner: True}, "classes": classes}
        for backbone in backbones
        for tuner in tuners
        for classes in (6, 10, 100, 365, 1000, 8142)
        if tuner != "mask" or classes <= 1000  # above it the share is beyond one for networks so small
    ]


def inputs() -> dict[str, Tensor]:
    """Images of each backbone [4, B, 3, H, W], labels [4, B], and logits for the metrics, from one seed."""
    generator = torch.Generator().manual_seed(0)
    count = len(COUNTS)
    found = {name: torch.randn(BATCHES, BATCH, 3, side, side, generator=generator) for name, side in SIDES.items()}
    labels = torch.randint(0, count - 1, (BATCHES, BATCH), generator=generator)
    labels[2:] = torch.arange(BATCH) % count  # each class is in a batch of training, and in the last one
    metric_labels = torch.arange(3000) % 20
    logits = torch.randn(3000, 20, generator=generator) + 2 * torch.eye(20)[metric_labels]
    spread = torch.linspace(0.02, 4, 3000)[torch.randperm(3000, generator=generator)].unsqueeze(1)
    return {**found, "labels": labels, "metric_logits": logits * spread, "metric_labels": metric_labels}


GROUPS = ([*range(7)], [*range(7, 14)], [*range(14, 20)])  # many, med, few
EPOCHS = (10, 20, 7)
