"""Defines the schema, which maps the name of every option to its description. It is built from all tables."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from yacs.config import CfgNode

from tailtune.configs.key import Key
from tailtune.configs.option import Declaration


def uses_dropout(peft_args: Mapping[str, Any] | None) -> bool:
    """Whether training with these `peft_args` uses dropout, so that results depend on how a batch is cut."""
    return any("dropout" in name and bool(value) for name, value in (peft_args or {}).items())


COUPLING_RULES: Mapping[str, Callable[[Any], bool]] = {"set": bool, "dropout": uses_dropout}
"""Name of a rule → function that says whether a value makes the result depend on the micro-batch size."""


class Schema(Mapping[str, Key]):
    """Name of an option → `Key`.

    Args:
        declarations: all options, in the order of the documentation. Table entries may share an option; they then
            declare the same `Key`.
        coupled: option → the values that make the result depend on the micro-batch size, or a name of COUPLING_RULES.

    Raises:
        ValueError: two different options have the same name, or a group has the name of an option.
    """

    def __init__(self, declarations: Iterable[Declaration], coupled: Mapping[str, Collection[str]]) -> None:
        self._keys: dict[str, Key] = {}
        self.sections: dict[str, list[str]] = {}
        """Heading → names of its options."""
        self.entries: dict[str, list[str]] = {}
        """Name of an option → names of the table entries that read it."""
        self.readers: dict[str, list[str]] = {}
        """Name of an option → options of which one must be set so that anything reads it, as in `Key.read_with`."""
        self.coupled = coupled
        self.declarations = tuple(declarations)
        wanted: dict[str, set[str]] = {}
        for declaration in self.declarations:
            if self._keys.setdefault(declaration.name, declaration.key) != declaration.key:
                raise ValueError(f"two options are called {declaration.name}; give one of them a `key` of its own")
            if declaration.name not in self.entries:
                self.sections.setdefault(declaration.section, []).append(declaration.name)
            self.entries.setdefault(declaration.name, []).extend([declaration.entry] if declaration.entry else [])
            readers = self.readers.setdefault(declaration.name, [])
            named = (*declaration.key.read_with, declaration.reader)
            readers += [reader for reader in named if reader and reader not in readers]
            for alias in declaration.aliases:
                wanted.setdefault(alias, set()).add(declaration.name)
        groups = {name.rpartition(".")[0] for name in self._keys} - {""}
        if groups & self._keys.keys():
            raise ValueError(f"{groups & self._keys.keys()} are options and groups of options; give those a `key`")
        methods = {key.method for key in self._keys.values()} - {""}
        self.aliases = {
            alias: next(iter(names))
            for alias, names in wanted.items()
            if len(names) == 1 and alias not in self._keys and alias.partition(".")[0] not in methods
        }
        """Alias → name. Ambiguous aliases and aliases in the group of a method are left out."""

    def __getitem__(self, name: str) -> Key:
        return self._keys[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __deepcopy__(self, memo: Any) -> "Schema":
        return self  # copies of a config share the schema

    @property
    def defaults(self) -> dict[str, Any]:
        """Option → its default."""
        return {name: key.default for name, key in self._keys.items()}

    @property
    def earlier(self) -> dict[str, Any]:
        """Option → what runs did before it existed, for options of which this is not the default."""
        return {name: key.earlier for name, key in self._keys.items() if key.earlier is not None}

    def settable(self) -> list[str]:
        """The options that a user may set."""
        return [name for name, key in self._keys.items() if not key.internal]

    def name(self, word: str) -> str:
        """Replace an alias by the name of its option; other words are returned unchanged."""
        return self.aliases.get(word, word)

    def couples(self, values: Mapping[str, Any]) -> bool:
        """Whether the result depends on the micro-batch size if the options have these values."""
        return any(
            COUPLING_RULES[coupled](values[key]) if isinstance(coupled, str) else values[key] in coupled
            for key, coupled in self.coupled.items()
        )


class Config(CfgNode):
    """The config of a stage. It contains the schema that was used to read it."""

    def __init__(self, schema: Schema) -> None:
        super().__init__()
        self.__dict__["schema"] = schema


def schema_of(cfg: CfgNode) -> Schema:
    """The schema that was used to read a config."""
    schema = cfg.__dict__["schema"]
    assert isinstance(schema, Schema)
    return schema


def with_values(cfg: CfgNode, **values: Any) -> CfgNode:
    """A frozen copy of a config in which options have other values."""
    changed = cfg.clone()
    changed.defrost()
    changed.update(values)
    changed.freeze()
    return changed
