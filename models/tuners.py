"""TUNERS: what of a frozen backbone trains. A tuner's flag on the command line is its name in the table.

A tuner inserts modules at the sites of a ViT's blocks, selects weights of the backbone, or acts on the feature of a
backbone without blocks. Tuners combine; at a shared site they act in the order of the table. `partial` holds for
every one of them (LIFT ignores it for biases, norms and shallow prompts).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from configs.errors import UserError
from configs.seeding import seeded
from models.host import Host
from models.tuner_modules import Adapter, AdaptFormer, Lora, Prompts
from models.vit import ViT


@dataclass(frozen=True)
class Sizes:
    """The numbers that tuners are built from."""

    bottleneck: int
    prompts: int


@dataclass(frozen=True)
class Tuner:
    """What it does to a host; exactly one of the two is given.

    insert: (ViT, sizes) → site → module, for one block.
    select: module → the parameters of it that train; of the blocks, or of any other backbone as a whole.
    """

    insert: Callable[[ViT, Sizes], dict[str, nn.Module]] | None = None
    select: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None
    first_only: bool = False
    """Inserted at the first block of the range only."""
    on_batch: bool = False
    """Selected batch norms train on the statistics of the batch and update their running ones."""


def _adaptformer(host: ViT, sizes: Sizes) -> dict[str, nn.Module]:
    return {"mlp": AdaptFormer(host.width, sizes.bottleneck)}


def _adapter(host: ViT, sizes: Sizes) -> dict[str, nn.Module]:
    return {"mlp": Adapter(host.width, sizes.bottleneck)}


def _lora(host: ViT, sizes: Sizes) -> dict[str, nn.Module]:
    return {site: Lora(host.width, host.width, sizes.bottleneck) for site in ("q", "v")}


def _prompts(host: ViT, sizes: Sizes) -> dict[str, nn.Module]:
    return {"tokens": Prompts(sizes.prompts, host.width, host.patch_size)}


def _biases(module: nn.Module) -> Iterator[nn.Parameter]:
    return (parameter for name, parameter in module.named_parameters() if name.endswith("bias"))


def _of(kind: type[nn.Module]) -> Callable[[nn.Module], Iterator[nn.Parameter]]:
    """The parameters of all modules of a kind."""
    return lambda module: (each for part in module.modules() if isinstance(part, kind) for each in part.parameters())


TUNERS: dict[str, Tuner] = {
    "full_tuning": Tuner(select=nn.Module.parameters),
    "bias_tuning": Tuner(select=_biases),
    "ln_tuning": Tuner(select=_of(nn.LayerNorm)),
    "bn_tuning": Tuner(select=_of(nn.BatchNorm2d), on_batch=True),
    "vpt_shallow": Tuner(insert=_prompts, first_only=True),
    "vpt_deep": Tuner(insert=_prompts),
    "lora": Tuner(insert=_lora),
    "adapter": Tuner(insert=_adapter),
    "adaptformer": Tuner(insert=_adaptformer),
}


def bottleneck_dim(num_classes: int, depth: int) -> int:
    """LIFT's rule: r = 2^max(0, ⌊log2(C / 2L)⌋), so that tuners stay smaller than the head."""
    return 2 ** max(0, int(math.log2(num_classes / (2 * depth))))


def add_tuners(
    host: Host, names: Sequence[str], sizes: Sizes, partial: int | Sequence[int] | None = None, seed: int = 0
) -> None:
    """Freeze the host, then make the named tuners act on the blocks of `partial`.

    Raises:
        UserError: two kinds of prompts, a tuner that finds nothing to act on, or a range beyond the network.
    """
    if {"vpt_shallow", "vpt_deep"} <= set(names):
        raise UserError("vpt_shallow and vpt_deep both own the prompt tokens; choose one of them")
    blocks = host.chosen(partial)
    host.requires_grad_(False)
    for name in (name for name in TUNERS if name in names):
        tuner = TUNERS[name]
        if tuner.insert is not None:
            _insert(host, name, blocks[:1] if tuner.first_only else blocks, sizes, seed)
        if tuner.select is not None:
            _select(host, name, partial)


def _insert(host: Host, name: str, blocks: range, sizes: Sizes, seed: int) -> None:
    insert = TUNERS[name].insert
    assert insert is not None
    if not isinstance(host, ViT):
        raise UserError(f"{name} acts on the blocks of a ViT, and this backbone has none")
    for index in blocks:
        with seeded(seed, "tuner", name, index):
            host.insert(name, index, insert(host, sizes))


def _select(host: Host, name: str, partial: int | Sequence[int] | None) -> None:
    select = TUNERS[name].select
    assert select is not None
    modules = host.selectable(partial)
    found = [each for module in modules for each in select(module)]
    if modules and not found:
        raise UserError(f"{name} finds nothing to train in this backbone")
    for parameter in found:
        parameter.requires_grad_(True)
    if TUNERS[name].on_batch:
        host.batch_norms = [each for module in modules for each in module.modules() if isinstance(each, nn.BatchNorm2d)]
