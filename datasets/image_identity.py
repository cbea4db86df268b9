"""Keys of caches: digests of the images of a view, and descriptions of what is made of them."""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version

import PIL

from tailtune.configs.lazy_module import lazy_module
from tailtune.datasets.images.tensor_transforms import TensorTransform
from tailtune.datasets.sources.named_source import NamedSource
from tailtune.datasets.view import View

v2 = lazy_module("torchvision.transforms.v2")


def image_digest(view: View, number: int, made_by: Sequence[object], content: bool = False) -> str:
    """A digest that changes when the images of a view, what is made of them, or the libraries that decode them change.

    Args:
        view: the images.
        number: format of the cache.
        made_by: what is made of an image, as numbers and texts.
        content: read all files, in place of looking at their sizes and times.
    """
    libraries = [PIL.__version__, version("torch"), version("torchvision")]  # torch resizes
    digest = hashlib.blake2b(json.dumps([number, *libraries, made_by, len(view)]).encode(), digest_size=12)
    source = view.source
    stamp = source.sha256 if content and isinstance(source, NamedSource) else source.stamp
    for position in view.indices.tolist():
        digest.update(stamp(position).encode(errors="surrogateescape") + b"\n")
    return digest.hexdigest()


def described(function: object) -> list[object]:
    """The name and the arguments of a function of tensor_transforms.py."""
    if isinstance(function, partial):
        return [function.func.__name__, *map(repr, function.args), sorted(function.keywords.items())]
    return [getattr(function, "__name__", repr(function))]


def without_draws(view: View) -> list[object] | None:
    """What the transform of a view does, as numbers and texts; None if it draws random numbers."""
    transform = view.transform
    if isinstance(transform, TensorTransform):
        return None if transform.cut or transform.finish else described(transform.prepare)
    fixed = (v2.Resize, v2.CenterCrop, v2.PILToTensor)
    steps = transform.transforms if isinstance(transform, v2.Compose) else [transform]
    return [*map(repr, steps)] if all(isinstance(step, fixed) for step in steps) else None
