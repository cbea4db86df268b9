"""Declares options. An option is a field of a small frozen dataclass, next to the code that reads it.

    @dataclass(frozen=True)
    class SmoothingOptions:
        strength: float = option(0.1, "Share of a label that the loss spreads over all classes.", least=0.0, most=1.0)

The dataclass belongs to an entry of a table (a loss, a tuner, a method …), which refers to it.
`trainers/option_schema.py` builds the schema of all options from the tables.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from yacs.config import CfgNode

from tailtune.configs.key import Class, Key
from tailtune.configs.value_parsers import as_bool, as_float, as_int, as_str

Options = TypeVar("Options")
PARSERS: dict[type, Callable[[Any], Any]] = {bool: as_bool, int: as_int, float: as_float, str: as_str}
"""Type of a default → parser of the option, unless the declaration gives another parser."""


@dataclass(frozen=True)
class NoOptions:
    """An entry of a table without options."""


@dataclass(frozen=True)
class Declaration:
    """A key of the schema, and its origin."""

    name: str
    key: Key
    section: str
    """Heading under which the documentation lists the option."""
    field: str
    """Name of its field in the options dataclass."""
    entry: str = ""
    """Name of the table entry that reads the option; empty if no entry does."""
    reader: str = ""
    """The option that chooses this entry, as in `Key.read_with`; empty if something else reads the option, too."""
    aliases: tuple[str, ...] = ()
    """Other accepted names of the option."""


def option(
    default: Any,
    doc: str,
    parse: Callable[[Any], Any] | None = None,
    *,
    key: str = "",
    aliases: tuple[str, ...] = (),
    cls: Class = "train",
    **rules: Any,
) -> Any:
    """Create a dataclass field that declares an option.

    Args:
        default: the value if the user does not set the option.
        doc: one sentence about the meaning of the option, with the unit of a number.
        parse: parser of a value; None: the parser for the type of the default.
        key: name of the option; empty: `<entry>.<field>` for a table entry, otherwise the name of the field.
        aliases: other accepted names.
        cls: effect of a changed value: another training, another evaluation, or neither (`Key.cls`).
        rules: further fields of `Key`, such as `choices`, `least` and `most`.
    """
    entry = Key(parse or PARSERS[type(default)], default, doc, cls, **rules)
    metadata = {"option": entry, "key": key, "aliases": aliases}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def key_names(options: Any, entry: str = "", separator: str = ".") -> dict[str, str]:
    """Field of an options dataclass → name of the option."""
    prefix = f"{entry.lower()}{separator}" if entry else ""
    return {item.name: item.metadata["key"] or f"{prefix}{item.name}" for item in fields(options)}


def declarations(
    options: type, section: str, entry: str = "", separator: str = ".", method: str = "", reader: str = ""
) -> Iterator[Declaration]:
    """The declarations of all options of a dataclass.

    Args:
        options: the dataclass; each of its fields was created by `option`.
        section: heading in the documentation.
        entry: the table entry that owns the options; `<entry>.<field>` is then an accepted name of every option.
        separator: text between entry and field in the default names.
        method: the method that owns the options, see `Key.method`.
        reader: the option that chooses the entry, see `Declaration.reader`.
    """
    names = key_names(options, entry, separator)
    for item in fields(options):
        aliases = item.metadata["aliases"]
        if entry:
            aliases = (*aliases, f"{entry.lower()}.{item.name}")
        key = item.metadata["option"]
        key = replace(key, method=method) if method else key
        yield Declaration(names[item.name], key, section, item.name, entry, reader, aliases)


def options_from(options: type[Options], cfg: CfgNode, entry: str = "", separator: str = ".") -> Options:
    """Read the options of a table entry from a config.

    Args:
        options: the options dataclass.
        cfg: the config of a stage.
        entry: name of the table entry.
        separator: text between entry and field in the default names.
    """
    return options(**{name: value_of(cfg, key) for name, key in key_names(options, entry, separator).items()})


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of an option with a given name, such as `lr` or `ride.diversity`."""
    group, _, name = key.rpartition(".")
    return cfg[group][name] if group else cfg[key]
