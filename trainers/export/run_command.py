"""The command that made a run, from its config."""

import json
from pathlib import Path
from typing import Any

from tailtune.configs import CfgNode, load_configs, values_of
from tailtune.configs.key import TEST, TRAIN
from tailtune.configs.schema import SCHEMA
from tailtune.models import resolve
from tailtune.trainers.methods import declared

DATA_KEYS = ("root", "lists")
"""Keys that say where the data are. Results do not depend on them, but the command may need them."""


def command_of(cfg: CfgNode) -> list[str]:
    """The words after `python main.py` that give the same results as a config.

    Args:
        cfg: a resolved config.
    """
    data = next((str(path) for path in _data_config_paths(cfg) if path.is_file()), cfg.data)
    defaults = values_of(resolve(load_configs(data, cfg.model, [], declared())[-1]))
    values = values_of(cfg, TRAIN, TEST) | {key: cfg[key] for key in DATA_KEYS}
    changed = {
        key: value
        for key, value in values.items()
        if value != defaults[key] and not (key in SCHEMA and SCHEMA[key].internal)
    }
    return ["-d", data, "-m", cfg.model, *(word for key, value in changed.items() for word in (key, _word(value)))]


def _data_config_paths(cfg: CfgNode) -> list[Path]:
    """Where a data config that the user has written may be."""
    return [Path(cfg.data_dir, f"{cfg.data}.{suffix}") for suffix in ("yaml", "yml")] if cfg.data_dir else []


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)
