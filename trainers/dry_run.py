"""`--dry-run`: everything is built on the meta device, so that every option is checked and nothing is read."""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from tailtune.configs import CfgNode, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.schema import SCHEMA
from tailtune.datasets import build_info
from tailtune.models import ClassificationModel, resolve, sizes_of
from tailtune.models.heads.expert_heads import heads_of
from tailtune.trainers.distributed import world_size
from tailtune.trainers.evaluation.ensembles import check_ensemble
from tailtune.trainers.evaluation.expert_usage import GIGA, flops_by_experts
from tailtune.trainers.evaluation.expert_weights import check_adapt
from tailtune.trainers.evaluation.target_prior import check_target
from tailtune.trainers.export import EXPORTS
from tailtune.trainers.methods import Method
from tailtune.trainers.optim import Plan, check_factors, micro_batch_size
from tailtune.trainers.runs.load_run import make_method, subject_of


def dry_run(cfg: CfgNode, method: Method | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resolved config, parameter counts and cost of a run; and the values behind options that are none.

    Args:
        method: the `outline` of the run, where it has been made already.

    Raises:
        UserError: whatever a real run would refuse before it touches images or weights.
    """
    given, cfg = cfg, resolve(cfg)
    method = method or outline(cfg)
    model = method.model
    with torch.device("meta"):
        flops = forward_flops(model, cfg.resolution)
    sizes = sizes_of(cfg, len(heads_of(model.head)[0].get_parameter("weight")), model.encoder)
    derived = {
        "adapter_dim": sizes.bottleneck,
        "vpt_len": sizes.prompts,
        "mask_ratio": sizes.mask_ratio,
        "mask_seed": sizes.mask_seed,
        **{key: cfg[key] for key in ("resolution", "interpolation", "expand")},
        "micro_batch_size": micro_batch_size(cfg, world_size()),
    }
    result = {"config": values_of(given), "params": method.counts(), "gflops_per_image": flops / GIGA}
    return result, {key: value for key, value in derived.items() if given[key] is None}


def check(cfg: CfgNode) -> ClassificationModel:
    """Refuse what can be refused without images and weights; the model on the meta device.

    Raises:
        UserError: as `dry_run`.
    """
    return outline(cfg).model


KEPT = ("resolution", "pixel_mean", "pixel_std")
KEPT_WITH_HEAD = ("classifier", "scale")
"""What no tensor says of a model that a later stage holds."""


def check_chain(stages: Sequence[CfgNode], here: bool = False) -> list[Method]:
    """Refuse stages that do not fit each other, before the first of them trains for hours; returns their outlines.

    Args:
        here: they are to run on this machine, so it must hold them.

    Raises:
        UserError: as `check` of each; or a stage that cannot go on from the one before.
    """
    methods = [outline(each) for each in stages]
    for each in methods if here else ():
        check_memory(each)
    for (before, earlier), (cfg, method) in pairwise(zip(map(resolve, stages), methods, strict=True)):
        method.fits(earlier)
        head = bool(method.held) and not method.drops_head()
        for key in (*(KEPT if method.held else ()), *(KEPT_WITH_HEAD if head else ())):
            if cfg[key] != before[key]:
                raise UserError(
                    f"after: method {cfg.method} keeps the model of the earlier run, whose {key} is {before[key]}, "
                    f"not {cfg[key]}; give both the same (`after.{key}` sets the earlier run's)"
                )
    return methods


def check_memory(method: Method) -> None:
    """Refuse a model whose parameters alone, with gradient and momentum of what trains, exceed this machine's memory.

    A wide head of very many classes, or a rank of a million, would end in an allocator's error, or in swapping.
    """
    parameters = list(method.parameters())
    needed = sum(4 * each.numel() * (3 if each.requires_grad else 1) for each in parameters)
    if needed > memory():
        raise UserError(
            f"the model has {sum(each.numel() for each in parameters):,} parameters, which take {needed / 1e9:,.1f} GB "
            f"to train, and this machine has {memory() / 1e9:,.1f}; choose a smaller backbone, num_classes, "
            "num_experts, adapter_dim, vpt_len or peft_args"
        )


def memory() -> int:
    """Bytes of this machine's main memory, where every model is built; without limit where the system does not say."""
    known = hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else sys.maxsize


def outline(cfg: CfgNode) -> Method:
    """The method around that model, as `check`."""
    cfg = resolve(cfg)
    info = build_info(cfg)
    plan = Plan.of(cfg, micro_batch_size(cfg, world_size()))
    with torch.device("meta"):
        method = make_method(cfg, info)
    check_factors(method.param_groups(), plan)
    check_adapt(cfg)
    check_ensemble(cfg)
    check_target(cfg, info)
    if cfg.export is not None:
        EXPORTS[cfg.export].check(subject_of(cfg, method, info.class_names))
    return method


def forward_flops(model: ClassificationModel, resolution: int) -> int:
    """FLOPs of one image through the model in eval, all experts included."""
    return flops_by_experts(model, resolution)[-1]


def describe(result: dict[str, Any], derived: dict[str, Any]) -> str:
    """The resolved config, with what stands behind none, and the parameter table, for people."""
    hidden = [key for key, entry in SCHEMA.items() if entry.internal]
    config = {key: value for key, value in result["config"].items() if key not in hidden}
    width = max(map(len, config))
    lines = [f"{k:<{width}}  {v}" + (f" → {derived[k]}" if k in derived else "") for k, v in config.items()]
    params = result["params"]
    digits = max(len(f"{count:,}") for count in params.values())
    lines += ["", "parameters"] + [f"  {name:<10}{count:>{digits},}" for name, count in params.items()]
    return "\n".join([*lines, "", f"forward  {result['gflops_per_image']:.2f} GFLOPs an image"])
