"""Names of run folders and evaluations, and config hashes; all are computed from the options."""

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
"""A longer name is cut and gets a digest."""


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
    """A digest of everything that decides which model is trained.

    It covers the options of class `train` that differ from their defaults, and all options of the methods in use. So
    adding an option or a method to the toolkit does not change the hashes of runs that exist already.

    Args:
        cfg: the config of a stage.

    Returns:
        16 hexadecimal digits.
    """
    schema = schema_of(cfg)
    used = [cfg.method]
    while (inner := cfg.get(used[-1], {}).get("inner")) and inner not in used:
        used.append(inner)
    values = values_of(cfg, TRAIN)
    kept = {
        key: value
        for key, value in values.items()
        if (schema[key].method in used if schema[key].method else value != schema[key].default)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def run_name(schema: Schema, chosen: Values, base: Values, earlier: Mapping[str, str]) -> str:
    """The name of a run's folder: `<data>_<model>_<changed train options>`, sorted, of limited length.

    Args:
        chosen: the options of the run.
        base: the options as the data and model configs set them, without the command line.
        earlier: what the command line sets for the stage before: `after.KEY` → value.

    Returns:
        A name of letters, digits and `.,@_-`.
    """
    changed = _changed(schema, chosen, base, TRAIN)
    if chosen["coupled_micro"] != base["coupled_micro"]:
        changed = sorted([*changed, f"micro_batch_size_{_text(chosen['micro_batch_size'])}"])
    names = (re.sub(r"[^\w.,@-]+", "-", chosen[kind]) for kind in ("data", "model"))
    of_earlier_stage = [f"{key}_{_text(value)}" for key, value in sorted(earlier.items())]
    return "_".join(part for part in (*names, _join(changed + of_earlier_stage)) if part)


def test_key(schema: Schema, chosen: Values, base: Values) -> str:
    """The name of an evaluation: its changed `test` options, or `default` if there are none.

    It begins with `train` if the training images are evaluated, and ends with `of_…` if the checkpoint is another
    run's.

    Args:
        chosen: the options of the run.
        base: the options as the data and model configs set them, without the command line.
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
    """A value as part of a file name. It gets a digest where characters had to be replaced."""
    if isinstance(value, list):
        return "-".join(map(_text, value))
    text = str(value)
    safe = re.sub(r"[^A-Za-z0-9.,_-]+", "-", text)
    return safe if safe == text else f"{safe[-40:].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
