"""A method whose classifier no longer needs the text tower: for exports, which hold images and a classifier."""

import copy

from tailtune.models import ClassificationModel
from tailtune.models.text_mode import with_fixed_texts
from tailtune.trainers.methods.base import Method


def with_texts_as_weights(method: Method) -> Method:
    """The same method, with text features as the weight of its classifier; itself if it has no text tower.

    Args:
        method: the method; it stays as it is, and shares all other tensors with the result.
    """
    return method if method.model.text is None else _with_model(method, with_fixed_texts(method.model))


def _with_model(method: Method, model: ClassificationModel) -> Method:
    """A copy of a method, and of those that it wraps, around another model."""
    other = copy.copy(method)
    other._modules = {
        name: _with_model(module, model) if isinstance(module, Method) else module
        for name, module in method._modules.items()
    }
    other._modules["model"] = model
    return other
