"""`--dry-run`: what a command would do, from a model on the meta device; nothing is trained or read."""

from typing import Any

import torch

from tailtune.configs import CfgNode, values_of
from tailtune.configs.schema import SCHEMA
from tailtune.models import ClassificationModel, resolve, sizes_of
from tailtune.models.heads.expert_heads import heads_of
from tailtune.trainers.distributed import world_size
from tailtune.trainers.evaluation.expert_usage import GIGA, flops_by_experts
from tailtune.trainers.methods import Method
from tailtune.trainers.optim import micro_batch_size
from tailtune.trainers.validation import outline


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
