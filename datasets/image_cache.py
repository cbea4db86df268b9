"""Keeps the training images of a run in memory or on disk after they have been decoded, for the option `cache`.

What is kept is an image after `TensorTransform.prepare`, so it is resized if no random crop comes first. The batches
are the same as without a cache.
"""

import logging
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from tailtune.configs.atomic_file import atomic_file
from tailtune.configs.errors import UserError
from tailtune.configs.machine import LARGEST_SHARE, free_memory, local_processes
from tailtune.datasets.image_identity import described, image_digest
from tailtune.datasets.images.ordered_map import ordered_map
from tailtune.datasets.images.tensor_transforms import TensorTransform
from tailtune.datasets.sources.named_source import BadImage
from tailtune.datasets.view import View

FORMAT = 1
SAMPLED = 64
"""Images by which the size of the whole cache is estimated."""
BLOCK_BYTES = 1 << 26
"""Images in memory are kept in blocks of this size, because a block cannot grow in place."""

log = logging.getLogger("tailtune")


@dataclass
class KeptImages:
    """Images of a view after `TensorTransform.prepare`."""

    blocks: list[Tensor]
    """Pixels of many images each, uint8 [n]. Forked workers share them, because nobody writes to them."""
    places: np.ndarray
    """Block, first byte in it, height and width of each image, int64 [N, 4]; height 0 for an unreadable image."""

    def __post_init__(self) -> None:
        height, width = self.places[0, 2:]
        same = len(self.blocks) == 1 and height and bool((self.places[:, 2:] == (height, width)).all())
        size = 3 * height * width * len(self.places)
        self._stack = self.blocks[0][:size].view(-1, 3, height, width) if same else None

    def stack(self) -> Tensor | None:
        """As `Prepared.stack`."""
        return self._stack

    def image(self, index: int) -> Tensor | None:
        """As `Prepared.image`."""
        block, start, height, width = self.places[index]
        if not height:
            return None
        return self.blocks[block][start : start + 3 * height * width].view(3, height, width)


def keep_images(view: View, where: str, folder: Path) -> None:
    """Let a view read its images from a cache, which is filled if it does not exist.

    If there is no room for the images, a warning says so, and they are not kept.

    Args:
        view: the images. Its transform works on tensors; see `check_cache`.
        where: `ram` or `disk`.
        folder: folder of the caches on disk, which several runs share.

    Raises:
        UserError: the folder cannot be written, or a cache in it is damaged.
    """
    images = _Images(view)
    view.prepared = _in_memory(images) if where == "ram" else _on_disk(images, folder)


class _Images:
    """The prepared images of a view."""

    def __init__(self, view: View) -> None:
        assert isinstance(view.transform, TensorTransform)
        self.view, self.prepare = view, view.transform.prepare

    def __len__(self) -> int:
        return len(self.view)

    def prepared(self, index: int) -> Tensor | None:
        """uint8 [3, H, W]; None for an unreadable image."""
        source, position = self.view.source, int(self.view.indices[index])
        try:
            pixels = source.pixels(position, source.open(position))
        except BadImage:
            return None
        return self.prepare(pixels[None])[0]

    def all(self) -> Iterator[Tensor | None]:
        """Every prepared image in its order."""
        description = "decoding the training images for the cache"
        return ordered_map(self.prepared, len(self), description, per_task=1)  # a photograph may take 100 MB

    def sizes(self) -> list[int]:
        """Bytes of some of the prepared images."""
        chosen = np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int)
        return [image.numel() for index in chosen if (image := self.prepared(int(index))) is not None]

    @property
    def key(self) -> str:
        """Changes when the images, what is made of them, or the libraries that decode them change."""
        return image_digest(self.view, FORMAT, described(self.prepare))


