"""Options on the command line that nothing reads, given the others: `unread_options` and `refuse_unread_options`."""

from fnmatch import fnmatchcase

from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.configs.option import value_of
from tailtune.configs.run_names import methods_in_use
from tailtune.configs.schema import schema_of

SHOWN = 3
"""Number of options that a message names."""


def unread_options(cfg: CfgNode) -> dict[str, list[str]]:
    """Options that the command line moves from their defaults, and that nothing reads.

    Options of a YAML do not count: it may hold those of a loss or tuner that the command line replaces.

    Args:
        cfg: the config of a stage.

    Returns:
        Option → what would have to be set, as in `Key.read_with`.
    """
    schema = schema_of(cfg)
    unread: dict[str, list[str]] = {}
    for key in cfg.given or ():
        readers, moved = schema.readers[key], value_of(cfg, key) != schema[key].default
        if readers and moved and not any(_is_set(cfg, reader) for reader in readers):
            unread[key] = readers
    return unread


def refuse_unread_options(cfg: CfgNode, where: str = "") -> None:
    """Refuse what would change nothing.

    Args:
        cfg: the config of a stage.
        where: beginning of the message.

    Raises:
        UserError: names the first of `unread_options`.
    """
    for key, readers in unread_options(cfg).items():
        switches = {reader: f"{reader} True" for reader in readers if schema_of(cfg).defaults.get(reader) is False}
        shown = " or ".join(switches.get(reader, reader) for reader in readers[:SHOWN])
        more, them = (" …" if len(readers) > SHOWN else ""), ("it" if len(readers) == 1 else "one of them")
        raise UserError(
            f"{where}{key} {value_of(cfg, key)} does nothing without {shown}{more}; add {them}, or leave {key} out"
        )


def _is_set(cfg: CfgNode, reader: str) -> bool:
    """Whether an option, or an option with a value, is set; see `Key.read_with`."""
    key, _, wanted = reader.partition(" ")
    if key == "method":
        return wanted in methods_in_use(cfg)
    value = value_of(cfg, key)
    if not wanted:
        return bool(value != schema_of(cfg)[key].default)
    return any(fnmatchcase(str(each), wanted) for each in (value if isinstance(value, list) else [value]))
