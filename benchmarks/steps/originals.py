"""The training loops of the original codes with one batch again and again.

`python -m tailtune.benchmarks.steps.originals JSON`, in a checkout of LIFT, SADE, RIDE, DirMixE or H2T. Nothing of an
original is changed on disk. Its data loader is replaced in memory, and so is what cannot run without CUDA or with a new
PyTorch. bf16 is the original below autocast, because none of them has a bf16 mode of its own; amp is LIFT's own mode
for CUDA. The batch is on the device, so that no side pays for copying it.
"""

import importlib
import json
import pathlib
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np
import torch
from torch import nn

from tailtune.benchmarks.steps.clock import Clock
from tailtune.benchmarks.steps.device import device

VIT_B_16: dict[str, Any] = {
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 16,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_heads": 8,
    "transformer_layers": 12,
}


def main(row: dict[str, Any]) -> None:
    """Train until standard input ends.

    Args:
        row: `original`: an entry of `LOOPS`; `settings`: what its function takes; `counts`: training images of each
            class; `batch`, `prec`, `side`: images of a step, their precision and their size in pixels.
    """
    clock = Clock()
    without_cuda()
    images = torch.randn(row["batch"], 3, row["side"], row["side"], device=device())
    batch = images, torch.arange(row["batch"], device=device()) % len(row["counts"])
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if row["prec"] == "bf16":
            stack.enter_context(torch.autocast(device().type, torch.bfloat16))
        LOOPS[row["original"]](row, Endless(clock, batch, row["counts"]), Path(folder))


class Endless:
    """In place of a data loader: gives the batch of a clock for ever. It has what the originals ask a loader for."""

    dataset, n_samples = range(10**7), 1

    def __init__(self, clock: Clock, batch: Any, counts: list[int]) -> None:
        self.clock, self.batch, self.cls_num_list = clock, batch, counts
        self.batch_size = len(batch[1])

    def __iter__(self) -> Iterator[Any]:
        return self.clock.batches(self.batch)

    def __len__(self) -> int:
        return 10_000

    def split_validation(self) -> None:
        return None


def without_cuda() -> None:
    """Let `cuda()` leave its object where it is; use stand-ins for packages that only log."""
    if not torch.cuda.is_available():
        torch.Tensor.cuda = nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.uint8 = torch.bool  # masks, which today's PyTorch wants to be boolean
    for name in ("pandas", "higher", "h5py"):
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None))
    sys.modules["pathlib2"] = pathlib


def lift(row: dict[str, Any], loader: Endless, folder: Path) -> None:
    """LIFT's `Trainer.train` on a random CLIP ViT-B/16; `settings`: its options."""
    trainer: Any = importlib.import_module("trainer")
    clip: Any = importlib.import_module("clip.model")
    cfg = importlib.import_module("utils.config")._C.clone()
    cfg.merge_from_list([part for pair in row["settings"].items() for part in pair])
    cfg.backbone, cfg.num_epochs, cfg.output_dir = "CLIP-ViT-B/16", 1, str(folder)
    cfg.prec = "amp" if row["prec"] == "amp" else "fp32"
    cfg.gpu = 0 if device().type == "cuda" else None  # otherwise it uses all of them
    cfg.batch_size = cfg.micro_batch_size = row["batch"]
    trainer.load_clip_to_cpu = lambda *_: clip.CLIP(**VIT_B_16).float().eval()

    class Run(trainer.Trainer):
        def build_data_loader(self) -> None:
            self.cls_num_list, self.accum_step, self.num_classes = row["counts"], 1, len(row["counts"])
            self.classnames = [f"class {number}" for number in range(self.num_classes)]
            self.train_loader = loader
            self.many_idxs, self.med_idxs, self.few_idxs = np.array_split(np.arange(self.num_classes), 3)

        def init_head_text_feat(self) -> None:
            return None

    Run(cfg).train()


def pytorch_template(row: dict[str, Any], loader: Endless, folder: Path) -> None:
    """`main` of RIDE, SADE and DirMixE; `settings`: its `config` file, and what is changed in it."""
    script: Any = importlib.import_module("train")
    config = importlib.import_module("utils").read_json(Path("configs") / row["settings"]["config"])
    config["n_gpu"], config["trainer"]["save_dir"] = 1, str(folder)
    parsed = importlib.import_module("parse_config").ConfigParser(config, None, row["settings"]["change"], run_id="")
    script.module_data = SimpleNamespace(**{config["data_loader"]["type"]: lambda **_: loader})
    script.main(parsed)


def h2t(row: dict[str, Any], loader: Endless, folder: Path) -> None:
    """`main_worker` of H2T's first stage, of commit f96309a (the next one fails); `settings`: its `config` file."""
    logger: Any = importlib.import_module("utils.logger")
    config = logger._C.clone()
    config.set_new_allowed(True)
    logger.update_config(config, Namespace(cfg=row["settings"]["config"], opts=[]))
    config.resume = ""
    loader.batch = *loader.batch, torch.arange(row["batch"])
    script: Any = importlib.import_module("train_stage1")
    counts = row["counts"]
    data = SimpleNamespace(train_instance=loader, eval=None, cls_num_list=counts, dist_sampler=None)
    with patch.object(script, "CIFAR100_LT", lambda *_, **__: data):
        script.main_worker(None, 0, config, MagicMock(), str(folder))


LOOPS: dict[str, Callable[[dict[str, Any], Endless, Path], None]] = {
    "lift": lift,
    "sade": pytorch_template,
    "ride": pytorch_template,
    "dirmixe": pytorch_template,
    "h2t": h2t,
}
"""Original → its training loop."""

if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
