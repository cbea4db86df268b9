"""`lazy_module`: a library that is imported when it is first used, because its import takes a second or more."""

from importlib import import_module
from types import ModuleType
from typing import Any


class _LazyModule(ModuleType):
    """Stands for a module until one of its attributes is needed."""

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # Python asks for `__path__`, `__wrapped__` and others without using the module
            raise AttributeError(attribute)
        return getattr(import_module(self.__name__), attribute)


def lazy_module(name: str) -> Any:
    """A stand-in for a module. The module is imported as soon as an attribute of the stand-in is read.

    Use it for torchvision, timm and open_clip, whose imports take longer than all other work of a short command:
    `timm = lazy_module("timm")`. An annotation of a function must be quoted if it names such a module, because Python
    reads it when the function is defined.

    Args:
        name: full name of the module.
    """
    return _LazyModule(name)
