"""A ViT of the fixture of LIFT specification §13.6 and a plain formulation of its block to compare the host with."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tailtune.configs.key import Key
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.heads import classifiers
from tailtune.models.heads.head_init import HeadContext
from tailtune.models.tuners.table import TUNERS, add_tuners
from tailtune.models.tuners.tuner_options import TunerOptions
from tailtune.trainers.losses import LOSSES, Loss

WIDTH, DEPTH, HEADS, PATCH, SIDE = 64, 2, 2, 8, 16


@dataclass(frozen=True)
class Sizes:
    """Numbers that tuners are built from, in place of the options of a config."""

    bottleneck: int
    prompts: int
    mask_ratio: float = 0.001
    mask_seed: int = 0
    adaptformer_scale: float | str = "learnable"

    def of(self, name: str) -> TunerOptions:
        options = TUNERS[name].options
        values = {"dim": self.bottleneck, "length": self.prompts, "scale": self.adaptformer_scale}
        values |= {"ratio": self.mask_ratio, "seed": self.mask_seed}
        return replace(options, **{field: value for field, value in values.items() if hasattr(options, field)})


def put_tuners(host: Any, names: Sequence[str], sizes: Sizes, partial: Any = None, seed: int = 0) -> None:
    """`add_tuners`, by names and sizes."""
    add_tuners(host, {name: sizes.of(name) for name in names}, partial, seed)


LIFT_TUNERS = (
    *("full_tuning", "bias_tuning", "ln_tuning", "bn_tuning", "mask", "vpt_shallow", "vpt_deep", "lora", "lora_mlp"),
    *("ssf_attn", "ssf_mlp", "ssf_ln", "adapter", "adaptformer"),
)
"""The tuners of LIFT, of which the tests have a plain formulation and published counts; others may be added."""


WITH_WEIGHTS = [name for name in classifiers.HEADS if name not in ("TextClassifier", "TipAdapter")]
"""Heads with weights that train; the others read text features."""


def other_value(key: Key) -> object:
    """Another value of an option that is a flag or a number."""
    default = key.default
    assert isinstance(default, bool | int | float), "choose a value by hand"
    if isinstance(default, bool):
        return not default
    larger = default + 1 if isinstance(default, int) else default * 2 or 0.5
    return default / 2 if key.beyond(larger) else larger


def head_with(name: str, dim: int, classes: int, scale: float = 25.0) -> nn.Module:
    """A head, with this scale if it has one."""
    kind = classifiers.HEADS[name]
    options = asdict(kind.Options())
    return kind(dim, classes, **{**options, **({"scale": scale} if "scale" in options else {})})


def loss_with(name: str, **values: float) -> Loss:
    """A loss with those of the options that it has."""
    loss = LOSSES[name]
    known = {field: value for field, value in values.items() if hasattr(loss.options, field)}
    return replace(loss, options=replace(loss.options, **known)) if known else loss


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
    """The backbone of LIFT specification §13.6, in timm's layout."""
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


SEEDS = {"ln.weight": 50, "ln.bias": 52, "down_proj.weight": 54, "down_proj.bias": 56, "up_proj.weight": 58}
SEEDS |= {"up_proj.bias": 60, "q.lora_A": 62, "q.lora_B": 64, "v.lora_A": 66, "v.lora_B": 68, "prompt": 94}
SEEDS |= {f"{site}.scale": seed for site, seed in zip("qkv", (70, 70, 70), strict=True)}
SEEDS |= {"proj.scale": 74, "fc1.scale": 78, "fc2.scale": 82, "norm1.scale": 86, "norm2.scale": 90}
SEEDS |= {name.replace("scale", "shift"): seed + 2 for name, seed in SEEDS.items() if name.endswith("scale")}
SEEDS |= {"fc1.lora_A": 100, "fc1.lora_B": 102, "fc2.lora_A": 104, "fc2.lora_B": 106, "values": 108}  # not in lift.md


@torch.no_grad()
def fill_tuners(host: ViTEncoder) -> None:
    """Tuner values of LIFT specification §13.6: seed of the tensor plus the block's index."""
    for name, parameter in host.tuners.named_parameters():
        tuner, index, rest = name.split(".", 2)
        if tuner == "adaptformer" and rest.endswith("scale"):
            parameter.fill_(0.7 + 0.1 * int(index))
            continue
        seed = next(value for key, value in SEEDS.items() if rest.endswith(key)) + int(index)
        amplitude = 0.5 if rest.endswith("prompt") else 0.1
        offset = 1.0 if rest.endswith(("ln.weight", "scale")) else 0.0
        if tuner == "ssf_attn" and rest[0] in "qkv":  # one tensor of three parts
            values = filled((3 * len(parameter),), seed, offset=offset).chunk(3)["qkv".index(rest[0])]
        else:
            values = filled(parameter.shape, seed, amplitude, offset)
        parameter.copy_(values + (parameter if rest.endswith("values") else 0))


