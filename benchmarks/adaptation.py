"""Compares the time of TailTune and of SADE's original procedure for test distributions with adapted expert weights.

    python benchmarks/adaptation.py                                    200 digits, ResNet-32 of three experts, minutes
    python benchmarks/adaptation.py -d cifar100_ir100 --images 10000 --workers 8 --json adaptation.json

TailTune makes one pass over the test images, and one pass over their views in each epoch. From the logits of these
passes, the expert weights of all distributions are learnt, and all distributions are evaluated. SADE makes separate
passes over the views of each distribution, and one more pass to evaluate the distribution. SADE also computes gradients
of the network, although it updates only the expert weights.

The networks have random weights. On a CPU without workers, the processor time of this process is measured, which other
processes do not change. Otherwise the wall time is measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.benchmarks.steps.device import finish
from tailtune.configs import load_configs
from tailtune.configs.option import options_from
from tailtune.datasets.build_data import build_data
from tailtune.datasets.data_bundle import DataBundle, TestDistribution
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.models import resolve
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.evaluation.distributions import plain_results
from tailtune.trainers.evaluation.expert_weights import Learner, Recipe, adapt
from tailtune.trainers.evaluation.inference import Logits, infer, rows_of
from tailtune.trainers.evaluation.metrics import evaluate
from tailtune.trainers.evaluation.tta import plain, separate
from tailtune.trainers.methods import Method
from tailtune.trainers.option_schema import declared
from tailtune.trainers.runs.load_run import make_method
from tailtune.trainers.runs.metrics_file import hardware
from tailtune.trainers.storage.atomic_io import write_json

EVALUATION = ["pretrained", "none", "test_dists", "all", "adapt", "sade"]


class Clock:
    """Measures the time of each kind of work, in seconds.

    Args:
        wall: True for wall time, False for the processor time of this process.
    """

    def __init__(self, wall: bool) -> None:
        self.seconds: dict[str, float] = {}
        self.now = time.perf_counter if wall else time.process_time

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        """Call a function, add its time to the total of its kind, and return its result.

        Args:
            name: kind of the work.
            work: the function.
        """
        start = self.now()
        outcome = work()
        finish()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start
        return outcome


def ours(
    cfg: CfgNode,
    method: Method,
    data: DataBundle,
    shifts: Sequence[TestDistribution],
    accelerator: Accelerator,
    clock: Clock,
) -> None:
    """Run TailTune's procedure for all distributions. The clock measures `images`, `views` and `all`."""
    groups = data.info.groups

    def one_pass(predict: Any, view: Any, epoch: int = 0) -> Logits | None:
        return infer(predict, view, accelerator, cfg.test_batch_size, cfg.num_workers, epoch)

    def evaluation() -> None:
        logits = clock("images", lambda: one_pass(plain(method), data.test))
        plain_results(logits, shifts, groups)

        def views(epoch: int) -> Logits | None:
            return clock("views", lambda: one_pass(separate(method), data.test_views, epoch))

        learners = adapt(Learner, options_from(Recipe, cfg, cfg.adapt), logits, shifts, views, accelerator)
        for learner in learners.values():
            predictions, positions = learner.predictions()
            evaluate(predictions, logits.labels[rows_of(logits, positions)], groups)

    clock("all", evaluation)


def original(cfg: CfgNode, method: Method, data: DataBundle, shift: TestDistribution, device: torch.device) -> None:
    """Run the procedure of SADE's test_training_cifar.py for one distribution."""
    views, images = (view.take(shift.positions.numpy()) for view in (data.test_views, data.test))
    options: dict[str, Any] = {"num_workers": cfg.num_workers, "collate_fn": _unchanged}
    weights = torch.full((cfg.num_experts,), 1 / cfg.num_experts, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weights], cfg.adapt_lr, 0.9, weight_decay=cfg.adapt_weight_decay, nesterov=True)
    for _ in range(cfg.adapt_epochs):
        for batch in DataLoader(views, cfg.adapt_batch_size, shuffle=True, **options):
            pair = batch["image"].to(device)
            first, second = (_mixed(method.expert_logits(pair[:, view]), weights) for view in (0, 1))
            similarity = F.cosine_similarity(first.softmax(1), second.softmax(1), dim=1, eps=1e-6).mean()
            optimizer.zero_grad()
            (-similarity).backward()
            optimizer.step()
        if (weights.softmax(0).detach().cpu().numpy().round(2) < 0.05).any():
            break
    batches = []
    with torch.no_grad():
        for batch in DataLoader(images, cfg.adapt_batch_size, **options):
            logits = method.expert_logits(batch["image"].to(device))
            batches.append((_mixed(logits, weights).cpu(), batch["label"]))
    logits, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    evaluate(logits, labels, data.info.groups)


def _unchanged(batch: dict[str, Any]) -> dict[str, Any]:
    """A view already gives batches."""
    return batch


def _mixed(logits: Tensor, weights: Tensor) -> Tensor:
    """Combine the experts' logits [B, E, C] to logits [B, C], weighted by the softmax of the weights [E]."""
    return (weights.softmax(0).view(1, -1, 1) * logits).sum(1)


def main() -> None:
    """Measure both procedures and print the figures as JSON."""
    args = _parser().parse_args()
    words = [*EVALUATION, "max_test_images", str(args.images), "num_workers", str(args.workers), *args.pairs]
    cfg = resolve(load_configs(args.data, args.model, words, declared())[-1])
    accelerator, data = make_accelerator(Devices.of(cfg)), build_data(cfg)
    method = make_method(cfg, data.info).to(accelerator.device).eval()
    clock = Clock(wall=accelerator.device.type == "cuda" or args.workers > 0)
    plain(method)(next(iter(eval_loader(data.test, 8, 0)))["image"].to(accelerator.device))  # warm-up
    ours(cfg, method, data, data.test_distributions, accelerator, clock)
    method.requires_grad_(True)  # as in the original code
    for shift in data.test_distributions:
        clock("original", partial(original, cfg, method, data, shift, accelerator.device))
    figures = {
        "data": args.data,
        "backbone": cfg.backbone,
        "experts": cfg.num_experts,
        "epochs": cfg.adapt_epochs,
        "images": len(data.test),
        "distributions": len(data.test_distributions),
        "hardware": hardware(),
        "torch": torch.__version__,
        "seconds": clock.seconds,
        "all / views": clock.seconds["all"] / clock.seconds["views"],
        "original / all": clock.seconds["original"] / clock.seconds["all"],
    }
    print(json.dumps(figures, indent=1))
    if args.json:
        write_json(args.json, figures)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", metavar="KEY VALUE", help="options: num_experts 4")
    parser.add_argument("-d", "--data", default="digits_lt", help="data config")
    parser.add_argument("-m", "--model", default="resnet32_sade", help="model config of a network with experts")
    parser.add_argument("--images", type=int, default=200, metavar="N", help="number of test images")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="worker processes of the data loaders")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures into this file too")
    return parser


if __name__ == "__main__":
    main()
