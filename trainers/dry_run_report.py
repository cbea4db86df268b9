"""What `--dry-run` prints for people: run folder, length, classes, options, parameters, memory and cost."""

import math
from collections.abc import Sequence
from typing import Any

from tailtune.configs import CfgNode, schema_of
from tailtune.configs.console_text import wrapped
from tailtune.configs.launch_environment import world_size
from tailtune.datasets.build_data import build_info
from tailtune.models import resolve
from tailtune.trainers.flat_minima import sam_mode
from tailtune.trainers.memory_estimate import TrainingMemory, as_on_a_gpu, training_memory
from tailtune.trainers.methods import Earlier, Method
from tailtune.trainers.micro_batch_size import micro_batch_size
from tailtune.trainers.optimizers_and_schedules import OPTIMIZERS
from tailtune.trainers.precision import RESIDUAL
from tailtune.trainers.runs.run_folder import folder_of
from tailtune.trainers.storage.checkpoint import trained_state

MB = 10**6


def report(
    stages: Sequence[CfgNode], methods: Sequence[Method], result: dict[str, Any], derived: dict[str, Any], every: bool
) -> str:
    """The lines for people.

    Args:
        stages: configs of the run and of the stages before it.
        methods: their outlines; used up.
        result: parameters and cost, from `dry_run`.
        derived: values behind options that are none.
        every: show all options, not only those that differ from their defaults.
    """
    cfg = resolve(stages[-1])
    counts = build_info(cfg).class_counts.tolist()
    return "\n".join(
        [
            f"run folder  {folder_of(stages[-1])}",
            f"classes     {_classes(counts)}",
            f"training    {_length(cfg, sum(counts))}",
            "",
            *_options(result["config"], cfg, derived, every),
            "",
            "parameters",
            *table({name: f"{count:,}" for name, count in result["params"].items()}),
            "",
            *_memory(cfg, methods),
            "",
            f"forward  {result['gflops_per_image']:.2f} GFLOPs an image" + _texts(result.get("gflops_of_texts"), cfg),
        ]
    )


def _texts(gflops: float | None, cfg: CfgNode) -> str:
    """What the texts of the classes cost, in GFLOPs, beside the images of a step."""
    return f", {gflops:,.0f} GFLOPs all class texts, once in a step of {cfg.batch_size} images" if gflops else ""


def table(rows: dict[str, str]) -> list[str]:
    """One line for each row, with the name and the right-aligned number."""
    names, numbers = max(map(len, rows)), max(map(len, rows.values()))
    return [f"  {name:<{names}}  {number:>{numbers}}" for name, number in rows.items()]


def _classes(counts: Sequence[int]) -> str:
    most, least = max(counts), min(counts)
    each = f"{most:,} training images each" if most == least else f"{most:,} … {least:,} training images"
    return f"{len(counts):,} with {each}, {sum(counts):,} in all"


def _length(cfg: CfgNode, images: int) -> str:
    """Steps of an epoch and of the run."""
    per_epoch, steps = steps_of(cfg, images)
    return f"{per_epoch:,} step{'s' * (per_epoch > 1)} an epoch, {steps:,} in all" if steps else "none"


def steps_of(cfg: CfgNode, images: int) -> tuple[int, int]:
    """Numbers of optimizer steps of an epoch and of the whole run; both are 0 if nothing is trained.

    Args:
        cfg: the resolved config.
        images: number of training images.
    """
    if cfg.zero_shot or not cfg.num_epochs:
        return 0, 0
    per_epoch = math.ceil(images / cfg.batch_size)
    steps = per_epoch * cfg.num_epochs
    return per_epoch, steps if cfg.max_steps is None else min(steps, cfg.max_steps)


def _options(config: dict[str, Any], cfg: CfgNode, derived: dict[str, Any], every: bool) -> list[str]:
    """The options, and the values that replace those that are none."""
    schema = schema_of(cfg)
    shown = [key for key in schema.settable() if every or config[key] != schema[key].default]
    width = max(map(len, shown))
    title = "options" if every else "options that differ from their defaults; --dry-run --all shows every option"
    lines = [f"  {key:<{width}}  {config[key]}" + (f" → {derived[key]}" if key in derived else "") for key in shown]
    return [title, *lines]


def _memory(cfg: CfgNode, methods: Sequence[Method]) -> list[str]:
    if cfg.zero_shot or not cfg.num_epochs:
        return ["memory of training: none"]
    images = micro_batch_size(cfg, world_size())
    memory = memory_of(cfg, methods)
    rows = {
        "parameters": memory.parameters,
        "gradients": memory.gradients,
        "optimizer state": memory.optimizer,
        **({} if memory.image is None else {f"activations of {images} images": memory.image * images}),
        **({"activations of class texts": memory.texts} if memory.texts else {}),
        "total": memory.total(images),
    }
    left_out = "activations, which this run does not let count, and " if memory.image is None else ""
    return [
        *wrapped(f"estimated memory of training on one GPU, in MB, without {left_out}the workspace of kernels"),
        *table({name: f"{size / MB:,.0f}" for name, size in rows.items()}),
    ]


def memory_of(cfg: CfgNode, methods: Sequence[Method]) -> TrainingMemory:
    """The memory of training the last of the methods, which goes on from the one before it.

    Args:
        cfg: its resolved config.
        methods: outlines of all stages; used up.
    """
    method, beside = ready_to_train(cfg, methods)
    copies = OPTIMIZERS[cfg.optimizer].copies + sam_mode(cfg.sam).copies
    return training_memory(method, cfg.resolution, copies, beside)


def ready_to_train(cfg: CfgNode, methods: Sequence[Method]) -> tuple[Method, list[Method]]:
    """The last of the methods as it trains on a GPU, but on the meta device.

    Args:
        cfg: its resolved config.
        methods: outlines of all stages; used up.

    Returns:
        The method, and those that it uses beside its own tensors, such as a teacher.
    """
    *before, method = methods
    beside: list[Method] = []

    def lend() -> Method:
        beside.append(before[-1].to("meta"))  # some tensors are made outside the meta device, such as pixel means
        return beside[0]

    if before:
        method.after(Earlier(True, lambda: trained_state(before[-1]), lend))
    return as_on_a_gpu(method, cfg.prec, RESIDUAL[cfg.residual_dtype]), beside
