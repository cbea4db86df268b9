"""The one place where YAML of other people becomes values: configs, runs, options and grids.

What such a text can ask for is bounded before anything is made of it: its length, its depth, and how many values its
aliases stand for. Tags that make other things than text, numbers, truth values, lists and mappings are refused.
"""

from pathlib import Path
from typing import Any

import yaml

from tailtune.configs.errors import UserError

LONGEST = 2**18
"""Bytes of a YAML; the longest shipped one has a few thousand."""
DEEPEST = 20
"""Levels of lists and mappings within one another."""
MOST = 20_000
"""Values in all, those behind an alias counted wherever it stands."""
DIGITS = 4000
"""Of a number; more than 4,300 Python does not read, and no option takes one of more than 19."""

STANDARD = "tag:yaml.org,2002:"
PLAIN = tuple(f"{STANDARD}{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge", "value"))
DATE = f"{STANDARD}timestamp"
"""A date is text here: no option is one, and `output_dir: 2024-01-01` means what it says."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader within the bounds above; a key that stands twice in a mapping is refused."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != DATE]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[int, int] = {}
        """Values in a node that is complete, by its id."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        start = self._count
        if isinstance(event, yaml.AliasEvent):
            node = super().compose_node(parent, index)
            if id(node) not in self._sizes:
                raise _refused("a value that holds itself", event)
            self._add(self._sizes[id(node)], event)
            return node
        self._depth += 1
        if self._depth > DEEPEST:
            reason = f"more than {DEEPEST} lists or mappings within one another"
            raise _refused(reason, event)
        self._add(1, event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        self._sizes[id(node)] = self._count - start
        self._check(node)
        return node

    def _add(self, values: int, event: yaml.Event) -> None:
        self._count += values
        if self._count > MOST:
            reason = f"more than {MOST:,} values, counted with what its aliases stand for"
            raise _refused(reason, event)

    def _check(self, node: yaml.Node | None) -> None:
        """Refuse a tag that its text does not fit, before PyYAML's constructors try; and a key that stands twice."""
        if node is None:
            return
        short = node.tag.removeprefix(STANDARD)
        if node.tag not in PLAIN:
            reason = f"a value of type '{short}', which no option has"
            raise _refused(reason, node)
        if isinstance(node, yaml.ScalarNode) and short != "str":
            fits = self.resolve(yaml.ScalarNode, node.value, (True, False)) == node.tag
            if not fits or len(node.value) > DIGITS:
                reason = f"'{node.value[:40]}' is no value of type '{short}'"
                raise _refused(reason, node)
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                    if key.value in keys:
                        reason = f"'{key.value[:40]}' stands there twice"
                        raise _refused(reason, key)
                    keys.add(key.value)


def _refused(reason: str, place: Any) -> yaml.MarkedYAMLError:
    """The error at an event or node."""
    return yaml.MarkedYAMLError(problem=reason, problem_mark=place.start_mark)


def parse_yaml(text: str) -> Any:
    """The value that a YAML text stands for: None, text, numbers, truth values, lists, mappings.

    Raises:
        ValueError: it is no YAML, or beyond the bounds of this file; says why, and where in `args[1]`, a line from 1
            on or None.
    """
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST:,} characters", None)
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

    Raises:
        UserError: it cannot be read, is no regular file, no UTF-8, no YAML, or beyond the bounds of this file.
    """
    text = read_text(path, LONGEST, kind="YAML")
    try:
        return parse_yaml(text)
    except ValueError as error:
        reason, line = error.args
        where = f" line {line}" if line else ""
        raise UserError(f"{path}{where}: not valid YAML ({reason})") from error


def read_text(path: Path, longest: int, key: str = "", kind: str = "text") -> str:
    """A text file as a whole.

    Args:
        longest: bytes.
        key: the option that names it; empty: none does.
        kind: what it should be, for people.

    Raises:
        UserError: it cannot be read, is no regular file (a pipe would be waited for), too long, or not UTF-8.
    """
    named = f"{key}: {path}" if key else str(path)
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{named}: cannot be read (no regular file)")
        with path.open("rb") as file:
            content = file.read(longest + 1)
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror})") from error
    if len(content) > longest:
        raise UserError(f"{named}: longer than {longest:,} bytes; is it another file than you mean?")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{named}: not valid {kind} (its bytes are no text in UTF-8)") from error
