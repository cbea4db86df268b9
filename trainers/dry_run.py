"""`--dry-run`: what a command would do, from a model on the meta device; nothing is trained or read."""

from typing import Any

import torch

from tailtune.configs import CfgNode, values_of
from tailtune.configs.option import key_names
from tailtune.models import ClassificationModel, resolve, tuner_options
from tailtune.models.heads.expert_heads import heads_of
from tailtune.models.tuners.table import TUNERS
from tailtune.trainers.config_checks import outline
from tailtune.trainers.distributed import world_size
from tailtune.trainers.evaluation.expert_usage import GIGA, flops_by_experts
from tailtune.trainers.methods import Method
from tailtune.trainers.micro_batch_size import micro_batch_size


def dry_run(cfg: CfgNode, method: Method | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The resolved config, parameter counts and cost of a run; and the values behind options that are none.

    Args:
        method: what `validate` has returned for this run; none: it is validated here.

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


def forward_flops(model: ClassificationModel, resolution: int) -> int:
    """FLOPs of one image through the model in eval, all experts included."""
    return flops_by_experts(model, resolution)[-1]
