"""Parts of open_clip that need no other part of it: importing the whole package takes longer than a small run."""

from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any


def tokenizer(context_length: int) -> Any:
    """CLIP's tokenizer: a list of sentences → token ids [n, context_length]."""
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
