"""The shipped configs as `--list` shows them, and KINDS, the kinds of model configs.

A kind is found from the values of a config. The files are read as they are, without the schema of all options, because
the schema needs seconds of imports.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tailtune.configs import describe, names
from tailtune.configs.errors import lookup
from tailtune.configs.yaml_reader import read_yaml

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "zero-shot": "the text features classify the images; nothing is trained",
        "text": "the classifier consists of text features, which train, or of text features and a cache of images",
        "experts": "several classifiers on one network, which are trained to differ",
        "two-stage": "the run continues the run of another config, which is trained first",
        "scratch": "the whole network is trained from random weights",
        "full": "blocks of a pre-trained network are trained themselves",
        "peft": "tuners and a classifier are trained on a frozen pre-trained network",
        "head": "a classifier is trained on a frozen pre-trained network; tuners can be turned on by name",
    }
)
"""Name of a kind → what its configs train. A config has one kind, the first that fits."""

SMALL_TUNERS = (
    *("bias_tuning", "ln_tuning", "bn_tuning", "mask", "aft", "vpt_shallow", "vpt_deep"),
    *("lora", "lora_mlp", "clip_lora"),
    *("ssf_attn", "ssf_mlp", "ssf_ln", "adapter", "adaptformer", "peft"),
)
"""Options that turn on a tuner in a shipped config: `peft`, and entries of the table of tuners but `full_tuning`."""


def kind_of(values: Mapping[str, Any]) -> str:
    """The kind of a model config.

    Args:
        values: its options, as its file has them or as they are resolved; options that are missing have their defaults.

    Returns:
        A name of KINDS.
    """
    if values.get("zero_shot"):
        return "zero-shot"
    if values.get("classifier") in ("TextClassifier", "TipAdapter"):
        return "text"
    if values.get("num_experts", 1) > 1:
        return "experts"
    if values.get("after"):
        return "two-stage"
    if values.get("full_tuning"):
        return "scratch" if values.get("pretrained", "default") in (None, "none") else "full"
    return "peft" if any(values.get(name) for name in SMALL_TUNERS) else "head"


def configs_of(kind: str) -> dict[str, Path]:
    """The shipped model configs of a kind.

    Args:
        kind: a name of KINDS.

    Returns:
        Name → file, sorted.

    Raises:
        UserError: there is no such kind.
    """
    lookup(KINDS, kind, "kind of model config")
    return {name: path for name, path in names("model").items() if kind_of(read_yaml(path)) == kind}


def list_of_configs() -> str:
    """The text of `--list`: the shipped configs with their descriptions, one per line."""
    return "\n".join(line for kind in ("data", "model") for line in _lines(kind, names(kind)))


def list_of_kind(kind: str) -> str:
    """The text of `--list KIND`: the shipped model configs of a kind with their descriptions, one per line.

    Args:
        kind: a name of KINDS.

    Raises:
        UserError: there is no such kind.
    """
    paths = configs_of(kind)
    return "\n".join(_lines(f"model, {kind} ({KINDS[kind]})", paths))


def _lines(heading: str, paths: Mapping[str, Path]) -> list[str]:
    width = max(map(len, paths))
    return [f"{heading}:", *(f"  {name:<{width}}  {describe(path)}" for name, path in paths.items())]