def _in_memory(images: _Images) -> KeptImages | None:
    """Each process of a run has a cache of its own."""
    sizes, free = images.sizes(), free_memory() / local_processes()
    if not sizes or not _fits("ram", float(np.mean(sizes)) * len(images), free):
        return None
    # One block if all have the same size, so that a batch can be taken out of it at once.
    capacity = sizes[0] * len(images) if len(set(sizes)) == 1 else max(BLOCK_BYTES, *sizes)
    places = np.zeros((len(images), 4), dtype=np.int64)
    blocks: list[Tensor] = []
    filled, kept = 0, 0
    for index, image in enumerate(images.all()):
        if image is None:
            continue
        if not blocks or filled + image.numel() > len(blocks[-1]):
            blocks.append(torch.empty(max(capacity, image.numel()), dtype=torch.uint8))
            filled = 0
        blocks[-1][filled : filled + image.numel()] = image.flatten()
        places[index] = len(blocks) - 1, filled, *image.shape[1:]
        filled, kept = filled + image.numel(), kept + image.numel()
        if kept > LARGEST_SHARE * free and not _fits("ram", kept * len(images) / (index + 1), free):
            return None
    log.info("cache ram: %s images in %.1f MB", f"{len(images):,}", kept / 1e6)
    return KeptImages(blocks, places)


def _on_disk(images: _Images, folder: Path) -> KeptImages | None:
    pixels = folder / f"{images.key}.pixels"
    index = pixels.with_suffix(".npy")
    try:
        if not (pixels.exists() and index.exists()):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(pixels.with_suffix(".lock")):
                if not (pixels.exists() and index.exists()) and not _fill(images, pixels, index):
                    return None
    except OSError as error:
        reason = error.strerror or error
        remedy = "choose another `cache_dir`, or leave `cache` out"
        raise UserError(f"cache disk: cannot write to {folder} ({reason}): {remedy}") from error
    return _stored(images, pixels, index)


def _fill(images: _Images, pixels: Path, index: Path) -> bool:
    """Write a cache, the index last. False if there is no room."""
    sizes, free = images.sizes(), shutil.disk_usage(pixels.parent).free
    if not sizes or not _fits("disk", float(np.mean(sizes)) * len(images), free):
        return False
    for path in (pixels, index):  # of a process that was killed; the lock says that no other one writes now
        for left in pixels.parent.glob(f".{path.name}.*.tmp"):
            left.unlink()
    places = np.zeros((len(images), 4), dtype=np.int64)
    with atomic_file(pixels) as file:
        for number, image in enumerate(images.all()):
            if image is not None:
                places[number] = 0, file.tell(), *image.shape[1:]
                file.write(image.contiguous().numpy().data)
    with atomic_file(index) as file:
        np.save(file, places)
    return True


def _stored(images: _Images, pixels: Path, index: Path) -> KeptImages | None:
    try:
        places = np.load(index)
        size = int((3 * places[:, 2] * places[:, 3]).sum())
        if len(places) != len(images) or pixels.stat().st_size != size:
            raise ValueError
    except (OSError, ValueError, EOFError) as error:
        problem = f"cannot be read ({error.strerror})" if isinstance(error, OSError) else "is damaged"
        raise UserError(f"cache disk: {pixels} or its .npy file {problem}: delete both") from None
    log.info("cache disk: %s images in %s, %.1f MB", f"{len(images):,}", pixels, size / 1e6)
    return KeptImages([mapped_file(pixels)], places) if size else None


def mapped_file(path: Path) -> Tensor:
    """The bytes of a file as a tensor that must not be changed, uint8 [n]. They are read when they are used.

    Linux refuses `torch.from_file` for a file that is larger than the memory, because its pages could be changed.

    Args:
        path: a file that is not empty.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r"))


def _fits(where: str, needed: float, free: float) -> bool:
    """Whether so many bytes fit; a warning says if they do not."""
    if needed <= LARGEST_SHARE * free:
        return True
    log.warning(
        "warning: cache %s: the decoded training images take about %.1f GB, and %.1f GB are free: each epoch decodes "
        "them again",
        where,
        needed / 1e9,
        free / 1e9,
    )
    return False
