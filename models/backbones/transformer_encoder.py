"""Blocks of a pre-norm transformer with named sites where tuners act: what image and text encoders have in common.

The network only holds the weights, in timm's layout (`qkv`, `proj`, `fc1`, `fc2`, …). The forward is written here
because tuners act inside the blocks, and because these facts make a training step with a frozen network cheaper. They
are exact up to rounding:

* Where only one token of a sequence is read, the last block computes query, projection and MLP for that token alone.
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

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.models.backbones.attention import fused_attention
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.plain_vit import is_quick_gelu
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
Pick = Callable[[Tensor], Tensor]
"""Tokens [B, N, D] → those whose output is wanted [B, M, D]."""
KeysAndValues = tuple[Tensor, Tensor]
"""Keys and values of a block [B, H, N, D/H]."""


@dataclass
class Attention:
    """What the tokens of a block attend to, besides all tokens of their own sequence."""

    mask: Tensor | None = None
    """True where a query may see a key, [M, P + N], or one for each sequence [B, 1, M, P + N]; None: everywhere."""
    before: KeysAndValues | None = None
    """Keys and values of P tokens before those of the sequences, [1, H, P, D/H]."""
    own: KeysAndValues | None = None
    """Keys and values of the tokens of the sequences themselves, which the block sets."""


class TransformerEncoder(Encoder):
    """Base of the encoders whose blocks tuners can change.

    Checkpoints name tensors after the attributes `net`, `tuners` and `projection`.

    Args:
        net: the network; its `blocks` have timm's layout.
        projection: [d, D] weight that is applied to the feature (CLIP's projection), or None.
        fast: False computes the plain formulation, for comparison.

    Attributes:
        sites: expert → block → site → modules. Experts share the entries of the blocks that they share.
        num_expert_blocks: how many of the last blocks hold tuners of each expert's own.
    """

    def __init__(self, net: Any, projection: Tensor | None = None, fast: bool = True) -> None:
        super().__init__(net)
        self.projection = None if projection is None else nn.Parameter(projection, requires_grad=False)
        self.sites = [_empty_sites(len(net.blocks))]
        self.num_expert_blocks = 0
        self.fast = fast
        self.calls_blocks = False
        self.residual_dtype: torch.dtype | None = None
        self._full_precision_weights: dict[str, Tensor] = {}

    @property
    def width(self) -> int:
        """Width D of the transformer."""
        raise NotImplementedError

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
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the frozen weights, and so of the features."""
        raise NotImplementedError

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of an MLP."""
        return int(self.net.blocks[0].mlp.fc1.out_features)

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

    def run_block(
        self, x: Tensor, index: int, sites: Sites, pick: Pick | None = None, attention: Attention | None = None
    ) -> Tensor:
        """One pre-norm block.

        Args:
            x: the residual stream [B, N, D].
            index: index of the block.
            sites: the tuners of the block; those at `tokens` have acted already.
            pick: the tokens whose output is wanted; None: all.
            attention: what the tokens see; None: all tokens of their own sequence.

        Returns:
            [B, N, D], or [B, M, D] after `pick`.
        """
        if self.calls_blocks:
            return cast(Tensor, self.net.blocks[index](x, sites, pick, attention))
        return self.compute_block(self.net.blocks[index], x, sites, pick, attention)

    def call_blocks(self) -> None:
        """From now on compute a block by a call of its module, so that hooks on it run, such as those of FSDP."""
        for block in self.net.blocks:
            block.forward = partial(self.compute_block, block)
        self.calls_blocks = True

    def compute_block(
        self, block: Any, x: Tensor, sites: Sites, pick: Pick | None, attention: Attention | None
    ) -> Tensor:
        """As `run_block`, and never by a call of the module. It gets the block, so that all share one compiled code."""
        normed = apply_tuners(sites["norm1"], norm(x, block.norm1).to(self.compute_dtype), x)
        queries = normed if pick is None else pick(normed)
        attended = self._attend(normed, queries, block.attn, sites, attention or Attention())
        x = (x if pick is None else pick(x)) + layer_scale(attended, block.ls1)
        normed = apply_tuners(sites["norm2"], norm(x, block.norm2).to(self.compute_dtype), x)
        return x + apply_tuners(sites["mlp"], layer_scale(self._mlp(normed, block.mlp, sites), block.ls2), x)

    def _attend(self, x: Tensor, queries: Tensor, attn: Any, sites: Sites, attention: Attention) -> Tensor:
        """Attention of `queries` [B, M, D] to x [B, N, D] and to what is before it → [B, M, D]."""
        q, k, v = project_qkv(x, queries, attn.qkv, sites["qkv.weights"])
        q, k, v = apply_tuners(sites["q"], q, queries), apply_tuners(sites["k"], k, x), apply_tuners(sites["v"], v, x)
        q, k, v = (tensor.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for tensor in (q, k, v))  # [B, H, N, D/H]
        q, k = norm(q, attn.q_norm), norm(k, attn.k_norm)
        attention.own = k, v
        if attention.before is not None:
            k, v = (
                torch.cat([before.expand(len(own), -1, -1, -1), own], dim=2)
                for before, own in zip(attention.before, (k, v), strict=True)
            )
        out = fused_attention(q, k, v, attention.mask).transpose(1, 2).flatten(2)  # [B, M, D]
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
