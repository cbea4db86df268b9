"""How an option is declared: as a field of a small frozen dataclass, beside the code that reads it.

    @dataclass(frozen=True)
    class SmoothingOptions:
        strength: float = option(0.1, "Share of a label that the loss spreads over all classes.", least=0.0, most=1.0)

The dataclass belongs to an entry of a table (a loss, a tuner, a method …), which names it. `trainers/option_schema.py`
makes the schema of all options from the tables.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from yacs.config import CfgNode

from tailtune.configs.key import Class, Key
from tailtune.configs.value_parsers import as_bool, as_float, as_int, as_str

Options = TypeVar("Options")
PARSERS: dict[type, Callable[[Any], Any]] = {bool: as_bool, int: as_int, float: as_float, str: as_str}
"""Type of a default → the parser of its option, where the declaration names no other."""


@dataclass(frozen=True)
class NoOptions:
    """An entry of a table without options."""


@dataclass(frozen=True)
class Declaration:
    """A key of the schema and where it comes from."""

    name: str
    key: Key
    section: str
    """Heading under which the documentation lists it."""
    field: str
    """Its field in the options of the code that reads it."""
    entry: str = ""
    """The table entry that reads it, if it belongs to one."""
    aliases: tuple[str, ...] = ()
    """Other names that are accepted for it."""


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
    """A dataclass field that is an option.

    Args:
        default: the value where nobody gives one.
        doc: a sentence that stands alone, with the unit of a number.
        parse: parser of a value; None: the one of the default's type.
        key: name of the option; empty: `<entry>.<field>` for a table entry, else the field.
        aliases: other names that are accepted.
        cls: what a changed value makes: another training, another evaluation, or neither (`Key.cls`).
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
    options: type, section: str, entry: str = "", separator: str = ".", method: str = ""
) -> Iterator[Declaration]:
    """The options of a dataclass.

    Args:
        options: the dataclass, each field of which was made by `option`.
        section: heading of the documentation.
        entry: the table entry that owns it. `<entry>.<field>` is then accepted for every option, whatever its name.
        separator: between entry and field in names that are not given.
        method: the method that owns it, see `Key.method`.
    """
    names = key_names(options, entry, separator)
    for item in fields(options):
        aliases = item.metadata["aliases"]
        if entry:
            aliases = (*aliases, f"{entry.lower()}.{item.name}")
        key = item.metadata["option"]
        key = replace(key, method=method) if method else key
        yield Declaration(names[item.name], key, section, item.name, entry, aliases)


def options_from(options: type[Options], cfg: CfgNode, entry: str = "", separator: str = ".") -> Options:
    """The options of a table entry, as a config sets them."""
    return options(**{name: value_of(cfg, key) for name, key in key_names(options, entry, separator).items()})


def value_of(cfg: CfgNode, key: str) -> Any:
    """The value of an option by its name, `lr` or `ride.diversity`."""
    group, _, name = key.rpartition(".")
    return cfg[group][name] if group else cfg[key]
