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

Experts have the last blocks for themselves in that each has tuners of its own there, around the same frozen weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.vit_layers import at_site, layer_scale, linear, norm, project
from tailtune.models.backbones.vit_support import refusal

LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""The linear layers of a block, in the order of LIFT → where they are in it."""
OUTPUTS = ("tokens", "norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2", "mlp")
SITES = (*OUTPUTS, *(f"{layer}.weights" for layer in LAYERS))
QUICK = 1.702  # QuickGELU(x) = x · sigmoid(1.702 x)

Sites = dict[str, list[nn.Module]]


class ViT(Encoder):
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
        super().__init__(net)  # tuners: tuner → block index (→ expert) → site → module
        reason = refusal(net)
        if reason is not None:
            raise ValueError(f"this network cannot be a ViT host: it has {reason}")
        self.projection = None if projection is None else nn.Parameter(projection, requires_grad=False)
        self.sites = [_empty(len(net.blocks))]
        """Expert → block → site; experts have the same entries for the blocks that they share."""
        self.own = 0
        """The last blocks, in which each expert has tuners of its own."""
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
    def divided(self) -> list[nn.Module]:
        return self.parts[self.depth - self.own :]

    @property
    def patch_size(self) -> int:
        return int(self.net.patch_embed.patch_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        return self.net.patch_embed.grid_size

    @property
    def length(self) -> int:
        """Tokens of an image, prompts not counted."""
        return int(self.net.patch_embed.num_patches + self.net.num_prefix_tokens)

    @property
    def compute(self) -> torch.dtype:
        """Of what is frozen, and so of the feature."""
        return self.net.patch_embed.proj.weight.dtype

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

    def divide(self, experts: int, own: int) -> None:
        """Give each expert places for tuners of its own in the last `own` blocks; before any tuner is there."""
        shared = self.sites[0][: self.depth - own]
        self.sites = [[*shared, *_empty(own)] for _ in range(experts)]
        self.experts, self.own = experts, own

    def insert(
        self, tuner: str, index: int, modules: dict[str, nn.Module], on_weights: bool = False, expert: int | None = None
    ) -> None:
        """Put a tuner's modules at sites of block `index`; they are stored as `tuners.<tuner>.<index>.<site>`, those
        of one expert as `tuners.<tuner>.<index>.<expert>.<site>`.

        With `on_weights` the names are those of layers, and the modules act on their weights.
        """
        path = [tuner, str(index)] if expert is None else [tuner, str(index), str(expert)]
        place = self.tuners
        for name in path[:-1]:
            if name not in place:
                place[name] = nn.ModuleDict()
            place = cast(nn.ModuleDict, place[name])
        place.add_module(path[-1], nn.ModuleDict(modules))
        for name, module in modules.items():
            self.sites[expert or 0][index][f"{name}.weights" if on_weights else name].append(module)

    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → features [B, feature_dim] in the compute dtype; the stream [B, N, D], with
        the prompts that are in it, before the blocks that experts have for themselves."""
        net: Any = self.net
        x = norm(net._pos_embed(net.patch_embed(images.to(self.compute))), net.norm_pre)  # [B, N, D]
        x = self._run(x.to(self.residual_dtype or x.dtype), range(self.depth - self.own), self.sites[0])
        return x if self.own else self._pooled(x)

    def branch(self, shared: Tensor, expert: int) -> Tensor:
        if not self.own:
            return shared
        return self._pooled(self._run(shared, range(self.depth - self.own, self.depth), self.sites[expert]))

    def _run(self, x: Tensor, indices: range, sites: Sequence[Sites]) -> Tensor:
        """Some blocks one after the other, [B, N, D] → [B, N, D], or [B, 1, D] where the class token alone is read."""
        for index in indices:
            own = sites[index]
            if own["tokens"]:
                x = at_site(own["tokens"], x[:, : self.length], x)
            only_class = self.fast and self.only_class and index == self.depth - 1
            x = self._block(x, self.net.blocks[index], own, only_class)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        net: Any = self.net
        x = norm(x[:, : 1 if self.only_class else self.length], net.norm).to(self.compute)
        features = norm(net.pool(x), net.fc_norm)
        return features if self.projection is None else F.linear(features, self.projection.to(self.compute))

    def _block(self, x: Tensor, block: Any, sites: Sites, only_class: bool) -> Tensor:
        """One pre-norm block, [B, N, D] → [B, N, D], or [B, 1, D] for the class token alone."""
        normed = at_site(sites["norm1"], norm(x, block.norm1).to(self.compute), x)
        queries = normed[:, :1] if only_class else normed
        attended = self._attend(normed, queries, block.attn, sites)
        x = (x[:, :1] if only_class else x) + layer_scale(attended, block.ls1)
        normed = at_site(sites["norm2"], norm(x, block.norm2).to(self.compute), x)
        return x + at_site(sites["mlp"], layer_scale(self._mlp(normed, block.mlp, sites), block.ls2), x)

    def _attend(self, x: Tensor, queries: Tensor, attn: Any, sites: Sites) -> Tensor:
        q, k, v = project(x, queries, attn.qkv, sites["qkv.weights"])
        q, k, v = at_site(sites["q"], q, queries), at_site(sites["k"], k, x), at_site(sites["v"], v, x)
        q, k, v = (each.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for each in (q, k, v))  # [B, H, N, D/H]
        q, k = norm(q, attn.q_norm), norm(k, attn.k_norm)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, N, D]
        return at_site(sites["proj"], linear(out, attn.proj, sites["proj.weights"]), out)

    def _mlp(self, x: Tensor, mlp: Any, sites: Sites) -> Tensor:
        if "fc1_folded" in mlp._buffers:
            hidden = F.silu(F.linear(x, mlp.fc1_folded, mlp.fc1_bias_folded))
            return F.linear(hidden, mlp.fc2_folded, mlp.fc2.bias)
        hidden = mlp.act(at_site(sites["fc1"], linear(x, mlp.fc1, sites["fc1.weights"]), x))
        return at_site(sites["fc2"], linear(hidden, mlp.fc2, sites["fc2.weights"]), hidden)

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
                self._masters[name] = master if master.is_meta else master.cpu()
            weight.data = master.to(weight.device, compute)
        for index, block in enumerate(self.net.blocks):
            sites = {site: [each for own in self.sites for each in own[index][site]] for site in SITES}  # all experts'
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
        frozen = not any(
            parameter.requires_grad or prefix + name in self.held for name, parameter in mlp.named_parameters()
        )
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
        own = self.named_parameters()
        return [(name, weight) for name, weight in own if not weight.requires_grad and name not in self.held]


def _empty(blocks: int) -> list[Sites]:
    return [{site: [] for site in SITES} for _ in range(blocks)]
