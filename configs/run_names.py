"""Names and identities of runs and evaluations, from their options."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from yacs.config import CfgNode

from tailtune.configs.key import TEST, TRAIN
from tailtune.configs.schema import SCHEMA

Values = Mapping[str, Any]
LONGEST = 120


def class_of(key: str) -> str:
    """`train`, `test` or `runtime`; a method's own options are train-class."""
    return SCHEMA[key].cls if key in SCHEMA else TRAIN


def values_of(cfg: CfgNode, *classes: str) -> dict[str, Any]:
    """The config as one flat dict, of the given key classes only (all when none is given)."""
    flat: dict[str, Any] = {}
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            flat.update({f"{key}.{name}": each for name, each in value.items()})
        else:
            flat[key] = value
    return {key: value for key, value in flat.items() if not classes or class_of(key) in classes}


def config_hash(cfg: CfgNode) -> str:
    """Identity of what is trained: a digest of the `train` keys that have another value than their default, and of the
    options of the methods in use.

    So an option or a method that is added to the toolkit leaves the runs that there are what they were.
    """
    used = [cfg.method]
    while (inner := cfg.get(used[-1], {}).get("inner")) and inner not in used:
        used.append(inner)
    values = values_of(cfg, TRAIN)
    kept = {
        key: value
        for key, value in values.items()
        if (value != SCHEMA[key].default if key in SCHEMA else key.partition(".")[0] in used)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def run_name(chosen: Values, base: Values, earlier: Mapping[str, str]) -> str:
    """`<data>_<model>_<changed train options>`, sorted, short, path-safe.

    Args:
        chosen, base: the options, and those of the two configs alone.
        earlier: what the user set for the stage before, `after.KEY` → value.
    """
    changed = _changed(chosen, base, TRAIN)
    if chosen["coupled_micro"] != base["coupled_micro"]:
        changed = sorted([*changed, f"micro_batch_size_{_text(chosen['micro_batch_size'])}"])
    names = (re.sub(r"[^\w.,@-]+", "-", chosen[kind]) for kind in ("data", "model"))
    later = [f"{key}_{_text(value)}" for key, value in sorted(earlier.items())]
    return "_".join(part for part in (*names, _join(changed + later)) if part)


def test_key(chosen: Values, base: Values) -> str:
    """Changed test options, `default` if there are none; `train…` for the training images, `of…` for another run."""
    parts = _changed({**chosen, "test_train": base["test_train"]}, base, TEST)
    parts = ["train", *parts] if chosen["test_train"] else parts
    parts = [*parts, f"of_{_text(chosen['model_dir'])}"] if chosen["model_dir"] else parts
    return _join(parts) or "default"


def _changed(chosen: Values, base: Values, cls: str) -> list[str]:
    changed = (
        key
        for key in sorted(chosen)
        if class_of(key) == cls and chosen[key] != base.get(key) and not (key in SCHEMA and SCHEMA[key].internal)
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
