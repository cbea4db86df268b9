"""How another program makes the plain network that exported weights fit."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import open_clip
import timm
import torch
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.resnet_encoder import ResNetEncoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.trainers.export.exported_model import ExportedModel

NOWHERE = UserError("export: no other library has this network, so weights alone would say nothing; use `export onnx`")
SIZES = {384: "small", 768: "base", 1024: "large", 1280: "huge"}


def network(subject: ExportedModel, num_classes: int = 0) -> dict[str, Any]:
    """The function that makes it, its arguments, both as code, and the prefix of the names of weights.

    Args:
        num_classes: of a classifier `head` within a ViT; 0: the network gives features.
    """
    found = _network(subject, num_classes)
    found.setdefault("then", "")
    words = [f"{name}={value!r}" for name, value in found["kwargs"].items()]
    words += [f"norm_layer={found['norm_layer']}"] if "norm_layer" in found else []
    return {**found, "code": f"net = {found['create']}({', '.join(words)}){found['then']}"}


def _network(subject: ExportedModel, num_classes: int) -> dict[str, Any]:
    host, net = subject.encoder, subject.encoder.net
    if isinstance(host, ViTEncoder):
        for each in _names(net):
            kwargs: dict[str, Any] = {"model_name": each, "img_size": subject.resolution, "num_classes": num_classes}
            if timm.is_model(each) and _same(partial(timm.create_model, **{**kwargs, "num_classes": 0}), host):
                return {"create": "timm.create_model", "kwargs": kwargs, "prefix": ""}
        made, norm = _by_hand(net, num_classes), partial(nn.LayerNorm, eps=net.norm.eps)
        if not _same(partial(VisionTransformer, **{**made["kwargs"], "num_classes": 0}, norm_layer=norm), host):
            raise NOWHERE
        return {"create": "timm.models.VisionTransformer", **made, "prefix": ""}
    if isinstance(host, ResNetEncoder):
        if host.timm_name is None:
            raise NOWHERE
        kwargs = {"model_name": host.timm_name, "num_classes": 0}
        return {"create": "timm.create_model", "kwargs": kwargs, "prefix": ""}
    if name := timm_name(net):
        resized = subject.resolution != net.pretrained_cfg["input_size"][-1] and hasattr(net, "set_input_size")
        then = f"\nnet.set_input_size({subject.resolution})" if resized else ""
        made = {"create": "timm.create_model", "kwargs": {"model_name": name, "num_classes": 0}}
        return {**made, "then": then, "prefix": ""}
    kwargs = {"model_name": subject.arch}
    if subject.resolution != clip_resolution(subject):
        kwargs["force_image_size"] = subject.resolution
    # CoCa's towers give tokens besides, for captions.
    then = ".visual" + ("\nnet.output_tokens = False" if hasattr(net, "output_tokens") else "")
    return {"create": "open_clip.create_model", "kwargs": kwargs, "then": then, "prefix": "visual."}


def clip_resolution(subject: ExportedModel) -> int:
    """Side of the images that open_clip's network of that name takes."""
    return int(open_clip.get_model_config(subject.arch)["vision_cfg"]["image_size"])


def timm_name(net: Any) -> str | None:
    """Of a network that timm has made."""
    return getattr(net, "pretrained_cfg", {}).get("architecture")


def _names(net: Any) -> Iterator[str]:
    """Names under which timm may have a ViT: the one it was made by, or that of a CLIP of this shape."""
    if name := timm_name(net):
        yield name
    patch, quick = net.patch_embed.patch_size[0], isinstance(net.blocks[0].mlp.act, QuickGELU)
    if net.embed_dim in SIZES:
        yield f"vit_{SIZES[net.embed_dim]}_patch{patch}_clip_{'quickgelu_' if quick else ''}224"


def _same(make: Callable[[], Any], host: ViTEncoder) -> bool:
    """Whether a network is the same function of its weights as the plain one in a host."""
    with torch.device("meta"):
        other = make()

    def parts(net: Any, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        block = net.blocks[0]
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        act = block.mlp.act(torch.linspace(-3, 3, 64, device="cpu")).tolist()  # its class has several names
        return shapes, getattr(net.norm, "eps", None), act, block.attn.num_heads, net.global_pool

    return parts(other, other.state_dict()) == parts(host.net, host.pretrained_state())


def _by_hand(net: Any, num_classes: int) -> dict[str, Any]:
    """Arguments of timm's class for a CLIP tower that timm has no name for."""
    block = net.blocks[0]
    kwargs = {
        "img_size": list(net.patch_embed.img_size),
        "patch_size": list(net.patch_embed.patch_size),
        "embed_dim": net.embed_dim,
        "depth": len(net.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / net.embed_dim,
        "pre_norm": isinstance(net.norm_pre, nn.LayerNorm),
        "act_layer": "quick_gelu" if isinstance(block.mlp.act, QuickGELU) else "gelu",
        "num_classes": num_classes,
    }
    return {"kwargs": kwargs, "norm_layer": f"functools.partial(torch.nn.LayerNorm, eps={net.norm.eps})"}
