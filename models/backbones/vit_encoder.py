"""The encoder for all plain ViTs: timm's weights, and a forward of our own with named sites where tuners act.

The network is timm's `VisionTransformer` or our `PlainViT`, which only hold the weights (`qkv`, `proj`, `fc1`, `fc2`,
…). The forward is written here because tuners act inside the blocks, and because three facts make a training step with
a frozen network cheaper. All three are exact up to rounding:

* Where only the class token is read, the last block computes query, projection and MLP for that token alone.
* QuickGELU(x) = silu(1.702 x) / 1.702, and both constants can be folded into frozen weights of fc1 and fc2.
* q, k and v stay 4-D, which is the shape that the fused attention kernels take.

Sites of a block (x is the input of the site, y its output):

* `tokens`: the block's input;
* `norm1`, `q`, `k`, `v`, `proj`, `norm2`, `fc1`, `fc2`: the output of that layer;
* `mlp`: y is the output of the MLP branch, x the residual stream before norm2;
* `qkv.weights`, `proj.weights`, `fc1.weights`, `fc2.weights`: y is the layer's pair of weight and bias.

A tuner's module at a site is called as `y = module(y, x)`. Several act in the order of the table of tuners.

With several experts, each has tuners of its own in the last blocks, around the same frozen weights.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.plain_vit import PlainViT, is_quick_gelu
from tailtune.models.backbones.vit_compatibility import unsupported_part
from tailtune.models.backbones.vit_layers import apply_tuners, layer_scale, linear, norm, project_qkv

LAYERS = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""Name of each linear layer, in LIFT's order → its path within a block."""
OUTPUTS = ("tokens", "norm1", "q", "k", "v", "proj", "norm2", "fc1", "fc2", "mlp")
"""Sites at the output of a layer."""
SITES = (*OUTPUTS, *(f"{layer}.weights" for layer in LAYERS))
"""All sites of a block."""
QUICK_GELU_FACTOR = 1.702  # QuickGELU(x) = x · sigmoid(1.702 x)

Sites = dict[str, list[nn.Module]]
"""Site → the tuners' modules there, for one block."""


