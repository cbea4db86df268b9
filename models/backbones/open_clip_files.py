"""Parts of open_clip that need no other part of it: importing the whole package takes longer than a small run."""

import json
from collections.abc import Sequence
from functools import cache, reduce
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from torch import Tensor

from tailtune.configs.errors import UserError

SIZES = (
    *("embed_dim", "vision_cfg.image_size", "vision_cfg.layers", "vision_cfg.width"),
    *("text_cfg.context_length", "text_cfg.vocab_size", "text_cfg.width"),
)
"""What a model config of open_clip must say."""


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


def checked_config(name: str) -> Path:
    """The path of a model config of open_clip.

    Args:
        name: path of the file.

    Raises:
        UserError: there is no such file, or it does not describe an image encoder and a text encoder.
    """
    path = Path(name).expanduser()
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"open_clip:{name}: the model config cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"open_clip:{name} is no JSON: {error}") from error
    for size in SIZES:
        if reduce(lambda part, key: part.get(key) if isinstance(part, dict) else None, size.split("."), config) is None:
            raise UserError(f"open_clip:{name} lacks {size}; write it like the files in open_clip/model_configs")
    if config["text_cfg"].keys() & {"hf_tokenizer_name", "hf_model_name"}:
        raise UserError(f"open_clip:{name} names a tokenizer of the Hugging Face hub; only CLIP's own can be used")
    return path
