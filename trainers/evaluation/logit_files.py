"""Files with the logits of an evaluation, from which later evaluations are computed."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.rows import HalfRows, slices
from tailtune.trainers.storage.atomic_io import Damaged, Digest
from tailtune.trainers.storage.manifest import check_file, manifest_of
from tailtune.trainers.storage.tensor_files import open_tensors, stream_tensors

LOGITS, VAL_LOGITS = "logits.safetensors", "val_logits.safetensors"
"""Names of the files with the logits of the test images and of the validation images."""
UNREAD: Mapping[bool, tuple[str, ...]] = MappingProxyType(
    {False: ("tte_mode", "expand", "randaug_times"), True: ("crop_margin",)}
)
"""Value of `tte` → options that do not change the logits then, although a key holds them."""


def save_logits(path: Path, found: Logits, key: dict[str, object]) -> Digest:
    """Write logits [N, E, C] to a file, a few rows at a time.

    The maximum of each row is stored in fp32, and the differences from the maximum in fp16.

    Args:
        path: the file.
        found: the logits.
        key: everything on which the logits depend, such as checkpoint, images and options.

    Returns:
        Digest of the file.
    """
    half = HalfRows.of(found.logits)
    row_max = torch.cat([half.stored(part)[1] for part in slices(half)])
    tensors = {
        "index": (found.index.dtype, found.index.shape, [found.index]),
        "labels": (found.labels.dtype, found.labels.shape, [found.labels]),
        "row_max": (row_max.dtype, row_max.shape, [row_max]),
        "logits": (torch.float16, half.shape, (half.stored(part)[0] for part in slices(half))),
    }
    about = {"key": key, "bad_images": found.bad_images, "left_out": found.left_out}
    return stream_tensors(path, tensors, json.dumps(about))


def stored_logits(run_folder: Path, key: dict[str, object], name: str = LOGITS) -> tuple[Path, Logits] | None:
    """Open the logits that an earlier evaluation of a run has saved under the same key.

    Args:
        run_folder: folder of the run; its subfolders are searched too.
        key: as in `save_logits`. Options that do not change the logits may differ.
        name: name of the file.

    Returns:
        The file and its logits, which are read from the file when they are used; None if no undamaged file has this
        key.
    """
    for path in sorted(run_folder.glob(f"**/{name}")):
        try:
            found, logits = open_logits(path)
        except Damaged:
            continue  # a damaged file is ignored, because the logits can be computed from the images again
        if _what_counts(found) == _what_counts(json.loads(json.dumps(key))):
            return path, logits
    return None


def _what_counts(key: dict[str, Any]) -> dict[str, Any]:
    """A key without the options that do not change the logits. Files keep their keys as earlier versions wrote them."""
    left_out = UNREAD[bool(key.get("tte"))]
    return {name: value for name, value in key.items() if name not in left_out}


def open_logits(path: Path) -> tuple[dict[str, Any], Logits]:
    """Open a file that `save_logits` has written. The logits are read from the file when they are used.

    Args:
        path: the file.

    Returns:
        The key under which the logits were saved, and the logits.

    Raises:
        Damaged: the file is missing or damaged.
    """
    try:
        check_file(path)
        tensors, text = open_tensors(path)
        about = json.loads(text)
        row_max, labels, index = (tensors[entry][:] for entry in ("row_max", "labels", "index"))
        logits = Logits(HalfRows(tensors["logits"], row_max), labels, index, about["bad_images"], about["left_out"])
        return about["key"], logits
    except Damaged:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(path, str(error)) from error


def checksum_of(path: Path) -> str:
    """SHA-256 of a file in a run's folder, when the run wrote it. Equal logits of equal origin have the same one."""
    manifest = manifest_of(path)
    assert manifest is not None, "logits are in the folder of a run"
    return manifest.files[path.relative_to(manifest.home).as_posix()].sha256
