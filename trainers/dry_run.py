"""`--dry-run`: everything is built on the meta device, so that every option is checked and nothing is read."""

import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from tailtune.configs import CfgNode, schema_of, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.option import key_names
from tailtune.datasets import build_info
from tailtune.models import ClassificationModel, resolve, tuner_options
from tailtune.models.heads.expert_heads import heads_of
from tailtune.models.tuners.table import TUNERS
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
    resolved = values_of(cfg) | {"micro_batch_size": micro_batch_size(cfg, world_size())}
    classes = len(heads_of(model.head)[0].get_parameter("weight"))
    for name, filled in tuner_options(cfg, TUNERS, classes, model.encoder).items():
        resolved |= {key: getattr(filled, field) for field, key in key_names(filled, name, "_").items()}
    values = values_of(given)
    result = {"config": values, "params": method.counts(), "gflops_per_image": flops / GIGA}
    return result, {key: resolved[key] for key, value in values.items() if value is None and resolved[key] is not None}


def check(cfg: CfgNode) -> ClassificationModel:
    """Refuse what can be refused without images and weights; the model on the meta device.

    Raises:
        UserError: as `dry_run`.
    """
    return outline(cfg).model


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
        held = {"encoder", *(() if method.drops_head() else ("head",))} if method.held else set()
        for key, entry in schema_of(cfg).items():
            if entry.held_with in held and cfg[key] != before[key]:
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
