"""What is compared with CoOp, MaPLe and CLIP-LoRA: cases in their options and in ours, small CLIPs, and the inputs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tailtune.parity.clips import openai_arguments
from tailtune.parity.job import Case, Tensors

BATCH, BATCHES = 8, 4
"""Images of a batch, and batches: three to train on, and one to evaluate before and after training."""
NAMES = ("tench", "great white shark", "airplane_cabin", "hen", "St. Bernard", "T-shirt")
SIDE = 32
"""Pixels of the sides of the images."""
DEEP = {"layers": 12, "width": 64, "heads": 2}
CLIPS: dict[str, dict[str, Any]] = {
    "CLIP-ViT-deep": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIDE, "layers": 12, "width": 64, "patch_size": 8, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, **DEEP},
    },
    "CLIP-ViT-wide": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {"image_size": SIDE, "layers": 3, "width": 768, "patch_size": 8, "head_width": 64},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 3},
    },
}
"""Backbone → open_clip's config. MaPLe's code has the widths of ViT-B/16 in it, and CLIP-LoRA's its twelve blocks."""
SGD = {"lr": 0.002, "weight_decay": 5e-4, "momentum": 0.9}
ADAMW = {"optimizer": "adamw", "lr": 2e-4, "weight_decay": 0.01}
MENDED = (
    "the original takes its update off the weights before the backward pass, which then computes with other weights: "
    "compared after it was taken off a copy"
)


def ask(checkouts: Mapping[str, Path]) -> tuple[dict[str, list[Case]], Case]:
    """All cases, and the settings that they share."""
    cases = {"networks": [*of_coop(), *of_maple(), *of_clip_lora()]}
    backbones = {name: openai_arguments(config) for name, config in CLIPS.items()}
    return cases, {"backbones": backbones, "names": NAMES, "dassl": str(checkouts["dassl"])}


def of_coop() -> list[Case]:
    """Contexts at all three places, of each class, and from words."""
    cases = []
    for position in ("end", "middle", "front"):
        for per_class in (False, True):
            for length in (4, 5) if position == "middle" else (4,):
                theirs = {"N_CTX": length, "CSC": per_class, "CLASS_TOKEN_POSITION": position}
                ours = {"context_len": length, "context_per_class": per_class, "context_position": position}
                end = ", of each class" if per_class else ""
                cases.append(_case("coop", f"{length} contexts, {position}{end}", theirs, ours))
    words = ("from words", {"CTX_INIT": "a photo of a"}, {"context_words": "a photo of a"})
    cases.append(_case("coop", *words, untouched=True))
    return [case | {"our_options": {"context": "coop", **SGD, **case["our_options"]}} for case in cases]


def of_maple() -> list[Case]:
    """Contexts in one, two and all blocks, random and from words."""
    cases = []
    for depth, length in ((1, 2), (2, 2), (3, 2), (3, 4)):
        theirs = {"N_CTX": length, "PROMPT_DEPTH": depth}
        ours: Case = {"context_len": length, "context_depth": depth}
        name = f"{length} contexts in {depth} blocks"
        cases.append(_case("maple", name, {**theirs, "CTX_INIT": ""}, ours))
        words = "a photo of a"
        cases.append(
            _case("maple", f"{name}, from words", {**theirs, "CTX_INIT": words}, {**ours, "context_words": words})
        )
    options = {"context": "maple", **SGD, "lr": 0.0035}
    return [case | {"our_options": options | case["our_options"], "backbone": "CLIP-ViT-wide"} for case in cases]


def of_clip_lora() -> list[Case]:
    """Encoders, positions, ranks and scales, and the path without dropout."""
    base: Case = {
        "encoder": "both",
        "position": "all",
        "params": ["q", "k", "v"],
        "r": 2,
        "alpha": 1,
        "dropout_rate": 0.25,
    }
    blocks = {
        **{"all": "none", "bottom": "[0,4]", "mid": "[4,8]", "up": "4", "half-up": "6", "half-bottom": "[0,6]"},
        "top3": "3",
    }
    changes: list[tuple[str, Case, Case]] = [(f"position {name}", {"position": name}, {}) for name in blocks]
    changes += [(f"encoder {name}", {"encoder": name}, {}) for name in ("text", "vision")]
    changes += [("rank 4, scale 3", {"r": 4, "alpha": 3}, {"clip_lora_rank": 4, "clip_lora_alpha": 3})]
    changes += [
        (f"of {', '.join(params)}", {"params": params}, {"clip_lora_params": f"[{','.join(params)}]"})
        for params in (["q", "v"], ["q", "k", "v", "o"])
    ]
    changes += [("without dropout", {"dropout_rate": 0.0}, {})]
    cases = []
    for name, theirs, ours in changes:
        theirs = {**base, **theirs}
        encoders = {"both": ("clip_lora", "text_clip_lora"), "text": ("text_clip_lora",), "vision": ("clip_lora",)}
        options = {**dict.fromkeys(encoders[theirs["encoder"]], True), "clip_lora_dropout": 0, **ADAMW, **ours}
        if (span := blocks[theirs["position"]]) != "none":
            options |= {"partial": span, "text_partial": span}
        note = MENDED if name == "without dropout" else ""
        cases.append(_case("clip_lora", name, theirs, options) | {"note": note})
    return cases


def _case(repository: str, name: str, theirs: Case, ours: Case, untouched: bool = False) -> Case:
    """A case.

    Args:
        repository: the original.
        name: what is compared.
        theirs: options in the original's names.
        ours: those of ours that mean the same.
        untouched: whether what trains starts where the original puts it, and not a little beside.
    """
    case = {"repository": repository, "name": name, "theirs": theirs, "our_options": ours, "untouched": untouched}
    return case | {"backbone": "CLIP-ViT-deep", "note": "", "prec": ["float32", "float64"]}


def inputs(_: Mapping[str, Any]) -> Tensors:
    """Images [4, B, 3, H, W] and labels [4, B]."""
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(BATCHES, BATCH, 3, SIDE, SIDE, generator=draws)
    return {"images": images, "labels": torch.randint(0, len(NAMES), (BATCHES, BATCH), generator=draws)}