def tuned(
    names: Sequence[str],
    partial: int | Sequence[int] | None = None,
    fast: bool = True,
    net: VisionTransformer | None = None,
) -> ViTEncoder:
    """The fixture's network, or another, with tuners of bottleneck 4 and 3 prompts, filled as the fixture says."""
    host = ViTEncoder(net or fixture_net(), fast=fast)
    put_tuners(host, names, Sizes(4, 3, mask_ratio=0.1), partial)
    fill_tuners(host)
    host.set_precision()
    return host


def plain_features(host: ViTEncoder, images: Tensor) -> Tensor:
    """LIFT specification §4.1, plain: explicit softmax attention, x·sigmoid(1.702x), every token in every block."""
    net = host.net
    x = net.norm_pre(net._pos_embed(net.patch_embed(images)))
    length = x.shape[1]
    for index, block in enumerate(net.blocks):
        own = {name: modules[str(index)] for name, modules in host.tuners.items() if str(index) in modules}
        for name in {"vpt_shallow", "vpt_deep"} & own.keys():
            x = torch.cat([x[:, :length], own[name]["tokens"].prompt.expand(len(x), -1, -1)], 1)
        x = _plain_block(x, block, own)
    return net.fc_norm(net.pool(net.norm(x[:, :length])))


def _plain_block(h: Tensor, block: nn.Module, own: dict[str, nn.ModuleDict]) -> Tensor:
    attn, mlp = block.attn, block.mlp
    a = _ssf(own, "ssf_ln", "norm1", block.norm1(h))
    q, k, v = F.linear(a, *_masked(own, "qkv", attn.qkv)).chunk(3, -1)
    q, v = q + _lora(own, "lora", "q", a), v + _lora(own, "lora", "v", a)
    q, k, v = (_ssf(own, "ssf_attn", site, each) for site, each in (("q", q), ("k", k), ("v", v)))
    q, k, v = (each.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for each in (q, k, v))
    weights = (attn.q_norm(q) @ attn.k_norm(k).transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    o = F.linear((weights @ v).transpose(1, 2).flatten(2), *_masked(own, "proj", attn.proj))
    u = h + block.ls1(_ssf(own, "ssf_attn", "proj", o))
    b = _ssf(own, "ssf_ln", "norm2", block.norm2(u))
    m = F.linear(b, *_masked(own, "fc1", mlp.fc1)) + _lora(own, "lora_mlp", "fc1", b)
    m = _ssf(own, "ssf_mlp", "fc1", m)
    g = m * torch.sigmoid(1.702 * m) if "Quick" in type(mlp.act).__name__ else mlp.act(m)
    m = F.linear(g, *_masked(own, "fc2", mlp.fc2)) + _lora(own, "lora_mlp", "fc2", g)
    m = block.ls2(_ssf(own, "ssf_mlp", "fc2", m))
    m = m + _bottleneck(own["adapter"]["mlp"], m) if "adapter" in own else m
    return u + m + (_bottleneck(own["adaptformer"]["mlp"], u) if "adaptformer" in own else 0)


def _bottleneck(module: nn.Module, x: Tensor) -> Tensor:
    return module.up_proj(F.relu(module.down_proj(module.ln(x)))) * getattr(module, "scale", 1)


def _lora(own: dict[str, nn.ModuleDict], name: str, site: str, x: Tensor) -> Tensor | int:
    return x @ own[name][site].lora_A @ own[name][site].lora_B / own[name][site].rank if name in own else 0


def _ssf(own: dict[str, nn.ModuleDict], name: str, site: str, x: Tensor) -> Tensor:
    return x * own[name][site].scale + own[name][site].shift if name in own else x


def _masked(own: dict[str, nn.ModuleDict], name: str, layer: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias with the trained values in their places of the out × (in + 1) matrix."""
    if "mask" not in own:
        return layer.weight, layer.bias
    parts = [layer.weight] if layer.bias is None else [layer.weight, layer.bias[:, None]]
    flat = torch.cat(parts, 1).flatten()
    flat[own["mask"][name].positions.long()] = own["mask"][name].values
    matrix = flat.view(len(layer.weight), -1)
    return matrix[:, : layer.in_features], None if layer.bias is None else matrix[:, -1]


def head_context(features: Tensor, labels: Tensor, classes: int, size: int = 4, seed: int = 0) -> HeadContext:
    """A head's view of training data whose features are known, in batches of `size`, in one process."""

    def batches(positions: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = torch.arange(len(labels)) if positions is None else positions
        for index in chosen.split(size):
            yield features[index], index

    device = torch.device("cpu")
    return HeadContext(labels, classes, features.shape[-1], seed, device, batches, lambda each: each)
