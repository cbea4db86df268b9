"""`weight_digest`: a digest of the weights of a model, in which unchanged tensors are hashed once."""

import hashlib
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

ROW = 4096
"""Number of bytes of a row whose sum is compared."""
_known: WeakKeyDictionary[object, dict[str, tuple[bytes, str]]] = WeakKeyDictionary()
"""Model → name of a tensor → its sums, and its digest."""


def weight_digest(model: object, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, types, shapes and values of tensors.

    A tensor is hashed again if its sums have changed. They cost a fraction of the hash, and on a GPU the tensor stays
    where it is. Counters of torch (`Tensor._version`) would cost nothing, but do not see what is written by way of
    `Tensor.data`.

    Args:
        model: the model that has the tensors.
        tensors: names, which differ, and tensors.
    """
    digest, known = hashlib.sha256(), _known.setdefault(model, {})
    for name, tensor in sorted(tensors, key=lambda each: each[0]):
        values = tensor.detach().contiguous().view(-1).view(torch.uint8)
        sums = _sums(values)
        if name not in known or known[name][0] != sums:
            known[name] = sums, value_hash(values)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {known[name][1]}".encode())
    return digest.hexdigest()


def value_hash(values: Tensor) -> str:
    """SHA-256 of bytes [n]."""
    return hashlib.sha256(values.cpu().numpy().data).hexdigest()


def _sums(values: Tensor) -> bytes:
    """Sums over rows and over columns of bytes [n], in words of 8 bytes.

    One changed word changes two of them. Words that change places, or several changed words, leave all as they are only
    if the differences cancel in each row and in each column.
    """
    whole = len(values) // ROW * ROW
    aligned = values if values.storage_offset() % 8 == 0 else values.clone()
    words = aligned[:whole].view(torch.int64).view(-1, ROW // 8)
    parts = (words.sum(0), words.sum(1), values[whole:])
    return hashlib.sha256(b"".join(each.cpu().numpy().tobytes() for each in parts)).digest()
