"""Inference: one pass over the images gives the logits of every expert. All results are computed from these logits."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.view import View
from tailtune.trainers.storage.atomic_io import Damaged, Digest
from tailtune.trainers.storage.manifest import check_file
from tailtune.trainers.storage.tensor_files import write_tensors


@dataclass(frozen=True)
class Logits:
    """Logits of the images that could be read, in the order of the split."""

    logits: Tensor
    """Logits of each expert [N, E, C], or of each of several views [N, V, E, C]; fp32."""
    labels: Tensor
    """Label of each image [N]."""
    index: Tensor
    """Position of each image in the split [N], ascending."""
    bad_images: int = 0
    """Number of images of the split that could not be read in this pass."""
    left_out: int = 0
    """Number of images that were known to be unreadable before, so that the split does not contain them."""


Predict = Callable[[Tensor | list[Tensor]], Tensor]
"""Images of a batch → expert logits [B, E, C], or [B, V, E, C] for several views."""


@torch.no_grad()
def infer(
    predict: Predict, view: View, accelerator: Accelerator, batch_size: int, num_workers: int | None, epoch: int = 0
) -> Logits | None:
    """Run `predict` on every image of a view once. The images are divided among the processes.

    Args:
        predict: computes the logits of a batch.
        view: the images and their transform.
        accelerator: device and processes.
        batch_size: number of images that a process computes at once.
        num_workers: number of processes that decode images, for each process of the run; None chooses it.
        epoch: number that selects the random draws, if the transform is random.

    Returns:
        The logits, on the CPU of the first process; None on the other processes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    loader = eval_loader(view, batch_size, num_workers, rank, world, epoch, accelerator.device)
    count = len(view)
    logits: Tensor | None = None
    labels = torch.zeros(count, dtype=torch.int64)
    readable = torch.zeros(count, dtype=torch.bool)
    for batch in loader:
        out = predict(batch["image"]).float()
        gathered = accelerator.gather((out, batch["label"], batch["index"], batch["weight"]))
        if not accelerator.is_main_process:
            continue
        out, label, index, weight = (tensor.cpu() for tensor in gathered)
        if logits is None:
            logits = torch.zeros(count, *out.shape[1:])
        real = (index >= 0) & (weight > 0)
        logits[index[real]], labels[index[real]] = out[real], label[real]
        readable[index[real]] = True
    if logits is None:
        return None
    if readable.all():  # the usual case; it needs no copy
        return Logits(logits, labels, torch.arange(count))
    index = readable.nonzero().squeeze(1)
    return Logits(logits[index], labels[index], index, bad_images=count - len(index))


def rows_of(found: Logits, positions: Tensor) -> Tensor:
    """The rows of `found` that hold the images at some positions in the split.

    Args:
        found: logits of the images that could be read.
        positions: positions in the split [n].

    Returns:
        Row numbers, in the order of `positions`, at most n. Images that could not be read are left out.
    """
    rows = torch.searchsorted(found.index, positions).clamp_max(len(found.index) - 1)
    return rows[found.index[rows] == positions]


LOGITS, VAL_LOGITS = "logits.safetensors", "val_logits.safetensors"
"""Names of the files with the logits of the test images and of the validation images."""


def save_logits(path: Path, found: Logits, key: dict[str, object]) -> Digest:
    """Write logits [N, E, C] to a file.

    The maximum of each row is stored in fp32, and the differences from the maximum in fp16.

    Args:
        path: the file.
        found: the logits.
        key: everything on which the logits depend, such as checkpoint, images and options.

    Returns:
        Digest of the file.
    """
    row_max = found.logits.amax(-1, keepdim=True)
    tensors = {
        "logits": (found.logits - row_max).clamp_min(torch.finfo(torch.float16).min).half(),
        "row_max": row_max.squeeze(-1),
        "labels": found.labels,
        "index": found.index,
    }
    return write_tensors(
        path, tensors, json.dumps({"key": key, "bad_images": found.bad_images, "left_out": found.left_out})
    )


def stored_logits(run_folder: Path, key: dict[str, object], name: str = LOGITS) -> tuple[Path, Logits] | None:
    """Read the logits that an earlier evaluation of a run has saved under the same key.

    Args:
        run_folder: folder of the run; its subfolders are searched too.
        key: as in `save_logits`.
        name: name of the file.

    Returns:
        The file and its logits; None if no undamaged file has this key.
    """
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
            continue  # a damaged file is ignored, because the logits can be computed from the images again
    return None
