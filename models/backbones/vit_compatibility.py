"""Which of timm's networks `ViTEncoder` can run.

The encoder has its own forward, so it would silently leave out a part of a network that it does not know.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones.plain_vit import PlainViT

layers = lazy_module("timm.layers")
vit = lazy_module("timm.models.vision_transformer")


def unsupported_part(net: Any) -> str | None:
    """The first part of a network that `ViTEncoder` does not compute.

    Args:
        net: any network.

    Returns:
        A description of the part, such as "dropout"; None where the encoder computes every part.
    """
    return None if type(net) is PlainViT else next(_unsupported_parts(net), None)


def _unsupported_parts(net: Any) -> Iterator[str]:
    """All such parts. The caller stops at the first one, so later lines may rely on earlier ones."""
    if type(net) is not vit.VisionTransformer:
        yield f"the class {type(net).__name__} in place of timm's VisionTransformer"
    if type(net.patch_embed) is not layers.PatchEmbed:
        yield f"a stem of its own ({type(net.patch_embed).__name__})"
    if not net.global_pool:
        yield "no pooling"
    for module in net.modules():
        if isinstance(module, layers.PatchDropout) or (isinstance(module, nn.Dropout) and module.p > 0):
            yield "dropout"
        if isinstance(module, layers.DropPath) and module.drop_prob:
            yield "stochastic depth"
    norms = [net.norm_pre, net.norm, net.fc_norm]
    for block in net.blocks:
        if type(block) is not vit.Block:
            yield f"blocks of another kind ({type(block).__name__})"
        if type(block.attn) is not layers.Attention or type(block.mlp) is not layers.Mlp:
            yield f"another kind of attention or MLP ({type(block.attn).__name__}, {type(block.mlp).__name__})"
        if block.attn.gate is not None or not isinstance(block.attn.norm, nn.Identity):
            yield "gated or normed attention"
        if not isinstance(block.mlp.norm, nn.Identity):
            yield "a norm inside the MLP"
        norms += [block.norm1, block.norm2, block.attn.q_norm, block.attn.k_norm]
    for norm in norms:
        if not isinstance(norm, (nn.LayerNorm, nn.Identity)):
            yield f"another kind of norm ({type(norm).__name__})"
