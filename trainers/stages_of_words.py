"""`stages_of`: the configs of a run whose data may be a folder of images. The command line and Python share it."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tailtune.configs import CfgNode, Schema, load_configs, names

NO_DATA = "fake_lt"
"""Data config that stands for one which is not known yet. It sets no option of the model."""


def is_folder(data: str) -> bool:
    """Whether a word names a folder of images. Names of shipped configs have priority.

    Args:
        data: what `-d` names.
    """
    return data not in names("data") and os.path.isdir(data)


@contextmanager
def stages_of(
    data: str, model: str, pairs: Sequence[str], schema: Schema, where: str = "the command line", keep: bool = True
) -> Iterator[list[CfgNode]]:
    """As `load_configs`. A folder of images gets a data config, see `config_of_folder`.

    Args:
        data: as for `load_configs`, or a folder.
        model, pairs, schema, where: as for `load_configs`.
        keep: False: the data config that is made for a folder is removed at the end of the block.

    Raises:
        UserError: as `load_configs`, before a folder is split; or as `config_of_folder`.
    """
    if not is_folder(data):
        yield load_configs(data, model, pairs, schema, where)
        return
    load_configs(NO_DATA, model, pairs, schema, where)
    from tailtune.datasets.commands.folder_config import config_of_folder
    from tailtune.trainers.runs.run_folder import OUTPUT

    with config_of_folder(data, OUTPUT, schema.defaults, keep) as path:
        yield load_configs(path, model, pairs, schema, where)
