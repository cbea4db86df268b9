"""Measures the time and memory of a training step. Alternates between the fast path and the plain formulation.

    python benchmarks/step.py -d imagenet_lt -m clip_vit_b16_peft --batch 8 --prec fp32 bf16
    python benchmarks/step.py adaptformer False ssf_attn True -m clip_vit_b16_peft
    python benchmarks/step.py -m clip_vit_b16_peft --beside clip_vit_b16_text_peft   # two configs by turns

The weights are random, the images are synthetic, and there is no data loader. On a CPU, the processor time of this
process is measured, which other processes do not change. On a GPU, the wall time after a synchronisation is measured.
The output is the median and the minimum of the times of all rounds, and the ratio plain / fast. While a text encoder
trains, a step encodes the texts of all classes, whatever the number of images.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from yacs.config import CfgNode

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.benchmarks.steps.device import device, finish
from tailtune.configs import load_configs
from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.datasets.data_bundle import DataInfo
from tailtune.main import Parser, exit_code_of
from tailtune.models import build_model, resolve
from tailtune.trainers.memory_estimate import blank_batch
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer
from tailtune.trainers.option_schema import declared
from tailtune.trainers.precision import PRECISIONS, RESIDUAL, cast_trainable
from tailtune.trainers.processes.peak_memory import Peak
from tailtune.trainers.runs.metrics_file import hardware

MIB = 2**20
FEW = 100
"""Steps of the run that a measured step is said to be part of."""


def method_in(cfg: CfgNode, info: DataInfo, prec: str, fast: bool = True) -> Method:
    """The method of a config with random weights in a precision, as a run casts it."""
    method = build_method(cfg, build_model(cfg, info.class_names, fast=fast), info)
    method.model.init = None
    precision = PRECISIONS[prec]
    method.model.set_precision(precision.compute, RESIDUAL[cfg.residual_dtype])
    cast_trainable(method, precision.trainable)
    return method


def stages_at_random(data: str, model: str, *pairs: str) -> list[CfgNode]:
    """The resolved configs of the one or two stages of a model config, with random weights.

    Args:
        data: data config.
        model: model config.
        pairs: more options.
    """
    words = ["pretrained", "none", *pairs]
    stages = load_configs(data, model, words, declared())
    if len(stages) > 1:
        stages = load_configs(data, model, [*words, "after.pretrained", "none"], declared())
    return [resolve(cfg) for cfg in stages]


def make_step(cfg: CfgNode, prec: str, batch_size: int, device: torch.device, fast: bool) -> Callable[[], None]:
    """Create a function that runs one optimizer step of a config.

    Args:
        cfg: resolved config.
        prec: name of a precision in `PRECISIONS`.
        batch_size: number of images in a step.
        device: device of the computation.
        fast: True for the fast path, False for the plain formulation.
    """
    info = build_info(cfg)
    return step_of(method_in(cfg, info, prec, fast).to(device), cfg, batch_size, device)


def step_of(method: Method, cfg: CfgNode, batch_size: int, device: torch.device) -> Callable[[], None]:
    """Create a function that runs one optimizer step of a method, which is on the device.

    Args:
        method: the method.
        cfg: its resolved config.
        batch_size: number of images in a step.
        device: device of the computation.
    """
    optimizer = build_optimizer(method.train().param_groups(), Plan.of(cfg, batch_size))
    batch = blank_batch(method, device, batch_size, cfg.resolution)
    batch["label"] = torch.arange(batch_size, device=device) % len(method.class_counts)
    method.before_training(FEW, FEW)
    method.on_epoch(0, 1)
    method.before_step(1)

    def step() -> None:
        outcome = method(batch)
        (outcome.loss_sum / outcome.weight).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(step: Callable[[], None], device: torch.device) -> float:
    """The time of one step in seconds: processor time on a CPU, wall time on a GPU."""
    now = time.perf_counter if device.type == "cuda" else time.process_time
    finish()
    start = now()
    step()
    finish()
    return now() - start


def peak(step: Callable[[], None], device: torch.device) -> str:
    """The largest amount of GPU memory that is allocated during a step, in MiB, as text."""
    before = Peak(device)
    step()
    memory = before.of_gpu()
    return f"{memory['allocated'] / MIB:.0f} MiB" if memory else "n/a"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print one line for each precision and formulation.

    Returns:
        The exit code: 2 for wrong input.
    """
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if args.beside == args.model:
        raise UserError(f"--beside {args.beside} is the config of -m: name another one, or leave --beside out")
    models = [args.model] if args.beside is None else [args.model, args.beside]
    stages = {name: load_configs(args.data, name, ["pretrained", "none", *args.pairs], declared()) for name in models}
    cfgs = {name: resolve(each[-1]) for name, each in stages.items()}
    print(f"{args.data} {' '.join(models)} batch {args.batch} on {hardware()}, torch {torch.__version__}")
    for prec in args.prec:
        steps = {name: make_step(cfg, prec, args.batch, device(), True) for name, cfg in cfgs.items()}
        if args.beside is None:
            steps = {"fast": steps[args.model], "plain": make_step(cfgs[args.model], prec, args.batch, device(), False)}
        compare(steps, prec, args.batch, args.rounds, device())
    return 0


def compare(steps: Mapping[str, Callable[[], None]], prec: str, batch: int, rounds: int, device: torch.device) -> None:
    """Measure two steps alternately. Print their times for one image and the ratio of the second to the first.

    Args:
        steps: name → one optimizer step.
        prec: name of their precision in `PRECISIONS`.
        batch: number of images in a step.
        rounds: number of measurements of each step.
        device: device of the computation.
    """
    for step in steps.values():
        step()  # warm-up
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(measure(step, device))
    width = max(map(len, steps))
    for name, seconds in times.items():
        median, least = statistics.median(seconds), min(seconds)
        print(
            f"{prec:>5} {name:<{width}} {1e3 * median / batch:8.1f} ms/image (least {1e3 * least / batch:.1f}) "
            f"{batch / median:8.1f} images/s  peak {peak(steps[name], device)}"
        )
    first, second = steps
    print(f"{prec:>5} {second} / {first} = {statistics.median(times[second]) / statistics.median(times[first]):.2f}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python benchmarks/step.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", nargs="*", metavar="KEY VALUE", help="options: adaptformer False ssf_attn True")
    parser.add_argument("-d", "--data", default="imagenet_lt", help="data config (default: imagenet_lt)")
    parser.add_argument("-m", "--model", default="clip_vit_b16_peft", help="model config (default: clip_vit_b16_peft)")
    parser.add_argument(
        "--beside", metavar="MODEL", help="another model config, measured instead of the plain formulation"
    )
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="images of a step (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="times that each is measured (default: 5)")
    precisions = [name for name in PRECISIONS if name != "amp"]
    parser.add_argument(
        "--prec", nargs="+", default=["fp32"], choices=precisions, help="precisions to measure (default: fp32)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
