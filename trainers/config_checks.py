"""`validate`: all checks of a command that need neither images nor weights, before any file is written.

The run is built on the meta device, which checks every option. Only image lists and folders are read.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError
from tailtune.configs.launch_environment import world_size
from tailtune.configs.machine import total_memory
from tailtune.configs.option import options_from
from tailtune.configs.unread_options import refuse_unread_options
from tailtune.datasets.build_data import build_info
from tailtune.models import ClassificationModel, build_model, resolve
from tailtune.models.text_mode import starts_at_random
from tailtune.trainers.compilation import check_compile
from tailtune.trainers.evaluation.adaptation_table import check_adapt
from tailtune.trainers.evaluation.ensembles import NONE, ensemble_named, reads
from tailtune.trainers.evaluation.target_prior import TargetPlan, check_target
from tailtune.trainers.evaluation.validation import ValidationPlan
from tailtune.trainers.evaluation.weight_ensembles import RANDOM
from tailtune.trainers.evaluation.zero_shot_ensembles import zero_shot_of
from tailtune.trainers.export import EXPORTS, check_export
from tailtune.trainers.flat_minima import check_sam, sam_mode
from tailtune.trainers.methods import Method
from tailtune.trainers.micro_batch_size import micro_batch_size
from tailtune.trainers.optimizers_and_schedules import OPTIMIZERS, Plan, check_factors
from tailtune.trainers.runs.load_run import differently_held, make_method, subject_of
from tailtune.trainers.runs.merged_runs import MergeOptions, check_merge
from tailtune.trainers.trackers import check_trackers


def validate(
    stages: Sequence[CfgNode], *, counts: Sequence[int] | None = None, trains: bool = True, here: bool = False
) -> list[Method]:
    """Check everything that can be checked without images and weights, before the first stage trains for hours.

    Args:
        stages: configs of the runs in their order; each run continues the one before.
        counts: number of training images of each class of the finished run that is evaluated, if it is known. None:
            the numbers are taken from the data of the config.
        trains: whether the stages train. If False, the command evaluates a finished run, and training options are not
            checked.
        here: whether the stages run on this machine, so that its memory is checked too.

    Returns:
        The method of each stage, on the meta device.

    Raises:
        UserError: an unknown name, an option that does not fit the others, or stages that do not fit each other.
    """
    methods = [outline(cfg, counts, trains) for cfg in stages]
    for method, cfg in zip(methods, stages, strict=True) if here else ():
        check_memory(method, OPTIMIZERS[cfg.optimizer].copies + sam_mode(cfg.sam).copies)
    for (before, earlier), (cfg, method) in pairwise(zip(map(resolve, stages), methods, strict=True)):
        method.fits(earlier)
        kept = {"encoder"} if method.frozen_trained else set()
        kept |= {"head"} if kept and not method.discards("model.head.") else set()
        kept |= {"texts"} if "head" in kept and method.model.text is not None else set()
        for key, now, then in differently_held(cfg, before, kept):
            raise UserError(
                f"after: method {cfg.method} keeps the model of the earlier run, whose {key} is {then}, "
                f"not {now}; give both the same (`after.{key}` sets the earlier run's)"
            )
    return methods


def outline(cfg: CfgNode, counts: Sequence[int] | None = None, trains: bool = True) -> Method:
    """The method of one stage on the meta device, after the checks of `validate` that concern this stage alone.

    Args:
        cfg: config of the stage.
        counts, trains: as in `validate`.
    """
    cfg = resolve(cfg)
    info = build_info(cfg, counts)
    plan = Plan.of(cfg, micro_batch_size(cfg, world_size())) if trains else None
    with torch.device("meta"):
        method = make_method(cfg, info)
    if plan is not None:
        check_factors(method.param_groups(), plan)
        check_sam(cfg, method)
        if plan.compile:
            check_compile(method.model.encoder, cfg.backbone)
        check_merge(options_from(MergeOptions, cfg), cfg.after, method.starts_where_earlier_run_ended)
        ValidationPlan.of(cfg)
        check_trackers(cfg.trackers)
    check_adapt(cfg.adapt, method, cfg.method)
    check_ensemble(cfg, method, info.class_names)
    check_target(TargetPlan.of(cfg), info)
    check_export(cfg.export, cfg.export_fp16, cfg.push_to_hub)
    if cfg.export is not None:
        EXPORTS[cfg.export].check(subject_of(cfg, method, info.class_names))
    refuse_unread_options(cfg)
    return method


def check(cfg: CfgNode) -> ClassificationModel:
    """The model of one stage on the meta device, after the checks of `validate`."""
    return outline(cfg).model


def check_memory(method: Method, copies: int) -> None:
    """Raise a `UserError` if parameters, gradients and optimizer state exceed the main memory of this machine or job.

    A head for very many classes, or a rank of a million, would otherwise end in an error of the allocator or in
    swapping.

    Args:
        method: the method, on the meta device.
        copies: number of state tensors that the optimizer keeps for each trainable parameter.
    """
    parameters = list(method.parameters())
    needed = sum(4 * weight.numel() * (2 + copies if weight.requires_grad else 1) for weight in parameters)
    if needed > (memory := total_memory()):
        raise UserError(
            f"the model has {sum(p.numel() for p in parameters):,} parameters, which take {needed / 1e9:,.1f} GB "
            f"to train, and there are {memory / 1e9:,.1f} here; choose a smaller backbone, num_classes, num_experts, "
            "adapter_dim, vpt_len or peft_args"
        )


def check_ensemble(cfg: CfgNode, method: Method, class_names: tuple[str, ...]) -> None:
    """Check that the ensemble is possible for this run. This needs neither images nor weights.

    Args:
        cfg: the resolved config.
        method: method of the run; it may lie on the meta device.
        class_names: names of the classes.

    Raises:
        UserError: an unknown ensemble, an option that it does not read, or a run that lacks what it needs.
    """
    entry, name = ensemble_named(cfg.ensemble), cfg.ensemble
    if entry is NONE:
        return
    if reads(entry, "ensemble_runs") and not cfg.ensemble_runs:
        raise UserError(f"ensemble {name} is of several finished runs: name the others with ensemble_runs")
    if cfg.zero_shot:
        raise UserError(f"ensemble {name} is of a trained run, and zero_shot has trained nothing; leave out either")
    if not cfg.test_only:
        raise UserError(f"ensemble {name} evaluates a finished run: train without it, then add test_only True")
    if cfg.export is not None:
        raise UserError(f"export {cfg.export} writes what was trained: leave out ensemble {name}")
    if entry.start and starts_at_random(cfg) and not (cfg.after and _keeps_start(method)):
        raise UserError(RANDOM)
    if entry.text:
        _check_text(cfg, class_names)


def _keeps_start(method: Method) -> bool:
    """Whether the classifier of the run is initialised with that of the earlier run."""
    return method.starts_where_earlier_run_ended and not method.discards("model.head.")


def _check_text(cfg: CfgNode, class_names: tuple[str, ...]) -> None:
    """Raise a `UserError` if the backbone has no text encoder, as for `zero_shot`."""
    try:
        with torch.device("meta"):
            build_model(zero_shot_of(cfg), class_names)
    except UserError as error:
        raise UserError(f"ensemble {cfg.ensemble}: {error}") from error
