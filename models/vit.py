"""The one ViT host: timm's layout, one block function with named sites where tuners act.

The network itself is timm's `VisionTransformer`, used as a holder of weights (`qkv`, `proj`, `fc1`, `fc2`). Its
forward is written here, because the tuners of PEFT act inside the block and because three facts make a step with a
frozen backbone cheaper, all of them exact up to rounding:

* only the class token is read, so the last block computes query, projection and MLP for one token only;
* QuickGELU(x) = silu(1.702 x) / 1.702, and both constants fold into frozen fc1 and fc2;
* q, k, v stay 4-D, which is what the fused attention kernels ask for.

Sites (x is a layer's input, y its output): `tokens` (block input), `norm1`, `q`, `k`, `v`, `proj`, `norm2`, `fc1`,
`fc2`, `mlp` (y the MLP branch, x the residual stream before norm2). A module at a site is called `y = module(y, x)`;
several act in the order of the tuner table.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from models.host import Host

SITES = ("tokens", "norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2", "mlp")
QUICK = 1.702  # QuickGELU(x) = x · sigmoid(1.702 x)

Sites = dict[str, list[nn.Module]]


class ViT(Host):
    """timm ViT + tuners → class token after the last norm, and after the projection if one is given.

    Args:
        net: the network without classifier: class token, absolute positions, pre-norm blocks, no layer scale.
        projection: [d, D] weight applied to the feature (CLIP's visual projection), or None.
        fast: False computes the plain formulation, for comparison.

    Raises:
        ValueError: a network with parts that this forward would leave out.
    """

    def __init__(self, net: VisionTransformer, projection: Tensor | None = None, fast: bool = True) -> None:
        super().__init__(net)  # tuners: tuner → block index → site → module
        _check(net)
        self.projection = None if projection is None else nn.Parameter(projection, requires_grad=False)
        self.sites: list[Sites] = [{site: [] for site in SITES} for _ in net.blocks]
        self.fast = fast
        self.residual_dtype: torch.dtype | None = None
        self._masters: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Width of the transformer, D."""
        return int(self.net.embed_dim)

    @property
    def feature_dim(self) -> int:  # type: ignore[override]
        return self.width if self.projection is None else len(self.projection)

    @property
    def parts(self) -> list[nn.Module]:  # type: ignore[override]
        return list(self.net.blocks)

    @property
    def patch_size(self) -> int:
        return int(self.net.patch_embed.patch_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        return self.net.patch_embed.grid_size

    def insert(self, tuner: str, index: int, modules: dict[str, nn.Module]) -> None:
        """Put a tuner's modules at sites of block `index`; they are stored as `tuners.<tuner>.<index>.<site>`."""
        if tuner not in self.tuners:
            self.tuners[tuner] = nn.ModuleDict()
        self.tuners[tuner].add_module(str(index), nn.ModuleDict(modules))
        for site, module in modules.items():
            self.sites[index][site].append(module)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, feature_dim] in the compute dtype."""
        net: Any = self.net
        x = net.patch_embed(images.to(net.patch_embed.proj.weight.dtype))  # [B, HW, D]
        x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], dim=1) + net.pos_embed  # [B, N, D]
        x = _norm(x, net.norm_pre) if isinstance(net.norm_pre, nn.LayerNorm) else x
        length, compute = x.shape[1], x.dtype
        x = x.to(self.residual_dtype or compute)
        for index, (block, sites) in enumerate(zip(net.blocks, self.sites, strict=True)):
            if sites["tokens"]:
                x = _at(sites["tokens"], x[:, :length], x)
            x = self._block(x, block, sites, compute, only_class=self.fast and index == self.depth - 1)
        features = _norm(x[:, 0], net.norm).to(compute)
        return features if self.projection is None else F.linear(features, self.projection.to(compute))

    def _block(self, x: Tensor, block: Any, sites: Sites, compute: torch.dtype, only_class: bool) -> Tensor:
        """One pre-norm block, [B, N, D] → [B, N, D], or [B, 1, D] for the class token alone."""
        normed = _at(sites["norm1"], _norm(x, block.norm1).to(compute), x)
        queries = normed[:, :1] if only_class else normed
        x = (x[:, :1] if only_class else x) + self._attend(normed, queries, block, sites)
        normed = _at(sites["norm2"], _norm(x, block.norm2).to(compute), x)
        return x + _at(sites["mlp"], self._mlp(normed, block, sites), x)

    def _attend(self, x: Tensor, queries: Tensor, block: Any, sites: Sites) -> Tensor:
        q, k, v = _project(x, queries, block.attn.qkv)
        q, k, v = _at(sites["q"], q, queries), _at(sites["k"], k, x), _at(sites["v"], v, x)
        heads = block.attn.num_heads
        q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (q, k, v))  # [B, H, N, D/H]
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, D]
        return _at(sites["proj"], _linear(out, block.attn.proj), out)

    def _mlp(self, x: Tensor, block: Any, sites: Sites) -> Tensor:
        mlp = block.mlp
        if "fc1_folded" in mlp._buffers:
            hidden = F.silu(F.linear(x, mlp.fc1_folded, mlp.fc1_bias_folded))
            return F.linear(hidden, mlp.fc2_folded, mlp.fc2.bias)
        hidden = mlp.act(_at(sites["fc1"], _linear(x, mlp.fc1), x))
        return _at(sites["fc2"], _linear(hidden, mlp.fc2), hidden)

    @torch.no_grad()
    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Derive the runtime view: frozen weights in `compute`, QuickGELU folded where that is exact.

        What trains keeps its dtype and is cast where it is used. Values that a narrower dtype would round are kept
        aside, so that a later call with fp32 works on the weights as they were loaded. Call again after the frozen
        weights, or what is frozen, have changed.
        """
        self.residual_dtype = residual
        for name, weight in self._frozen():
            master = self._masters.pop(name, weight.data)
            if compute.itemsize < master.dtype.itemsize:
                self._masters[name] = master.cpu()
            weight.data = master.to(weight.device, compute)
        for index, (block, sites) in enumerate(zip(self.net.blocks, self.sites, strict=True)):
            self._fold(block, f"net.blocks.{index}.mlp.", foldable=not (sites["fc1"] or sites["fc2"]))

    def _fold(self, block: Any, prefix: str, foldable: bool) -> None:
        """silu(1.702·fc1) and fc2/1.702 as non-persistent buffers: they follow `.to()`, and no file holds them."""
        mlp = block.mlp
        for name in ("fc1_folded", "fc1_bias_folded", "fc2_folded"):
            mlp._buffers.pop(name, None)
        frozen = not any(parameter.requires_grad for parameter in mlp.parameters())
        if not (self.fast and foldable and frozen and isinstance(mlp.act, QuickGELU)):
            return
        for name, weight, factor in (
            ("fc1_folded", "fc1.weight", QUICK),
            ("fc1_bias_folded", "fc1.bias", QUICK),
            ("fc2_folded", "fc2.weight", 1 / QUICK),
        ):
            runtime = mlp.get_parameter(weight)
            master = self._masters.get(prefix + weight, runtime.data)
            mlp.register_buffer(name, (master * factor).to(runtime.device, runtime.dtype), persistent=False)

    def _frozen(self) -> Iterable[tuple[str, nn.Parameter]]:
        return [(name, weight) for name, weight in self.named_parameters() if not weight.requires_grad]


def _at(modules: list[nn.Module], y: Tensor, x: Tensor) -> Tensor:
    for module in modules:
        y = module(y, x)
    return y


def _norm(x: Tensor, norm: Any) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def _linear(x: Tensor, layer: Any) -> Tensor:
    """A layer with its parameters in the input's dtype: trainable weights stay fp32 under a bf16 stream."""
    if type(layer) is not nn.Linear:
        return layer(x)  # a wrapped layer knows better
    return F.linear(x, layer.weight.to(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))


def _project(x: Tensor, queries: Tensor, qkv: Any) -> tuple[Tensor, ...]:
    """Packed projection → q of `queries`, k and v of `x`, each [B, ·, D]; one GEMM when both are the same tokens."""
    if queries is x:
        return _linear(x, qkv).chunk(3, dim=-1)
    if type(qkv) is not nn.Linear:
        q, k, v = qkv(x).chunk(3, dim=-1)
        return q[:, : queries.shape[1]], k, v
    width = qkv.in_features
    weight, bias = qkv.weight.to(x.dtype), qkv.bias.to(x.dtype)
    k, v = F.linear(x, weight[width:], bias[width:]).chunk(2, dim=-1)
    return F.linear(queries, weight[:width], bias[:width]), k, v


def _check(net: VisionTransformer) -> None:
    """Refuse a timm ViT that has parts which `ViT.forward` does not compute."""
    block: Any = net.blocks[0]
    plain = {
        "one class token": net.num_prefix_tokens == 1 and net.cls_token is not None,
        "absolute positions": net.pos_embed is not None and not net.no_embed_class,
        "no layer scale": isinstance(block.ls1, nn.Identity),
        "no query norm": isinstance(block.attn.q_norm, nn.Identity),
        "biased qkv": block.attn.qkv.bias is not None,
        "class token pooling": net.global_pool == "token",
        "no dropout": not any(isinstance(each, nn.Dropout) and each.p > 0 for each in net.modules()),
        "plain blocks": type(block) is Block,
    }
    missing = [name for name, holds in plain.items() if not holds]
    if missing:
        raise ValueError(f"this ViT is of another kind; needed: {', '.join(missing)}")
