"""A ViT of the fixture of lift.md §13.6 and a plain formulation of its block to compare the host with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.tuners import Sizes, add_tuners
from models.vit import ViT

WIDTH, DEPTH, HEADS, PATCH, SIDE = 64, 2, 2, 8, 16


def filled(shape: Sequence[int], seed: int, amplitude: float = 0.1, offset: float = 0.0) -> Tensor:
    """offset + 2a·(((7919 j² + 104729 j + 1299709 s) mod 65536)/65536 − 0.5), j the row-major index."""
    j = torch.arange(int(torch.tensor(list(shape)).prod()), dtype=torch.int64)
    values = ((7919 * j * j + 104729 * j + 1299709 * seed) % 65536).double() / 65536 - 0.5
    return (offset + 2 * amplitude * values).float().view(*shape)


def small_net(**changes: object) -> VisionTransformer:
    options = dict(img_size=SIDE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, pre_norm=True)
    options |= dict(norm_layer=nn.LayerNorm, act_layer="quick_gelu", num_classes=0)
    return VisionTransformer(**{**options, **changes})


@torch.no_grad()
def fixture_net() -> VisionTransformer:
    """The backbone of lift.md §13.6, in timm's layout."""
    net = small_net(norm_layer=lambda width, **_: nn.LayerNorm(width, eps=1e-5))
    net.patch_embed.proj.weight.copy_(filled((WIDTH, 3, PATCH, PATCH), 1))
    net.cls_token.copy_(filled((1, 1, WIDTH), 2, 0.5))
    net.pos_embed.copy_(filled((1, 5, WIDTH), 3, 0.5))
    for norm, seed in ((net.norm_pre, 4), (net.norm, 6)):
        _fill_norm(norm, seed)
    for index, block in enumerate(net.blocks):
        q = 10 * (index + 1)
        layers = ((block.attn.qkv, q, q + 1), (block.attn.proj, q + 2, q + 3), (block.mlp.fc1, q + 8, q + 20))
        for layer, weight, bias in (*layers, (block.mlp.fc2, q + 9, q + 21)):
            layer.weight.copy_(filled(layer.weight.shape, weight))
            layer.bias.copy_(filled(layer.bias.shape, bias))
        _fill_norm(block.norm1, q + 4)
        _fill_norm(block.norm2, q + 6)
    return net


def _fill_norm(norm: nn.LayerNorm, seed: int) -> None:
    norm.weight.copy_(filled(norm.weight.shape, seed, offset=1.0))
    norm.bias.copy_(filled(norm.bias.shape, seed + 1))


@torch.no_grad()
def fill_tuners(host: ViT) -> None:
    """Tuner values of lift.md §13.6: seed of the tensor plus the block's index."""
    seeds = {"ln.weight": 50, "ln.bias": 52, "down_proj.weight": 54, "down_proj.bias": 56}
    seeds |= {"up_proj.weight": 58, "up_proj.bias": 60, "q.lora_A": 62, "q.lora_B": 64, "v.lora_A": 66}
    seeds |= {"v.lora_B": 68, "prompt": 94}
    for name, parameter in host.tuners.named_parameters():
        _, index, rest = name.split(".", 2)
        if rest.endswith("scale"):
            parameter.fill_(0.7 + 0.1 * int(index))
            continue
        seed = next(value for key, value in seeds.items() if rest.endswith(key)) + int(index)
        amplitude = 0.5 if rest.endswith("prompt") else 0.1
        parameter.copy_(filled(parameter.shape, seed, amplitude, 1.0 if rest.endswith("ln.weight") else 0.0))


def tuned(names: Sequence[str], partial: int | Sequence[int] | None = None, fast: bool = True) -> ViT:
    """The fixture's network with tuners of bottleneck 4 and 3 prompts, filled as the fixture says."""
    host = ViT(fixture_net(), fast=fast)
    add_tuners(host, names, Sizes(4, 3), partial)
    fill_tuners(host)
    host.set_precision()
    return host


def plain_features(host: ViT, images: Tensor) -> Tensor:
    """lift.md §4.1 written out: explicit softmax attention, x·sigmoid(1.702x), every token in every block."""
    net = host.net
    x = net.patch_embed(images)
    x = net.norm_pre(torch.cat([net.cls_token.expand(len(x), -1, -1), x], 1) + net.pos_embed)
    length = x.shape[1]
    for index, block in enumerate(net.blocks):
        own = {name: modules[str(index)] for name, modules in host.tuners.items() if str(index) in modules}
        for name in ("vpt_shallow", "vpt_deep"):
            if name in own:
                x = torch.cat([x[:, :length], own[name]["tokens"].prompt.expand(len(x), -1, -1)], 1)
        a = block.norm1(x)
        q, k, v = block.attn.qkv(a).chunk(3, -1)
        if "lora" in own:
            q = q + a @ own["lora"]["q"].lora_A @ own["lora"]["q"].lora_B / own["lora"]["q"].rank
            v = v + a @ own["lora"]["v"].lora_A @ own["lora"]["v"].lora_B / own["lora"]["v"].rank
        heads = block.attn.num_heads
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        u = x + block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        hidden = block.mlp.fc1(block.norm2(u))
        hidden = hidden * torch.sigmoid(1.702 * hidden) if "Quick" in type(block.mlp.act).__name__ else F.gelu(hidden)
        m = block.mlp.fc2(hidden)
        if "adapter" in own:
            m = m + _bottleneck(own["adapter"]["mlp"], m)
        if "adaptformer" in own:
            m = m + own["adaptformer"]["mlp"].scale * _bottleneck(own["adaptformer"]["mlp"], u)
        x = u + m
    return net.norm(x[:, 0])


def _bottleneck(module: nn.Module, x: Tensor) -> Tensor:
    return module.up_proj(F.relu(module.down_proj(module.ln(x))))
