"""What the keys of `FeatureStore` are made of: digests of tensors and modules, and the circumstances of a result."""

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.trainers.runs.metrics_file import device_name
from tailtune.trainers.weight_digest import weight_digest

LIBRARIES = ("torch", "timm", "open_clip_torch", "peft")


def encoder_digest(encoder: Encoder, untuned: bool) -> str:
    """A digest of what an encoder computes: its tensors, and the numbers and texts among its modules' attributes.

    Args:
        encoder: the encoder.
        untuned: leave out the tuners. Without tuners this is the digest of the same encoder.
    """
    untuned = untuned or not (len(encoder.tuners) or encoder.peft_layers)

    def wanted(name: str) -> bool:
        return not untuned or not (name.startswith("tuners.") or "default" in name.split("."))  # peft's are `default`

    return _digest_where(wanted, encoder, encoder.net if untuned else encoder)


def digest_before(encoder: ViTEncoder, block: int) -> str:
    """As `encoder_digest`, of what acts before a block, tuners included."""
    return _digest_where(lambda name: encoder.first_use(name) < block, encoder, encoder)


def _digest_where(wanted: Callable[[str], bool], encoder: Encoder, host: nn.Module) -> str:
    """The digest of the tensors of an encoder and of the modules within `host` whose names are wanted."""
    tensors = [each for each in (*encoder.named_parameters(), *encoder.named_buffers()) if wanted(each[0])]
    modules = [
        [type(module).__qualname__, _plain({key: each for key, each in vars(module).items() if "_hooks" not in key})]
        for name, module in host.named_modules()
        if wanted(name)
    ]  # torch counts hooks in a process, so their numbers say nothing
    return f"{weight_digest(encoder, tensors)}-{hash_of(modules)}"


def _plain(value: Any) -> Any:
    """The numbers, texts and names of functions in a value, also within lists and dicts; None for the rest."""
    if isinstance(value, dict):
        found = {str(key): _plain(each) for key, each in value.items()}
        return {key: each for key, each in found.items() if each not in (None, [], {})}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bool | int | float | str):
        return value
    return getattr(value, "__qualname__", None) if callable(value) and not isinstance(value, nn.Module) else None


def hash_of(content: Any) -> str:
    """SHA-256 of content that JSON can express."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def circumstances() -> dict[str, Any]:
    """Device, libraries and settings on which the last bits of a result depend."""
    cudnn = torch.backends.cudnn
    return {
        "device": device_name(),
        "libraries": [version(name) for name in LIBRARIES],
        "kernels": [cudnn.deterministic, cudnn.allow_tf32, torch.get_float32_matmul_precision()],
    }
