"""Finds the code with which timm or open_clip creates the plain network for the exported weights."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones.plain_vit import is_quick_gelu
from tailtune.models.backbones.resnet_encoder import ResNetEncoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.trainers.export.exported_model import ExportedModel, feature_affine

open_clip = lazy_module("open_clip")
timm = lazy_module("timm")
NO_LIBRARY = UserError("export: no other library has this network, so nobody could load its weights; use `export onnx`")
"""Error for a network that neither timm nor open_clip can create."""
TIMM_SIZES = {384: "small", 768: "base", 1024: "large", 1280: "huge"}
"""Width of a ViT → the word for this width in timm's model names."""


def network(exported: ExportedModel, num_classes: int = 0) -> dict[str, Any]:
    """Describe, for `facts.json`, how to create the plain network.

    Args:
        exported: the model.
        num_classes: number of outputs of the classifier that `classifier_name` names; 0: the network returns features.

    Returns:
        `create`: name of the function that creates the network; `kwargs` and `norm_layer`: its arguments; `then`: code
        after the call; `code`: the whole Python code; `prefix`: prefix of the names of the weights.

    Raises:
        UserError: neither timm nor open_clip has this network.
    """
    recipe = _network(exported, num_classes)
    recipe.setdefault("then", "")
    arguments = [f"{name}={value!r}" for name, value in recipe["kwargs"].items()]
    arguments += [f"norm_layer={recipe['norm_layer']}"] if "norm_layer" in recipe else []
    return {**recipe, "code": f"net = {recipe['create']}({', '.join(arguments)}){recipe['then']}"}


def _network(exported: ExportedModel, num_classes: int) -> dict[str, Any]:
    encoder, net = exported.encoder, exported.encoder.net
    if isinstance(encoder, ViTEncoder):
        for model_name in _timm_vit_names(net):
            kwargs: dict[str, Any] = {"model_name": model_name, "img_size": exported.resolution}
            kwargs["num_classes"] = num_classes
            if timm.is_model(model_name) and _same(partial(timm.create_model, **{**kwargs, "num_classes": 0}), encoder):
                return {"create": "timm.create_model", "kwargs": kwargs, "prefix": ""}
        arguments, norm_layer = _vit_arguments(net, num_classes), partial(nn.LayerNorm, eps=net.norm.eps)
        plain = {**arguments["kwargs"], "num_classes": 0, "norm_layer": norm_layer}
        if not _same(partial(timm.models.VisionTransformer, **plain), encoder):
            raise NO_LIBRARY
        return {"create": "timm.models.VisionTransformer", **arguments, "prefix": ""}
    if isinstance(encoder, ResNetEncoder):
        if encoder.timm_name is None:
            raise NO_LIBRARY
        kwargs = {"model_name": encoder.timm_name, "num_classes": 0}
        return {"create": "timm.create_model", "kwargs": kwargs, "prefix": ""}
    if name := timm_name(net):
        resized = exported.resolution != net.pretrained_cfg["input_size"][-1] and hasattr(net, "set_input_size")
        then = f"\nnet.set_input_size({exported.resolution})" if resized else ""
        kwargs = {"model_name": name, "num_classes": num_classes}
        return {"create": "timm.create_model", "kwargs": kwargs, "then": then, "prefix": ""}
    if exported.arch not in open_clip.list_models():
        raise NO_LIBRARY
    kwargs = {"model_name": exported.arch}
    if exported.resolution != clip_resolution(exported):
        kwargs["force_image_size"] = exported.resolution
    # CoCa's image encoders also return tokens, for captions.
    then = ".visual" + ("\nnet.output_tokens = False" if hasattr(net, "output_tokens") else "")
    return {"create": "open_clip.create_model", "kwargs": kwargs, "then": then, "prefix": "visual."}


def classifier_name(exported: ExportedModel) -> str | None:
    """Name of the linear layer inside the plain network that classifies its feature.

    Args:
        exported: the model.

    Returns:
        None if the network has no such layer, or if something is computed between the feature and the head.
    """
    encoder, net = exported.encoder, exported.encoder.net
    if encoder.projection is not None or feature_affine(exported) is not None:
        return None
    if isinstance(encoder, ViTEncoder):
        return "head"
    name = None if isinstance(encoder, ResNetEncoder) else timm_name(net)
    place = net.pretrained_cfg.get("classifier") if name else None
    if not isinstance(place, str):
        return None
    with torch.device("meta"):
        layer = timm.create_model(name, num_classes=2).get_submodule(place)
    takes_feature = type(layer) is nn.Linear and layer.in_features == encoder.feature_dim and layer.bias is not None
    return place if takes_feature else None


def clip_resolution(exported: ExportedModel) -> int:
    """Side length in pixels of the input images of the open_clip network `exported.arch`."""
    return int(open_clip.get_model_config(exported.arch)["vision_cfg"]["image_size"])


def timm_name(net: Any) -> str | None:
    """timm's name of a network that timm has created; None for any other network."""
    return getattr(net, "pretrained_cfg", {}).get("architecture")


def _timm_vit_names(net: Any) -> Iterator[str]:
    """Possible names of a ViT in timm: the name that created it, and the name of a CLIP ViT of this shape."""
    if name := timm_name(net):
        yield name
    patch, quick = net.patch_embed.patch_size[0], is_quick_gelu(net.blocks[0].mlp.act)
    if net.embed_dim in TIMM_SIZES:
        yield f"vit_{TIMM_SIZES[net.embed_dim]}_patch{patch}_clip_{'quickgelu_' if quick else ''}224"


def _same(make: Callable[[], Any], encoder: ViTEncoder) -> bool:
    """Whether `make` creates the same network as the encoder's; the values of the weights may differ."""
    with torch.device("meta"):
        candidate = make()

    def signature(net: Any, state: Mapping[str, Tensor]) -> tuple[Any, ...]:
        block = net.blocks[0]
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        act = block.mlp.act(torch.linspace(-3, 3, 64, device="cpu")).tolist()  # several classes compute the same values
        return shapes, getattr(net.norm, "eps", None), act, block.attn.num_heads, net.global_pool

    return signature(candidate, candidate.state_dict()) == signature(encoder.net, encoder.pretrained_state())


def _vit_arguments(net: Any, num_classes: int) -> dict[str, Any]:
    """Arguments of timm's class `VisionTransformer`, for an image encoder of CLIP that has no name in timm."""
    block = net.blocks[0]
    kwargs = {
        "img_size": list(net.patch_embed.img_size),
        "patch_size": list(net.patch_embed.patch_size),
        "embed_dim": net.embed_dim,
        "depth": len(net.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / net.embed_dim,
        "pre_norm": isinstance(net.norm_pre, nn.LayerNorm),
        "act_layer": "quick_gelu" if is_quick_gelu(block.mlp.act) else "gelu",
        "num_classes": num_classes,
    }
    return {"kwargs": kwargs, "norm_layer": f"functools.partial(torch.nn.LayerNorm, eps={net.norm.eps})"}