class ViTEncoder(Encoder):
    """A plain ViT with tuners → the pooled feature after the last norm, projected if a projection is given.

    Class and register tokens, layer scale, normed queries and keys, and all of timm's poolings are supported. The
    class token attends to tokens that a prompt tuner has added; pooling never includes them.

    Checkpoints name tensors after the attributes `net`, `tuners` and `projection`.

    Args:
        net: the network without its classifier.
        projection: [d, D] weight that is applied to the feature (CLIP's visual projection), or None.
        fast: False computes the plain formulation, for comparison.

    Attributes:
        sites: expert → block → site → modules. Experts share the entries of the blocks that they share.
        num_expert_blocks: how many of the last blocks hold tuners of each expert's own.

    Raises:
        ValueError: the network has parts that this forward would leave out, see `unsupported_part`.
    """

    def __init__(self, net: Any, projection: Tensor | None = None, fast: bool = True) -> None:
        super().__init__(net)
        reason = unsupported_part(net)
        if reason is not None:
            raise ValueError(f"ViTEncoder cannot run this network: it has {reason}; use WholeNetworkEncoder")
        self.projection = None if projection is None else nn.Parameter(projection, requires_grad=False)
        self.sites = [_empty_sites(len(net.blocks))]
        self.num_expert_blocks = 0
        self.fast = fast
        self.residual_dtype: torch.dtype | None = None
        self._full_precision_weights: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Width D of the transformer."""
        return int(self.net.embed_dim)

    @property
    def feature_dim(self) -> int:  # type: ignore[override]
        """Width of the feature: d after a projection, else D."""
        return self.width if self.projection is None else len(self.projection)

    @property
    def blocks(self) -> list[nn.Module]:  # type: ignore[override]
        """The blocks of the transformer."""
        return list(self.net.blocks)

    @property
    def expert_blocks(self) -> list[nn.Module]:
        return self.blocks[self.depth - self.num_expert_blocks :]

    @property
    def patch_size(self) -> int:
        """Side of a patch, in pixels."""
        return int(self.net.patch_embed.patch_size[0])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.net.patch_embed.grid_size

    @property
    def num_tokens(self) -> int:
        """Tokens of an image: patches, class and register tokens, but no prompts."""
        return int(self.net.patch_embed.num_patches + self.net.num_prefix_tokens)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the frozen weights, and so of the features."""
        return self.net.patch_embed.proj.weight.dtype

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of an MLP."""
        return int(self.net.blocks[0].mlp.fc1.out_features)

    @property
    def pools_class_token(self) -> bool:
        """Whether the feature is made of the class token alone."""
        return bool(self.net.global_pool == "token")

    def layers(self, index: int) -> dict[str, Any]:
        """The linear layers of block `index`, by their names in LAYERS."""
        return {name: self.net.blocks[index].get_submodule(path) for name, path in LAYERS.items()}

    def split_experts(self, experts: int, own_blocks: int) -> None:
        """Give each expert sites of its own in the last blocks. Call it before any tuner is inserted.

        Args:
            experts: number of experts.
            own_blocks: how many of the last blocks.
        """
        shared = self.sites[0][: self.depth - own_blocks]
        self.sites = [[*shared, *_empty_sites(own_blocks)] for _ in range(experts)]
        self.experts, self.num_expert_blocks = experts, own_blocks

    def insert(
        self, tuner: str, index: int, modules: dict[str, nn.Module], on_weights: bool = False, expert: int | None = None
    ) -> None:
        """Put a tuner's modules at sites of a block.

        They are stored as `tuners.<tuner>.<block>.<site>`, modules of one expert as
        `tuners.<tuner>.<block>.<expert>.<site>`. Checkpoints use these names.

        Args:
            tuner: name of the tuner.
            index: index of the block.
            modules: site → module; with `on_weights` layer → module.
            on_weights: whether the modules act on the weights of layers instead of their outputs.
            expert: the expert that the modules belong to; None: all.
        """
        path = [tuner, str(index)] if expert is None else [tuner, str(index), str(expert)]
        parent = self.tuners
        for name in path[:-1]:
            if name not in parent:
                parent[name] = nn.ModuleDict()
            parent = cast(nn.ModuleDict, parent[name])
        parent.add_module(path[-1], nn.ModuleDict(modules))
        for name, module in modules.items():
            self.sites[expert or 0][index][f"{name}.weights" if on_weights else name].append(module)

    def trunk(self, images: Tensor) -> Tensor:
        """Run the blocks that all experts share.

        Args:
            images: normalised images [B, 3, H, W].

        Returns:
            Features [B, feature_dim] in the compute dtype; where experts have blocks of their own, the residual
            stream [B, N, D] before these blocks, prompts included.
        """
        net: Any = self.net
        add_positions = net.add_positions if isinstance(net, PlainViT) else net._pos_embed
        x = norm(add_positions(net.patch_embed(images.to(self.compute_dtype))), net.norm_pre)  # [B, N, D]
        x = x.to(self.residual_dtype or x.dtype)
        x = self._run_blocks(x, range(self.depth - self.num_expert_blocks), self.sites[0])
        return x if self.num_expert_blocks else self._pool(x)

    def branch(self, shared: Tensor, expert: int) -> Tensor:
        if not self.num_expert_blocks:
            return shared
        indices = range(self.depth - self.num_expert_blocks, self.depth)
        return self._pool(self._run_blocks(shared, indices, self.sites[expert]))

    def _run_blocks(self, x: Tensor, indices: range, sites: Sequence[Sites]) -> Tensor:
        """Run blocks in turn, [B, N, D] → [B, N, D]; after the last block [B, 1, D] if the class token is enough."""
        for index in indices:
            if sites[index]["tokens"]:
                x = apply_tuners(sites[index]["tokens"], x[:, : self.num_tokens], x)
            class_token_only = self.fast and self.pools_class_token and index == self.depth - 1
            x = self._block(x, self.net.blocks[index], sites[index], class_token_only)
        return x

    def _pool(self, x: Tensor) -> Tensor:
        """Last norm, pooling and projection, [B, N, D] → [B, feature_dim]."""
        net: Any = self.net
        x = norm(x[:, : 1 if self.pools_class_token else self.num_tokens], net.norm).to(self.compute_dtype)
        features = norm(net.pool(x), net.fc_norm)
        return features if self.projection is None else F.linear(features, self.projection.to(self.compute_dtype))

    def _block(self, x: Tensor, block: Any, sites: Sites, class_token_only: bool) -> Tensor:
        """One pre-norm block, [B, N, D] → [B, N, D], or [B, 1, D] for the class token alone."""
        normed = apply_tuners(sites["norm1"], norm(x, block.norm1).to(self.compute_dtype), x)
        queries = normed[:, :1] if class_token_only else normed
        attended = self._attend(normed, queries, block.attn, sites)
        x = (x[:, :1] if class_token_only else x) + layer_scale(attended, block.ls1)
        normed = apply_tuners(sites["norm2"], norm(x, block.norm2).to(self.compute_dtype), x)
        return x + apply_tuners(sites["mlp"], layer_scale(self._mlp(normed, block.mlp, sites), block.ls2), x)

    def _attend(self, x: Tensor, queries: Tensor, attn: Any, sites: Sites) -> Tensor:
        """Self-attention of `queries` [B, M, D] over x [B, N, D] → [B, M, D]."""
        q, k, v = project_qkv(x, queries, attn.qkv, sites["qkv.weights"])
        q, k, v = apply_tuners(sites["q"], q, queries), apply_tuners(sites["k"], k, x), apply_tuners(sites["v"], v, x)
        q, k, v = (tensor.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for tensor in (q, k, v))  # [B, H, N, D/H]
        q, k = norm(q, attn.q_norm), norm(k, attn.k_norm)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # [B, M, D]
        return apply_tuners(sites["proj"], linear(out, attn.proj, sites["proj.weights"]), out)

    def _mlp(self, x: Tensor, mlp: Any, sites: Sites) -> Tensor:
        if "fc1_folded" in mlp._buffers:
            hidden = F.silu(F.linear(x, mlp.fc1_folded, mlp.fc1_bias_folded))
            return F.linear(hidden, mlp.fc2_folded, mlp.fc2.bias)
        hidden = mlp.act(apply_tuners(sites["fc1"], linear(x, mlp.fc1, sites["fc1.weights"]), x))
        return apply_tuners(sites["fc2"], linear(hidden, mlp.fc2, sites["fc2.weights"]), hidden)

    @torch.no_grad()
    def set_precision(self, compute: torch.dtype = torch.float32, residual: torch.dtype | None = None) -> None:
        """Cast the frozen weights to `compute`, and fold QuickGELU's constants into them where that is exact.

        Weights that a narrower dtype would round are kept in full precision as well, so a later call with fp32 gets
        them back exactly. Call this again when frozen weights have changed, or other parameters are frozen.
        """
        self.residual_dtype = residual
        for name, weight in self._frozen_parameters():
            full = self._full_precision_weights.pop(name, weight.data)
            if compute.itemsize < full.dtype.itemsize:
                self._full_precision_weights[name] = full if full.is_meta else full.cpu()
            weight.data = full.to(weight.device, compute)
        for index, block in enumerate(self.net.blocks):
            sites = {site: [module for blocks in self.sites for module in blocks[index][site]] for site in SITES}
            for name, layer in self.layers(index).items():
                if sites[f"{name}.weights"] and type(layer) is not nn.Linear:
                    tuners = " and ".join(tuner for tuner in ("mask", "aft") if tuner in self.tuners)
                    raise UserError(f"{tuners} and peft both act on {name}; leave {name} out of peft's target_modules")
            tuned = any(sites[name] for name in ("fc1", "fc2", "fc1.weights", "fc2.weights"))
            self._fold_quick_gelu(block.mlp, f"net.blocks.{index}.mlp.", untuned=not tuned)

    def _fold_quick_gelu(self, mlp: Any, prefix: str, untuned: bool) -> None:
        """Set buffers with 1.702·fc1 and fc2/1.702, or remove them where the MLP cannot use them.

        The buffers are not persistent: they follow `.to()`, and no checkpoint holds them.

        Args:
            mlp: the MLP of a block.
            prefix: of the names of its parameters.
            untuned: whether no tuner acts within it.
        """
        for name in ("fc1_folded", "fc1_bias_folded", "fc2_folded"):
            mlp._buffers.pop(name, None)
        plain_linear = type(mlp.fc1) is type(mlp.fc2) is nn.Linear and mlp.fc1.bias is not None
        frozen = not any(
            parameter.requires_grad or prefix + name in self.frozen_trained
            for name, parameter in mlp.named_parameters()
        )
        if not (self.fast and untuned and plain_linear and frozen and is_quick_gelu(mlp.act)):
            return
        for name, weight, factor in (
            ("fc1_folded", "fc1.weight", QUICK_GELU_FACTOR),
            ("fc1_bias_folded", "fc1.bias", QUICK_GELU_FACTOR),
            ("fc2_folded", "fc2.weight", 1 / QUICK_GELU_FACTOR),
        ):
            parameter = mlp.get_parameter(weight)
            full = self._full_precision_weights.get(prefix + weight, parameter.data)
            mlp.register_buffer(name, (full * factor).to(parameter.device, parameter.dtype), persistent=False)

    def _frozen_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """Parameters that neither train nor were trained by an earlier stage."""
        named = self.named_parameters()
        return [
            (name, weight) for name, weight in named if not weight.requires_grad and name not in self.frozen_trained
        ]


def _empty_sites(blocks: int) -> list[Sites]:
    """The sites of some blocks, with no tuner at any of them."""
    return [{site: [] for site in SITES} for _ in range(blocks)]
