"""Names and identities of runs and evaluations, from their options."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from tailtune.configs.key import TEST, TRAIN
from tailtune.configs.schema import Schema, schema_of

Values = Mapping[str, Any]
LONGEST = 120


def values_of(cfg: CfgNode, *classes: str) -> dict[str, Any]:
    """The config as one flat dict, with the options of the given classes only (all when none is given)."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update({f"{key}.{name}": inner for name, inner in value.items()})
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if not classes or schema_of(cfg)[key].cls in classes}


def config_hash(cfg: CfgNode) -> str:
    """The identity of what is trained: a digest of the `train` options.

    It holds those that differ from their defaults, and all options of the methods in use. So a new option or method of
    the toolkit does not change the identity of earlier runs.
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
    """`<data>_<model>_<changed train options>`, sorted, short, path-safe.

    Args:
        chosen, base: the options, and those of the two configs alone.
        earlier: what the user set for the stage before, `after.KEY` → value.
    """
    changed = _changed(schema, chosen, base, TRAIN)
    if chosen["coupled_micro"] != base["coupled_micro"]:
        changed = sorted([*changed, f"micro_batch_size_{_text(chosen['micro_batch_size'])}"])
    names = (re.sub(r"[^\w.,@-]+", "-", chosen[kind]) for kind in ("data", "model"))
    later = [f"{key}_{_text(value)}" for key, value in sorted(earlier.items())]
    return "_".join(part for part in (*names, _join(changed + later)) if part)


def test_key(schema: Schema, chosen: Values, base: Values) -> str:
    """Changed test options, `default` if there are none; `train…` for the training images, `of…` for another run."""
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
    return name if len(name) <= LONGEST else f"{name[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _text(value: Any) -> str:
    """A value as part of a file name; with a digest where characters had to go."""
    if isinstance(value, list):
        return "-".join(map(_text, value))  # a range of blocks
    text = str(value)
    safe = re.sub(r"[^A-Za-z0-9.,_-]+", "-", text)
    return safe if safe == text else f"{safe[-40:].strip('-')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"
