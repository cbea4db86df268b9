"""`micro_batch_size auto`: finds the largest number of images that fit into memory, once before training."""

import copy
import logging

import torch
from accelerate import Accelerator

from tailtune.configs.errors import UserError
from tailtune.models.backbones.encoder import trained_batch_norms
from tailtune.trainers.methods.base import Batch, Method
from tailtune.trainers.micro_batch_size import halve

log = logging.getLogger("tailtune")


def largest_micro_batch(method: Method, accelerator: Accelerator, size: int, resolution: int) -> int:
    """Reduce the number of images until forward and backward pass of a blank batch fit into memory.

    Args:
        method: the method; its running statistics of batch norms are restored.
        accelerator: device and processes.
        size: number of images to begin with.
        resolution: side of the images, in pixels.

    Returns:
        The number that fits on every process.

    Raises:
        UserError: a single image does not fit.
    """
    norms = trained_batch_norms(method)
    before = [copy.deepcopy(norm.state_dict()) for norm in norms]  # the statistics of blank images must not stay
    method.train()
    while not _fits(method, accelerator.device, size, resolution):
        if size == 1:
            raise UserError("not even one image fits into memory; choose a smaller backbone, resolution or prec bf16")
        size = halve(size)
    for norm, state in zip(norms, before, strict=True):
        norm.load_state_dict(state)
    smallest = int(accelerator.gather(torch.tensor([size], device=accelerator.device)).min())
    log.info("micro_batch_size auto: %d images at once", smallest)
    return smallest


def blank_batch(method: Method, device: torch.device, size: int, resolution: int) -> Batch:
    """A batch of black images of the first class, with all that a method takes.

    Args:
        method: the method.
        device: where the batch is made.
        size: number of images.
        resolution: side of the images, in pixels.

    Returns:
        `image` [size, 3, resolution, resolution] and more names of a batch, as `View.batch` makes it.
    """
    images = torch.zeros(size, 3, resolution, resolution, dtype=torch.uint8, device=device)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    batch: Batch = {"image": images, "label": labels, "weight": torch.ones(size, device=device)}
    if method.takes_image_pairs:
        batch |= {"partner": images, "partner_label": labels}
    if method.takes_two_views:
        batch |= {f"other_{name}": images for name in ("image", "partner") if name in batch}
    return batch


def _fits(method: Method, device: torch.device, size: int, resolution: int) -> bool:
    try:
        method(blank_batch(method, device, size, resolution)).loss_sum.backward()
    except torch.OutOfMemoryError:
        fits = False
    else:
        fits = True
    method.zero_grad(set_to_none=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fits
