"""Cost of evaluating shifted test distributions with adapted expert weights, beside the original's procedure.

    python benchmarks/adaptation.py                                    200 digits, ResNet-32 of three experts, minutes
    python benchmarks/adaptation.py -d cifar100_ir100 --images 10000 --workers 8 --json adaptation.json

Ours: one pass over the test images, one over their views for each epoch, from whose logits every distribution is
evaluated and learns its weights. SADE's: for each distribution its own loader and its own passes over its own views,
through a network whose gradients are computed although only the weights are stepped; then a pass to evaluate it. Random
weights. On a CPU without workers the time is process CPU time (other processes do not enter), else wall time.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

sys.path.insert(0, str(Path(__file__).parent.parent))

from tailtune.configs import load_configs
from tailtune.datasets import DataBundle, build_data
from tailtune.datasets.data_bundle import Shift
from tailtune.datasets.loading.data_loader import collate, eval_loader
from tailtune.models import resolve
from tailtune.trainers.distributed import Devices, make_accelerator, to_device
from tailtune.trainers.evaluation.distributions import plain_results
from tailtune.trainers.evaluation.expert_weights import ADAPTS, Recipe, adapt
from tailtune.trainers.evaluation.inference import Logits, infer
from tailtune.trainers.evaluation.metrics import evaluate
from tailtune.trainers.evaluation.tta import plain, separate
from tailtune.trainers.methods import Method, declared
from tailtune.trainers.runs.load_run import make_method
from tailtune.trainers.runs.report import hardware
from tailtune.trainers.storage.atomic_io import write_json

EVALUATION = ["pretrained", "none", "test_dists", "all", "adapt", "sade"]


class Clock:
    """Seconds spent in each kind of work."""

    def __init__(self, wall: bool) -> None:
        self.seconds: dict[str, float] = {}
        self.now = time.perf_counter if wall else time.process_time

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        start = self.now()
        outcome = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start
        return outcome


def ours(
    cfg: CfgNode, method: Method, data: DataBundle, shifts: Sequence[Shift], accelerator: Accelerator, clock: Clock
) -> None:
    """All distributions; tells the clock of the passes over images and views, and of all."""
    groups = data.info.groups

    def once(predict: Any, view: Any, epoch: int = 0) -> Logits | None:
        return infer(predict, view, accelerator, cfg.test_batch_size, cfg.num_workers, epoch)

    def evaluation() -> None:
        found = clock("images", lambda: once(plain(method), data.test))
        plain_results(found, shifts, groups)

        def passes(epoch: int) -> Logits | None:
            return clock("views", lambda: once(separate(method), data.test_views, epoch))

        learnt = adapt(ADAPTS[cfg.adapt], Recipe.of(cfg), found, shifts, passes, accelerator)
        for learner in learnt.values():
            evaluate(*learner.predictions(), groups)

    clock("all", evaluation)


def original(cfg: CfgNode, method: Method, data: DataBundle, shift: Shift, device: torch.device) -> None:
    """One distribution as SADE's test_training_cifar.py does it."""
    views, images = (view.take(shift.positions.numpy()) for view in (data.test_views, data.test))
    options: dict[str, Any] = {"num_workers": cfg.num_workers, "collate_fn": collate}
    weights = torch.full((cfg.num_experts,), 1 / cfg.num_experts, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weights], cfg.adapt_lr, 0.9, weight_decay=cfg.adapt_weight_decay, nesterov=True)
    for _ in range(cfg.adapt_epochs):
        for batch in DataLoader(views, cfg.adapt_batch_size, shuffle=True, **options):
            pair = to_device(batch, device)["image"]
            first, second = (_mixed(method.expert_logits(pair[:, view]), weights) for view in (0, 1))
            similarity = F.cosine_similarity(first.softmax(1), second.softmax(1), dim=1, eps=1e-6).mean()
            optimizer.zero_grad()
            (-similarity).backward()
            optimizer.step()
        if (weights.softmax(0).detach().cpu().numpy().round(2) < 0.05).any():
            break
    with torch.no_grad():
        found = []
        for batch in DataLoader(images, cfg.adapt_batch_size, **options):
            batch = to_device(batch, device)
            found.append((_mixed(method.expert_logits(batch["image"]), weights).cpu(), batch["label"].cpu()))
    logits, labels = (torch.cat(each) for each in zip(*found, strict=True))
    evaluate(logits, labels, data.info.groups)


def _mixed(logits: Tensor, weights: Tensor) -> Tensor:
    return (weights.softmax(0).view(1, -1, 1) * logits).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="*", help="options such as: num_experts 4")
    parser.add_argument("-d", "--data", default="digits_lt")
    parser.add_argument("-m", "--model", default="resnet32_sade")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    args = parser.parse_args()
    words = [*EVALUATION, "max_test_images", str(args.images), "num_workers", str(args.workers), *args.pairs]
    cfg = resolve(load_configs(args.data, args.model, words, declared())[-1])
    accelerator, data = make_accelerator(Devices.of(cfg)), build_data(cfg)
    method = make_method(cfg, data.info).to(accelerator.device).eval()
    clock = Clock(wall=accelerator.device.type == "cuda" or args.workers > 0)
    plain(method)(next(iter(eval_loader(data.test, 8, 0)))["image"].to(accelerator.device))  # warm-up
    ours(cfg, method, data, data.shifts, accelerator, clock)
    method.requires_grad_(True)  # as the original leaves it
    for shift in data.shifts:
        clock("original", lambda shift=shift: original(cfg, method, data, shift, accelerator.device))
    figures = {
        **{"data": args.data, "backbone": cfg.backbone, "experts": cfg.num_experts, "epochs": cfg.adapt_epochs},
        **{
            "images": len(data.test),
            "distributions": len(data.shifts),
            "hardware": hardware(),
            "torch": torch.__version__,
        },
        **{"seconds": clock.seconds},
        "all / views": clock.seconds["all"] / clock.seconds["views"],
        "original / all": clock.seconds["original"] / clock.seconds["all"],
    }
    print(json.dumps(figures, indent=1))
    if args.json:
        write_json(args.json, figures)


if __name__ == "__main__":
    main()
