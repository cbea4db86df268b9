"""One pass over the images → the logits of every expert, from which everything else is computed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tailtune.datasets import View
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.trainers.distributed import to_device
from tailtune.trainers.storage.atomic_io import Damaged, Digest, write_tensors
from tailtune.trainers.storage.manifest import check_file


@dataclass(frozen=True)
class Logits:
    """Of the images that could be read, in the order of the split."""

    logits: Tensor
    """[N, E, C] fp32, or of several views [N, V, E, C]."""
    labels: Tensor
    """[N]."""
    index: Tensor
    """[N] position in the split."""
    bad_images: int = 0
    """Images of the split that could not be read when their turn came."""
    left_out: int = 0
    """Images that were known to be unreadable before, and that the split is without."""


Predict = Callable[[Tensor | list[Tensor]], Tensor]
"""Images of a batch → expert logits [B, E, C], or [B, V, E, C] of several views."""


@torch.no_grad()
def infer(
    predict: Predict, view: View, accelerator: Accelerator, batch_size: int, num_workers: int, epoch: int = 0
) -> Logits | None:
    """Run `predict` over a view, each image once whatever the number of processes.

    Args:
        epoch: which draws of a transform that is random.

    Returns:
        The logits on the first process, which alone holds them; None on the others.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = eval_loader(view, batch_size, num_workers, rank, world, epoch)
    count = len(view)
    logits: Tensor | None = None
    labels = torch.zeros(count, dtype=torch.int64)
    found = torch.zeros(count, dtype=torch.bool)
    for batch in loader:
        batch = to_device(batch, accelerator.device)
        out = predict(batch["image"]).float()
        gathered = accelerator.gather((out, batch["label"], batch["index"], batch["weight"]))
        if not accelerator.is_main_process:
            continue
        out, label, index, weight = (each.cpu() for each in gathered)
        if logits is None:
            logits = torch.zeros(count, *out.shape[1:])
        real = (index >= 0) & (weight > 0)
        logits[index[real]], labels[index[real]] = out[real], label[real]
        found[index[real]] = True
    if logits is None:
        return None
    if found.all():  # the usual case: no copy
        return Logits(logits, labels, torch.arange(count))
    index = found.nonzero().squeeze(1)
    return Logits(logits[index], labels[index], index, bad_images=count - len(index))


def rows_of(found: Logits, positions: Tensor) -> Tensor:
    """Where in `found` the images at these positions of the split are; those that could not be read are left out."""
    rows = torch.searchsorted(found.index, positions).clamp_max(len(found.index) - 1)
    return rows[found.index[rows] == positions]


LOGITS, VAL_LOGITS = "logits.safetensors", "val_logits.safetensors"
"""Files of the test and of the validation images."""


def save_logits(path: Path, found: Logits, key: dict[str, object]) -> Digest:
    """[N, E, C] as fp16 below the row maximum, which is kept in fp32; `key` says what they are logits of."""
    top = found.logits.amax(-1, keepdim=True)
    tensors = {
        "logits": (found.logits - top).clamp_min(torch.finfo(torch.float16).min).half(),
        "row_max": top.squeeze(-1),
        "labels": found.labels,
        "index": found.index,
    }
    return write_tensors(
        path, tensors, json.dumps({"key": key, "bad_images": found.bad_images, "left_out": found.left_out})
    )


def stored_logits(run_folder: Path, key: dict[str, object], name: str = LOGITS) -> tuple[Path, Logits] | None:
    """Logits that an earlier evaluation in this run's folder saved under the same key, in a file of that name."""
    for path in sorted(run_folder.glob(f"**/{name}")):
        try:
            check_file(path)
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["about"])
                if about["key"] != json.loads(json.dumps(key)):
                    continue
                logits = file.get_tensor("logits").float() + file.get_tensor("row_max").unsqueeze(-1)
                labels, index = file.get_tensor("labels"), file.get_tensor("index")
                return path, Logits(logits, labels, index, about["bad_images"], about["left_out"])
        except (Damaged, SafetensorError, OSError, ValueError, KeyError, TypeError):
            continue  # a damaged file is as good as none: the images are still there
    return None
