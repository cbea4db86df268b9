"""Reads all YAML: data and model configs, the configs of runs, values of options, and grids.

The text may come from an untrusted source. Therefore its length, its depth and its number of values are limited before
values are created; an alias counts at each use. Only text, numbers, booleans, lists and mappings are accepted. Tags of
other types are refused.
"""

from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tailtune.configs.errors import UserError

MAX_LENGTH = 2**18
"""Largest length: bytes of a file, or characters of a text. The longest shipped YAML has a few thousand bytes."""
MAX_DEPTH = 20
"""Largest number of nested levels of lists and mappings."""
MAX_VALUES = 20_000
"""Largest number of values. The values of an alias are counted at each use."""
MAX_DIGITS = 4000
"""Largest number of digits. Python refuses more than 4,300; the value of an option has at most 19."""

STANDARD = "tag:yaml.org,2002:"
ACCEPTED_TAGS = tuple(
    f"{STANDARD}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge", "value")
)
DATE = f"{STANDARD}timestamp"
"""Tag of dates. A date is read as text, because no option is a date, and `output_dir: 2024-01-01` is a name."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the limits above. It refuses a mapping that contains a key twice."""

    yaml_implicit_resolvers = {
        first_character: [(tag, pattern) for tag, pattern in resolvers if tag != DATE]
        for first_character, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[int, int] = {}
        """Python id of a complete node → number of values in the node."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node as PyYAML does, while counting depth and values."""
        event = self.peek_event()
        start = self._count
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _error_at(event, "a value that contains itself")
            self._add(self._sizes[id(node)], event)
            return node
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error_at(event, f"more than {MAX_DEPTH} levels of lists or mappings")
        self._add(1, event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._count - start
        self._check(node)
        return node

    def _add(self, values: int, event: yaml.Event) -> None:
        self._count += values
        if self._count > MAX_VALUES:
            raise _error_at(event, f"more than {MAX_VALUES:,} values, with aliases counted wherever they are used")

    def _check(self, node: yaml.Node | None) -> None:
        """Refuse a tag that does not match its text, before PyYAML creates the value. Refuse duplicate keys."""
        if node is None:
            return
        kind = node.tag.removeprefix(STANDARD)
        if node.tag not in ACCEPTED_TAGS:
            raise _error_at(node, f"a value of type '{kind}', which no option has")
        if isinstance(node, yaml.ScalarNode) and kind != "str":
            fits = self.resolve(yaml.ScalarNode, node.value, (True, False)) == node.tag
            if not fits or len(node.value) > MAX_DIGITS:
                raise _error_at(node, f"'{node.value[:40]}' is not a value of type '{kind}'")
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in keys:
                        raise _error_at(key, f"'{key.value[:40]}' occurs twice")
                    keys.add(key.value)


def _error_at(place: Any, reason: str) -> yaml.MarkedYAMLError:
    """An error at the line of an event or node."""
    return yaml.MarkedYAMLError(problem=reason, problem_mark=place.start_mark)


def parse_yaml(text: str) -> Any:
    """Parse a YAML text.

    Args:
        text: at most `MAX_LENGTH` characters.

    Returns:
        None, text, a number, a boolean, or a list or mapping of these. The caller may change it.

    Raises:
        ValueError: the text is not YAML, or exceeds the limits of this module. Its `args` are the reason, and the line
            number (from 1) or None.
    """
    return deepcopy(_parsed(text))


@lru_cache(maxsize=128)
def _parsed(text: str) -> Any:
    """`parse_yaml`. One command reads the config of a run several times, and each time takes 20 milliseconds."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"longer than {MAX_LENGTH:,} characters", None)
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ValueError(getattr(error, "problem", None) or "not text", mark.line + 1 if mark else None) from error


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Args:
        path: the file.

    Returns:
        The same as `parse_yaml`.

    Raises:
        UserError: the file cannot be read, is not a regular file, is not UTF-8, is not YAML, or exceeds the limits of
            this module.
    """
    text = read_text(path, MAX_LENGTH, kind="YAML")
    try:
        return parse_yaml(text)
    except ValueError as error:
        reason, line = error.args
        at_line = f" line {line}" if line else ""
        raise UserError(f"{path}{at_line}: not valid YAML ({reason})") from error


def read_text(path: Path, max_bytes: int, key: str = "", kind: str = "text") -> str:
    """Read the whole content of a text file.

    Args:
        path: the file.
        max_bytes: a larger file is refused.
        key: the option that names the file, for messages; empty if no option does.
        kind: what the file should hold, for messages.

    Raises:
        UserError: the file cannot be read, is not a regular file (a pipe could block), is too large, or is not UTF-8.
    """
    named = f"{key}: {path}" if key else str(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{named}: cannot be read (not a regular file)")
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror})") from error
    if len(content) > max_bytes:
        raise UserError(f"{named}: larger than {max_bytes:,} bytes; is it the file that you mean?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{named}: not valid {kind} (it is not text in UTF-8)") from error
