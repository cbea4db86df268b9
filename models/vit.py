"""The one ViT host: timm's layout, one block function with named sites where tuners act.

The network itself is timm's `VisionTransformer`, used as a holder of weights (`qkv`, `proj`, `fc1`, `fc2`). Its
forward is written here, because the tuners of PEFT act inside the block and because three facts make a step with a
frozen backbone cheaper, all of them exact up to rounding:

* where only the class token is read, the last block computes query, projection and MLP for one token only;
* QuickGELU(x) = silu(1.702 x) / 1.702, and both constants fold into frozen fc1 and fc2;
* q, k, v stay 4-D, which is what the fused attention kernels ask for.

Sites (x is a layer's input, y its output): `tokens` (block input), `norm1`, `q`, `k`, `v`, `proj`, `norm2`, `fc1`,
`fc2`, `mlp` (y the MLP branch, x the residual stream before norm2), and `<layer>.weights` of `qkv`, `proj`, `fc1`,
`fc2` (y the pair of weight and bias). A module at a site is called `y = module(y, x)`; several act in the order of the
tuner table.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerScale, QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from configs.errors import UserError
from models.host import Host
from models.vit_check import refusal

LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""The linear layers of a block, in the order of LIFT → where they are in it."""
OUTPUTS = ("tokens", "norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2", "mlp")
SITES = (*OUTPUTS, *(f"{layer}.weights" for layer in LAYERS))
QUICK = 1.702  # QuickGELU(x) = x · sigmoid(1.702 x)

Sites = dict[str, list[nn.Module]]


class ViT(Host):
    """timm ViT + tuners → pooled feature after the last norm, and after the projection if one is given.

    Class and register tokens, layer scale, normed queries and keys, and every pooling of timm are computed; tokens
    that a prompt tuner has added are read by the class token and never pooled.

    Args:
        net: the network without classifier.
        projection: [d, D] weight applied to the feature (CLIP's visual projection), or None.
        fast: False computes the plain formulation, for comparison.

    Raises:
        ValueError: a network with parts that this forward would leave out, see `refusal`.
    """

    def __init__(self, net: VisionTransformer, projection: Tensor | None = None, fast: bool = True) -> None:
        super().__init__(net)  # tuners: tuner → block index → site → module
        reason = refusal(net)
        if reason is not None:
            raise ValueError(f"this network cannot be a ViT host: it has {reason}")
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

    @property
    def hidden_width(self) -> int:
        """Width inside the MLP."""
        return int(self.net.blocks[0].mlp.fc1.out_features)

    @property
    def only_class(self) -> bool:
        """The class token alone makes the feature."""
        return bool(self.net.global_pool == "token")

    def layers(self, index: int) -> dict[str, Any]:
        """The linear layers of block `index`, as in LAYERS."""
        return {name: self.net.blocks[index].get_submodule(path) for name, path in LAYERS.items()}

    def insert(self, tuner: str, index: int, modules: dict[str, nn.Module], on_weights: bool = False) -> None:
        """Put a tuner's modules at sites of block `index`; they are stored as `tuners.<tuner>.<index>.<site>`.

        With `on_weights` the names are those of layers, and the modules act on their weights.
        """
        if tuner not in self.tuners:
            self.tuners[tuner] = nn.ModuleDict()
        self.tuners[tuner].add_module(str(index), nn.ModuleDict(modules))
        for name, module in modules.items():
            self.sites[index][f"{name}.weights" if on_weights else name].append(module)

    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, feature_dim] in the compute dtype."""
        net: Any = self.net
        x = net.patch_embed(images.to(net.patch_embed.proj.weight.dtype))  # [B, HW, D]
        x = _norm(net._pos_embed(x), net.norm_pre)  # [B, N, D]
        length, compute = x.shape[1], x.dtype
        x = x.to(self.residual_dtype or compute)
        for index, (block, sites) in enumerate(zip(net.blocks, self.sites, strict=True)):
            if sites["tokens"]:
                x = at_site(sites["tokens"], x[:, :length], x)
            only_class = self.fast and self.only_class and index == self.depth - 1
            x = self._block(x, block, sites, compute, only_class)
        x = _norm(x[:, : 1 if self.only_class else length], net.norm).to(compute)
        features = _norm(net.pool(x), net.fc_norm)
        return features if self.projection is None else F.linear(features, self.projection.to(compute))

    def _block(self, x: Tensor, block: Any, sites: Sites, compute: torch.dtype, only_class: bool) -> Tensor:
        """One pre-norm block, [B, N, D] → [B, N, D], or [B, 1, D] for the class token alone."""
        normed = at_site(sites["norm1"], _norm(x, block.norm1).to(compute), x)
        queries = normed[:, :1] if only_class else normed
        attended = self._attend(normed, queries, block.attn, sites)
        x = (x[:, :1] if only_class else x) + _scale(attended, block.ls1)
        normed = at_site(sites["norm2"], _norm(x, block.norm2).to(compute), x)
        return x + at_site(sites["mlp"], _scale(self._mlp(normed, block.mlp, sites), block.ls2), x)

    def _attend(self, x: Tensor, queries: Tensor, attn: Any, sites: Sites) -> Tensor:
        q, k, v = _project(x, queries, attn.qkv, sites["qkv.weights"])
        q, k, v = at_site(sites["q"], q, queries), at_site(sites["k"], k, x), at_site(sites["v"], v, x)
        q, k, v = (each.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for each in (q, k, v))  # [B, H, N, D/H]
        q, k = _norm(q, attn.q_norm), _norm(k, attn.k_norm)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, D]
        return at_site(sites["proj"], _linear(out, attn.proj, sites["proj.weights"]), out)

    def _mlp(self, x: Tensor, mlp: Any, sites: Sites) -> Tensor:
        if "fc1_folded" in mlp._buffers:
            hidden = F.silu(F.linear(x, mlp.fc1_folded, mlp.fc1_bias_folded))
            return F.linear(hidden, mlp.fc2_folded, mlp.fc2.bias)
        hidden = mlp.act(at_site(sites["fc1"], _linear(x, mlp.fc1, sites["fc1.weights"]), x))
        return at_site(sites["fc2"], _linear(hidden, mlp.fc2, sites["fc2.weights"]), hidden)

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
            for name, layer in self.layers(index).items():
                if sites[f"{name}.weights"] and type(layer) is not nn.Linear:
                    raise UserError(f"mask and peft both act on {name}; leave it out of peft's target_modules")
            acts = any(sites[name] for name in ("fc1", "fc2", "fc1.weights", "fc2.weights"))
            self._fold(block.mlp, f"net.blocks.{index}.mlp.", foldable=not acts)

    def _fold(self, mlp: Any, prefix: str, foldable: bool) -> None:
        """silu(1.702·fc1) and fc2/1.702 as non-persistent buffers: they follow `.to()`, and no file holds them."""
        for name in ("fc1_folded", "fc1_bias_folded", "fc2_folded"):
            mlp._buffers.pop(name, None)
        plain = type(mlp.fc1) is type(mlp.fc2) is nn.Linear and mlp.fc1.bias is not None
        frozen = not any(parameter.requires_grad for parameter in mlp.parameters())
        if not (self.fast and foldable and plain and frozen and isinstance(mlp.act, QuickGELU)):
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


def at_site(modules: list[nn.Module], y: Any, x: Tensor) -> Any:
    """What the modules at a site make of its output y; x is the site's input."""
    for module in modules:
        y = module(y, x)
    return y


