"""Parts of open_clip that need no other part of it: importing the whole package takes longer than a small run."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from torch import Tensor


def tokenize(context_length: int, sentences: Sequence[str]) -> Tensor:
    """Tokenize sentences by CLIP's tokenizer. It is loaded when first used, because its vocabulary takes a while.

    Args:
        context_length: number of tokens of a sentence; longer ones are cut.
        sentences: n sentences.

    Returns:
        Token ids [n, context_length].
    """
    return _tokenizer(context_length)(list(sentences))


@cache
def _tokenizer(context_length: int) -> Any:
    return _module("tokenizer").SimpleTokenizer(context_length=context_length)


def imagenet_templates() -> tuple[str, ...]:
    """OpenAI's 80 templates for ImageNet, with {} in the place of the class name."""
    return tuple(template("{}") for template in _module("zero_shot_metadata").OPENAI_IMAGENET_TEMPLATES)


@cache
def _module(name: str) -> Any:
    """Run one file of open_clip, which imports no other file of the package."""
    package = find_spec("open_clip")
    assert package is not None and package.origin is not None, "requirements.txt has it"
    spec = spec_from_file_location(f"_open_clip_{name}", Path(package.origin).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
