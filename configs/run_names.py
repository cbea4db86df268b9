"""Computes names of run folders, names of evaluations, and config hashes from the options."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from tailtune.configs.key import TEST, TRAIN
from tailtune.configs.schema import Schema, schema_of

Values = Mapping[str, Any]
MAX_NAME_CHARACTERS = 120
"""A longer name is shortened, and a digest is appended."""


def values_of(cfg: CfgNode, *classes: str) -> dict[str, Any]:
    """A config as one flat dict.

    Args:
        cfg: the config of a stage.
        classes: classes of options to keep (`train`, `test`, `runtime`); all when none is given.

    Returns:
        key → value. An option of a method has the key `<method>.<name>`.
    """
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update({f"{key}.{name}": option for name, option in value.items()})
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if not classes or schema_of(cfg)[key].cls in classes}


def config_hash(cfg: CfgNode) -> str:
    """A digest of all options that determine the trained model.

    The digest covers the options of class `train` that differ from their defaults, and all options of the methods in
    use. Therefore, a new option or method in TailTune does not change the hashes of existing runs.

    Args:
        cfg: the config of a stage.

    Returns:
        16 hexadecimal digits.
    """
    schema, used = schema_of(cfg), methods_in_use(cfg)
    values = values_of(cfg, TRAIN)
    kept = {
        key: value
        for key, value in values.items()
        if (schema[key].method in used if schema[key].method else value != schema[key].default)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def methods_in_use(cfg: CfgNode) -> list[str]:
    """The method of a config, and the methods that it wraps, from the outside to the inside."""
    used = [cfg.method]
    while (inner := cfg.get(used[-1], {}).get("inner")) and inner not in used:
        used.append(inner)
    return used


def run_name(schema: Schema, chosen: Values, base: Values, earlier: Mapping[str, str]) -> str:
    """The name of a run's folder: `<data>_<model>_<changed train options>`, sorted, of limited length.

    Args:
        schema: all options.
        chosen: the options of the run.
        base: the options of the data and model configs, without the command line.
        earlier: options of the previous stage on the command line: `after.KEY` → value.

    Returns:
        A name that consists of letters, digits and `.,@_-`.
    """
    changed = _changed(schema, chosen, base, TRAIN)
    if chosen["coupled_micro"] != base["coupled_micro"]:
        changed = sorted([*changed, f"micro_batch_size_{_text(chosen['micro_batch_size'])}"])
    names = (re.sub(r"[^\w.,@-]+", "-", chosen[kind]) for kind in ("data", "model"))
    of_earlier_stage = [f"{key}_{_text(value)}" for key, value in sorted(earlier.items())]
    return "_".join(part for part in (*names, _join(changed + of_earlier_stage)) if part)


def test_key(schema: Schema, chosen: Values, base: Values) -> str:
    """The name of an evaluation: its changed `test` options, or `default` if there are none.

    The name begins with `train` if the training images are evaluated. It ends with `of_…` if the checkpoint belongs to
    another run.

    Args:
        schema: all options.
        chosen: the options of the run.
        base: the options of the data and model configs, without the command line.
    """
    parts = _changed(schema, {**chosen, "test_train": base["test_train"]}, base, TEST)
    parts = ["train", *parts] if chosen["test_train"] else parts
    parts = [*parts, f"of_{_text(chosen['model_dir'])}"] if chosen["model_dir"] else parts
    return _join(parts) or "default"


def _changed(schema: Schema, chosen: Values, base: Values, cls: str) -> list[str]:
    changed = (
        key
        for key in sorted(chosen)
        if schema[key].cls == cls and chosen[key] != base.get(key) and not schema[key].internal
    )
    return [f"{key}_{_text(chosen[key])}" for key in changed]


def _join(parts: list[str]) -> str:
    name = "_".join(parts)
    if len(name) <= MAX_NAME_CHARACTERS:
        return name
    return f"{name[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _text(value: Any) -> str:
    """A value as part of a file name. A digest is appended if characters had to be replaced."""
    if isinstance(value, list):
        return "-".join(map(_text, value))
    text = str(value)
    safe = re.sub(r"[^A-Za-z0-9.,_-]+", "-", text)
    return safe if safe == text else f"{safe[-40:].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
