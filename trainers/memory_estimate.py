"""Estimate of the memory of training, from a method on the meta device, without images, weights or a GPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.trainers.methods import Method
from tailtune.trainers.methods.base import Batch
from tailtune.trainers.precision import PRECISIONS, cast_trainable

FEW, MANY = 2, 4
"""Numbers of images of two steps. The difference of their memory gives the memory of one image."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one process holds. The workspace of single kernels and of the allocator comes on top."""

    parameters: int
    gradients: int
    optimizer: int
    """State of the optimizer."""
    image: int | None
    """Activations that the backward pass needs of one image; None where they cannot be counted without numbers. With
    `grad_checkpoint`, those of the largest block are among them."""
    texts: int = 0
    """Activations that the backward pass needs of the texts of all classes, whatever the number of images."""

    def total(self, micro_batch_size: int) -> int:
        """Bytes in all, with `micro_batch_size` images at once."""
        of_images = (self.image or 0) * micro_batch_size
        return self.parameters + self.gradients + self.optimizer + of_images + self.texts


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Counts the bytes that autograd saves for the backward pass: unique storages, without weights and buffers.

    Args:
        module: the module whose weights and buffers are not counted.
        beside: further tensors that are not counted.
    """

    def __init__(self, module: nn.Module, beside: Sequence[Tensor] = ()) -> None:
        known = {_storage(tensor) for tensor in [*module.parameters(), *module.buffers(), *beside]}
        self.kept: dict[int, torch.UntypedStorage] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in known:
                self.kept[_storage(tensor)] = tensor.untyped_storage()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self.kept.values())


def _storage(tensor: Tensor) -> int:
    """An identity of a tensor's storage that also works on the meta device, where storages have no addresses."""
    return int(tensor.untyped_storage()._cdata)


def as_on_a_gpu(method: Method, prec: str, residual: torch.dtype | None) -> Method:
    """Move a method to the meta device, in the arithmetic of training on a GPU.

    Autocast does not support the meta device. A network that runs as a whole is therefore counted in fp32, which
    overestimates its memory.
    """
    precision = PRECISIONS["fp32" if isinstance(method.model.encoder, WholeNetworkEncoder) else prec]
    with torch.device("meta"):
        method.to("meta")
        method.model.set_precision(precision.compute, residual)
        cast_trainable(method, precision.trainable)
    return method.train()


@torch.library.impl("aten::scaled_dot_product_attention", "AutogradMeta")
def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention on the meta device as a GPU computes it: fused, so that no products of queries and keys are saved.

    Torch itself has no fused kernel for the meta device, and would count one that saves them. Arguments and result are
    those of `torch.nn.functional.scaled_dot_product_attention`.
    """
    given = (dropout_p, is_causal)
    if query.dim() != 4 or enable_gqa:  # the fused kernel takes neither
        whole = torch.ops.aten._scaled_dot_product_attention_math
        return whole(query, key, value, attn_mask, *given, scale=scale, enable_gqa=enable_gqa)[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    return fused(query, key, value, attn_mask, True, *given, scale=scale)[0]


def training_memory(method: Method, resolution: int, copies: int, beside: Sequence[nn.Module] = ()) -> TrainingMemory:
    """The memory of training a method.

    Args:
        method: the method on the meta device, as `as_on_a_gpu` returns it.
        resolution: side of the images, in pixels.
        copies: number of state tensors that the optimizer keeps for each parameter.
        beside: modules that the method uses but that are not submodules, such as a teacher.
    """
    weights = [weight for module in (method, *beside) for weight in module.parameters()]
    trained = 4 * sum(weight.numel() for weight in method.parameters() if weight.requires_grad)
    parameters = sum(weight.numel() * weight.element_size() for weight in weights)
    image = _of_image(method, resolution) if trained else 0
    return TrainingMemory(parameters, trained, copies * trained, image, _of_texts(method))


def _of_texts(method: Method) -> int:
    """Bytes that are kept of the texts, and those of the largest batch that is computed again."""
    tower = method.model.text
    if tower is None or not tower.trains:
        return 0
    keeps = SavedBytes(method)
    with torch.device("meta"), keeps:
        tower.class_features()
    return keeps.total + tower.largest_again


class LargestPart:
    """Runs the parts of an encoder as `computed_again` does in the backward pass, and counts what the largest saves.

    Args:
        method: the method, whose weights and buffers are not counted.
    """

    def __init__(self, method: Method) -> None:
        self.method, self.total = method, 0

    def __call__(self, run: Callable[..., Any], modules: Sequence[nn.Module], *inputs: Tensor) -> Any:
        keeps = SavedBytes(self.method, inputs)
        with keeps:
            result = run(*inputs)
        self.total = max(self.total, keeps.total)
        return result


def _of_image(method: Method, resolution: int) -> int | None:
    try:
        few, many = (saved(method, resolution, count) for count in (FEW, MANY))
    except RuntimeError as error:
        if not _needs_values(error):
            raise
        return None
    return (many - few) // (MANY - FEW)


def _needs_values(error: RuntimeError) -> bool:
    """Whether a method needs what the meta device does not have; LoHa, LoKr, SHiRA and WaveFT of peft do."""
    return isinstance(error, NotImplementedError) or "cannot be called on meta tensors" in str(error)


def saved(method: Method, resolution: int, count: int) -> int:
    """Bytes that a step of `count` images saves for its backward pass, with those of the largest block computed again.

    Args:
        method: the method on the meta device.
        resolution: side of the images, in pixels.
        count: number of images.
    """
    total, encoder = _kept(method, resolution, count), method.model.encoder
    if encoder.run_part is None:
        return total
    largest, before = LargestPart(method), encoder.run_part
    encoder.run_part = largest
    try:
        _kept(method, resolution, count)
    finally:
        encoder.run_part = before
    return total + largest.total


def _kept(method: Method, resolution: int, count: int) -> int:
    """Bytes that stay from the forward pass of `count` images until the backward pass."""
    keeps = SavedBytes(method)
    with torch.device("meta"), keeps:
        step = method(blank_batch(method, torch.device("meta"), count, resolution))
    assert step.loss_sum.requires_grad
    return keeps.total


def blank_batch(method: Method, device: torch.device, size: int, resolution: int) -> Batch:
    """A batch of black images of the first class, with all that a method takes.

    Args:
        method: the method.
        device: where the batch is made; the meta device, too.
        size: number of images.
        resolution: side of the images, in pixels.

    Returns:
        `image` [size, 3, resolution, resolution] and more names of a batch, as `View.batch` makes it.
    """
    images = torch.zeros(size, 3, resolution, resolution, dtype=torch.uint8, device=device)
    labels = torch.zeros(size, dtype=torch.int64, device=device)
    batch: Batch = {"image": images, "label": labels, "index": labels, "weight": torch.ones(size, device=device)}
    if method.takes_image_pairs:
        batch |= {"partner": images, "partner_label": labels}
    if method.takes_two_views:
        batch |= {f"other_{name}": images for name in ("image", "partner") if name in batch}
    return batch
