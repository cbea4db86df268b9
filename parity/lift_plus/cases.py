"""What is compared with LIFT+: cases in its keys, small versions of its backbones, and the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tailtune.configs.lift_plus_words import translated
from tailtune.parity.clips import openai_arguments
from tailtune.parity.job import Case, Tensors
from tailtune.parity.lift.cases import BATCH, BATCHES, COUNTS, NAMES, OPEN_CLIP, TIMM

SIDES = {"CLIP-ViT-small": 32, "CLIP-RN-small": 64, "IN21K-ViT-small": 48, "IN1K-RN-small": 64}
"""Backbone → pixels of the sides of its images."""
BACKBONES = {
    "CLIP-ViT-small": ("CLIP-ViT-B/16", "clip_vit_b16"),
    "CLIP-RN-small": ("CLIP-RN50", "clip_rn50"),
    "IN21K-ViT-small": ("IN21K-ViT-B/16", "in21k_vit_b16"),
    "IN1K-RN-small": ("IN1K-RN50", "in1k_rn50"),
}
"""Backbone → that of LIFT+ whose place it takes, and the word for it after `-b`."""
TIMM_RESNET = "resnet18"
SIZES = {"v.lora_dim": 4, "v.adapter_dim": 4, "v.adaptformer_dim": 4, "v.pt_len": 3, "v.aft_ratio": 0.05}
TUNERS = ("fft", "bitfit", "pt", "lora", "adapter", "adaptformer", "ssf", "aft")
OF_RESNET = ("fft", "bitfit", "ssf")
HEADS = ("CosineClassifier", "LinearClassifier", "L2NormClassifier", "LayerNormClassifier")
LOSSES = ("CE", "Focal", "LDAM", "CB", "GRW", "BS", "LA", "LADE")
INITS = {
    "CLIP-ViT-small": ("semantic", "class_mean", "linear_probing"),
    "CLIP-RN-small": ("semantic", "class_mean"),  # with its features, the solver of linear_probing ends at zero
    "IN21K-ViT-small": ("class_mean", "linear_probing"),
    "IN1K-RN-small": ("class_mean", "linear_probing"),
}
"""Backbone → head initialisations."""
TEXT_ALONE = {"classifier": None, "classifier_init": None}
"""Text features classify."""
CROPS = {"mda": ("min", "convex", "linear", "concave", "max"), "test": (None, 0, 16), "fivecrop": (None, 12)}
EPOCHS, PICTURES, SEEDS = 5, ((40, 40), (64, 36), (30, 75), (200, 14)), 3
"""Length of the schedules of crops, sizes of the pictures, and random seeds for each of them."""
RESOLUTION = 32
NOTES = {
    "linear_probing": "of the original's features, in fp64 for its solver, too, whose iterations magnify rounding",
    "LDAM": "the original needs CUDA: compared after its tensor types were replaced",
    "CB": "with the class weights of fp32 on both sides also in fp64, because those of fp64 differ in the fifth digit",
}


def ask(checkouts: Mapping[str, Path]) -> tuple[dict[str, list[Case]], Case]:
    """All cases by kind, and the settings that they share."""
    cases = {"networks": networks(), "size": sizes(), "schedule": schedules(), "pictures": pictures()}
    backbones: dict[str, Case] = {name: {"clip": openai_arguments(config)} for name, config in OPEN_CLIP.items()}
    side = SIDES["IN21K-ViT-small"]
    backbones["IN21K-ViT-small"] = {"timm": {"model_name": TIMM, "img_size": side, "num_classes": 0}}
    backbones["IN1K-RN-small"] = {"timm": {"model_name": TIMM_RESNET, "num_classes": 0}}
    settings: Case = {"backbones": backbones, "clip": str(checkouts["clip"]), "counts": COUNTS, "names": NAMES}
    settings |= {"epochs": EPOCHS, "pictures": len(PICTURES), "seeds": SEEDS}
    return cases, settings


def networks() -> list[Case]:
    """Every tuner, head, loss, head initialisation, and all that trains text."""
    vit, resnet, timm, timm_resnet = SIDES
    cases = [_network("tuner", "none", backbone) for backbone in SIDES]
    for backbone, tuners in ((vit, TUNERS), (timm, TUNERS), (resnet, OF_RESNET), (timm_resnet, OF_RESNET)):
        cases += [_network("tuner", name, backbone, **{f"v.{name}": True}) for name in tuners]
    cases += [
        _network("tuner", f"{name}, layers 1", vit, **{f"v.{name}": True, f"v.{name}_layers": 1}) for name in TUNERS
    ]
    cases += [_network("tuner", f"aft, {loc}", vit, **{"v.aft": True, "v.aft_loc": loc}) for loc in ("attn", "mlp")]
    cases += [_network("tuner", "aft, seed 7", vit, **{"v.aft": True, "v.aft_seed": 7})]
    several: Case = {
        "v.pt": True,
        "v.lora": True,
        "v.ssf": True,
        "v.adapter": True,
        "v.adaptformer": True,
        "v.aft": True,
    }
    cases += [_network("tuner", "all that insert", vit, **several)]
    several |= {"v.pt_layers": "range(1)", "v.lora_layers": 1, "v.ssf_layers": "range(0,3,2)"}
    several |= {"v.aft_layers": "list(range(1))+list(range(2,3))", "v.bitfit": True}
    cases += [_network("tuner", "all that insert + bitfit, layers of each", vit, **several)]
    adaptformer = {"v.adaptformer": True}
    cases += [_network("head", name, vit, classifier=name, **adaptformer) for name in HEADS]
    cases += [_network("head", "CosineClassifier, scale 15", vit, classifier_scale=15, **adaptformer)]
    cases += [_network("loss", name, vit, loss_type=name, **adaptformer) for name in LOSSES]
    cases += of_text(vit)
    for backbone, inits in INITS.items():
        tuner = adaptformer if backbone in (vit, timm) else {}
        cases += [_network("init", init, backbone, classifier_init=init, **tuner) for init in inits]
    return cases


def of_text(vit: str) -> list[Case]:
    """What trains without a classifier."""
    cases = [_network("text", name, vit, **{f"l.{name}": True, "l.pt_layers": None}) for name in TUNERS]
    cases += [
        _network("text", f"{name}, layer 1", vit, **{f"l.{name}": True, f"l.{name}_layers": "range(1,2)"})
        for name in TUNERS
    ]
    cases += [
        _network("text", "pt, first layer, 5 prompts", vit, **{"l.pt": True, "l.pt_layers": "range(1)", "l.pt_len": 5})
    ]
    different = {"l.lora": True, "l.lora_dim": 2, "l.lora_layers": "range(1)", "l.adapter": True, "l.adapter_dim": 8}
    different |= {"l.aft": True, "l.aft_layers": 1, "l.aft_loc": "attn", "l.aft_seed": 3, "l.aft_ratio": 0.1}
    cases += [_network("text", "lora + adapter + aft, sizes and layers of each", vit, **different)]
    cases += [
        _network("text", f"coop, {place}, {length} contexts", vit, coop=True, coop_cls_pos=place, coop_ctx_len=length)
        for place, length in (("end", 4), ("middle", 5), ("front", 4))
    ]
    behind = {"clip_adapter": True, "proj_tuning": True}
    cases += [
        _network("text", "coop + lora + adaptformer", vit, coop=True, **{"l.lora": True, "v.adaptformer": True}),
        _network("text", "clip_adapter", vit, clip_adapter=True),
        _network("text", "proj_tuning", vit, proj_tuning=True),
        _network("text", "all behind both + ssf of both", vit, **behind, **{"l.ssf": True, "v.ssf": True}),
    ]
    return cases


def _network(kind: str, name: str, backbone: str, **keys: Any) -> Case:
    """A case with keys of LIFT+ beside those of its `-m lp`."""
    start = {"classifier_init": None} if kind != "text" else TEXT_ALONE
    return _case(kind, name, backbone, {**start, **SIZES, **keys}) | {
        "prec": ["float32"] if kind == "init" else ["float32", "float64"],
        "note": NOTES.get(name, ""),
    }


def _case(kind: str, name: str, backbone: str, keys: Case) -> Case:
    keys = {"classifier": "CosineClassifier", **keys}
    model, words = translated(BACKBONES[backbone][1], "lp", [str(word) for pair in keys.items() for word in pair])
    options = dict(zip(words[::2], words[1::2], strict=True))
    theirs = {"backbone": BACKBONES[backbone][0], **keys}
    case = {"kind": kind, "name": name, "backbone": backbone, "config": model, "theirs": theirs}
    return case | {"our_options": options, "note": ""}


def sizes() -> list[Case]:
    """Tuners whose size follows from the numbers of classes and of blocks, with no option set."""
    vit, *_ = SIDES
    tuners: list[tuple[str, str, Case]] = [(name, name, {}) for name in ("pt", "lora", "adapter", "adaptformer", "aft")]
    tuners += [(f"aft, {loc}", "aft", {"v.aft_loc": loc}) for loc in ("attn", "mlp")]
    return [
        _case("size", f"{name}, layers {layers}", vit, {f"v.{tuner}": True, f"v.{tuner}_layers": layers, **more})
        | {"classes": [10, 100, 1000]}
        for name, tuner, more in tuners
        for layers in (None, 1)
    ]


def schedules() -> list[Case]:
    """Learning rates."""
    return [
        _case("schedule", f"learning rates of {epochs} epochs", "CLIP-ViT-small", {"num_epochs": epochs})
        for epochs in (5, 15, 50)
    ]


def pictures() -> list[Case]:
    """Crops of training and of tests."""
    training = [({"mda": True, "mda_func": name}, f"mda, {name}") for name in CROPS["mda"]] + [({"mda": False}, "crop")]
    tests = [({"expand": margin}, f"test, expand {margin}") for margin in CROPS["test"]]
    tests += [({"tte": True, "expand": margin}, f"five crops, expand {margin}") for margin in CROPS["fivecrop"]]
    all_of = [("train", *each) for each in training] + [("test", *each) for each in tests] + [("init", {}, "head")]
    return [
        _case("pictures", name, "CLIP-ViT-small", {"num_epochs": EPOCHS, "resolution": RESOLUTION, **keys})
        | {"split": split}
        for split, keys, name in all_of
    ]


def inputs(_: Mapping[str, Any]) -> Tensors:
    """Images of each backbone [4, B, 3, H, W] and labels [4, B], pictures uint8 [H, W, 3], from one seed."""
    draws = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(BATCHES, BATCH, 3, side, side, generator=draws) for name, side in SIDES.items()}
    labels = torch.randint(0, len(COUNTS) - 1, (BATCHES, BATCH), generator=draws)
    labels[2:] = torch.arange(BATCH) % len(COUNTS)  # every class is in the third batch of training, and in the last
    for number, (width, height) in enumerate(PICTURES):
        coarse = torch.randint(0, 256, (3, height // 6 + 1, width // 6 + 1), generator=draws, dtype=torch.uint8)
        picture = coarse.repeat_interleave(6, 1).repeat_interleave(6, 2)[:, :height, :width]
        tensors[f"picture.{number}"] = picture.permute(1, 2, 0).contiguous()
    return {**tensors, "labels": labels}
