"""Reconstructs the command of a run from its config."""

import json
from pathlib import Path
from typing import Any

from tailtune.configs import CfgNode, load_configs, names, schema_of, values_of, with_values
from tailtune.configs.key import TEST, TRAIN
from tailtune.configs.unread_options import unread_options
from tailtune.models import resolve


def command_of(cfg: CfgNode) -> list[str]:
    """The command of a run, without options that do not change its results.

    Args:
        cfg: resolved config of the run.

    Returns:
        The words after `python main.py`.
    """
    data = next((str(path) for path in _data_config_paths(cfg) if path.is_file()), cfg.data)
    schema, model = schema_of(cfg), cfg.model_file or cfg.model
    # In the place of a YAML that is gone, any config will do, because the options that differ from it follow.
    if data == cfg.data and data not in names("data"):
        data = next(iter(names("data")))
    if cfg.model_file and not Path(model).is_file():
        model = next(iter(names("model")))
    usual = values_of(resolve(load_configs(data, model, [], schema)[-1]))
    recorded = (key for key, entry in schema.items() if entry.recorded == "command")
    values = values_of(cfg, TRAIN, TEST) | {key: cfg[key] for key in recorded}
    changed = {key: value for key, value in values.items() if value != usual[key] and not schema[key].internal}
    unread = unread_options(with_values(cfg, given=list(changed)))  # of the user's model config whose file is gone
    words = (word for key, value in changed.items() if key not in unread for word in (key, _word(value)))
    return ["-d", data, "-m", model, *words]


def _data_config_paths(cfg: CfgNode) -> list[Path]:
    """Possible paths of a data config that the user has written."""
    return [Path(cfg.data_dir, f"{cfg.data}.{suffix}") for suffix in ("yaml", "yml")] if cfg.data_dir else []


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (list, dict)) else str(value)