def _norm(x: Tensor, norm: Any) -> Tensor:
    if not isinstance(norm, nn.LayerNorm):
        return norm(x)  # none at this place, or a wrapped one
    return F.layer_norm(x, norm.normalized_shape, _cast(norm.weight, x), _cast(norm.bias, x), norm.eps)


def _scale(x: Tensor, scale: Any) -> Tensor:
    """Layer scale, where the network has it."""
    return x * scale.gamma.to(x.dtype) if isinstance(scale, LayerScale) else x


def _cast(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter in the dtype of the stream: what trains stays fp32 beside bf16."""
    return None if parameter is None else parameter.to(x.dtype)


def _weights(layer: nn.Linear, modules: list[nn.Module], x: Tensor) -> tuple[Any, Any]:
    weight, bias = at_site(modules, (layer.weight, layer.bias), x)
    return _cast(weight, x), _cast(bias, x)


def _linear(x: Tensor, layer: Any, modules: list[nn.Module]) -> Tensor:
    if type(layer) is not nn.Linear:
        return layer(x)  # a wrapped layer knows better
    return F.linear(x, *_weights(layer, modules, x))


def _project(x: Tensor, queries: Tensor, qkv: Any, modules: list[nn.Module]) -> tuple[Tensor, ...]:
    """Packed projection → q of `queries`, k and v of `x`, each [B, ·, D]; one GEMM when both are the same tokens."""
    if queries is x:
        return _linear(x, qkv, modules).chunk(3, dim=-1)
    if type(qkv) is not nn.Linear:
        q, k, v = qkv(x).chunk(3, dim=-1)
        return q[:, : queries.shape[1]], k, v
    weight, bias = _weights(qkv, modules, x)
    width = len(weight) // 3
    q_bias, kv_bias = (None, None) if bias is None else (bias[:width], bias[width:])
    k, v = F.linear(x, weight[width:], kv_bias).chunk(2, dim=-1)
    return F.linear(queries, weight[:width], q_bias), k, v
