"""Declares the internal options that the config loader sets, and names those of the user that the backbone fills in."""

from dataclasses import dataclass

from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_micro, as_names

BY_BACKBONE = ("resolution", "interpolation", "expand")
"""Options whose value None means what the backbone suggests. `models.resolve` fills them in."""


@dataclass(frozen=True)
class LoaderOptions:
    """Names and identifiers. All of these options are internal."""

    data: str = option("", "Name of the data config.", internal=True)
    model: str = option("", "Name of the model config.", internal=True)
    after_hash: str = option("", "Config hash of the stage before this one.", internal=True)
    data_dir: str = option(
        "",
        "Folder of a data config that was given by its path.",
        cls="runtime",
        internal=True,
        recorded="config",
    )
    model_file: str = option(
        "",
        "Path of a model config that was given by its path.",
        cls="runtime",
        internal=True,
        recorded="config",
    )
    run_name: str = option("", "Name of the run's folder.", cls="runtime", internal=True)
    test_key: str = option("", "Name of the evaluation.", cls="runtime", internal=True)
    coupled_micro: int | None = option(
        None,
        "The micro-batch size, in images, where the loss or the method depends on it.",
        as_micro,
        internal=True,
    )
    given: list[str] | None = option(
        None, "Options of the command line, by name.", as_names, cls="runtime", internal=True, zero_shot=False
    )
    micro_explicit: bool = option(False, "The user has set micro_batch_size.", cls="runtime", internal=True)
