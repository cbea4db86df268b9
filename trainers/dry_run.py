"""`--dry-run`: reports what a command would do, from a model on the meta device. Nothing is trained."""

from typing import Any

import torch

from tailtune.configs import CfgNode, values_of
from tailtune.configs.launch_environment import world_size
from tailtune.configs.option import key_names
from tailtune.models import ClassificationModel, resolve, tuner_options
from tailtune.models.heads.expert_heads import heads_of
from tailtune.models.tuners.table import TUNERS
from tailtune.trainers.config_checks import outline
from tailtune.trainers.evaluation.expert_usage import GIGA, flops_by_experts
from tailtune.trainers.methods import Method
from tailtune.trainers.micro_batch_size import micro_batch_size


def dry_run(cfg: CfgNode, method: Method | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Report config, parameter counts and cost of a run.

    Args:
        cfg: the config.
        method: the method that `validate` returned for this run; None: the run is validated here.

    Returns:
        The report, and the values that replace options that are none.

    Raises:
        UserError: any error that a real run would raise before it reads images or weights.
    """
    given, cfg = cfg, resolve(cfg)
    method = method or outline(cfg)
    model = method.model
    with torch.device("meta"):
        flops = forward_flops(model, cfg.resolution)
    resolved = values_of(cfg) | {"micro_batch_size": micro_batch_size(cfg, world_size())}
    classes = len(heads_of(model.head)[0].get_parameter("weight"))
    chosen_last = sorted(TUNERS, key=lambda name: bool(cfg[name]))  # some tuners share an option
    for name, filled in tuner_options(cfg, chosen_last, classes, model.encoder).items():
        resolved |= {key: getattr(filled, field) for field, key in key_names(filled, name, "_").items()}
    values = values_of(given)
    result = {"config": values, "params": method.counts(), "gflops_per_image": flops / GIGA}
    return result, {key: resolved[key] for key, value in values.items() if value is None and resolved[key] is not None}


def forward_flops(model: ClassificationModel, resolution: int) -> int:
    """FLOPs of one image through the model in eval mode, with all experts. `resolution` is its side in pixels."""
    return flops_by_experts(model, resolution)[-1]
