"""`cached_schema`: the schema of all options without the seconds that the import of all tables takes.

The schema is stored in the user's cache folder, with the sizes and times of all source files. It is used only while
none of them has changed. So a contributor never sees an old schema.
"""

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import tailtune
from tailtune.configs import Schema, value_parsers
from tailtune.configs.atomic_file import atomic_file
from tailtune.configs.key import Key
from tailtune.configs.option import Declaration

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = ("configs", "datasets", "models", "trainers")
"""Folders of the package whose modules can change the schema."""


def cached_schema() -> Schema:
    """The schema that `option_schema.declared` builds; read from a file if the sources have not changed since."""
    path, stamp = _path(), _stamp()
    stored = _read(path)
    if stamp and stored.get("stamp") == stamp and stored.get("sha256") == _digest(stored.get("schema")):
        return _decoded(stored["schema"])
    from tailtune.trainers.option_schema import declared  # imports torch and timm

    schema = declared()
    if stamp and (content := _encoded(schema)) is not None:
        _write(path, {"stamp": stamp, "sha256": _digest(content), "schema": content})
    return schema


def _path() -> Path:
    """The file for this installation. Two checkouts have two files."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(folder) / "tailtune" / f"options-{hashlib.sha256(str(PACKAGE).encode()).hexdigest()[:16]}.json"


def _stamp() -> str:
    """A digest of the version and of name, size and time of every source file; Python compares these for .pyc files.

    It is empty if a file cannot be inspected, for example because it is being replaced; then nothing is stored.
    """
    try:
        files = sorted(path for folder in SOURCES for path in (PACKAGE / folder).rglob("*.py") if path.is_file())
        facts = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in files]
    except OSError:
        return ""
    return hashlib.sha256(json.dumps([tailtune.__version__, sys.version, facts]).encode()).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """The content of the file; empty if it is missing or damaged, because it can always be written again."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file completely or not at all. Without it, the next command only starts more slowly."""
    with suppress(OSError), atomic_file(path) as file:
        file.write(json.dumps(content).encode())


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _encoded(schema: Schema) -> dict[str, Any] | None:
    """The schema as JSON; None if a parser is not one of `value_parsers`, so that it has no name to be stored by."""
    declarations = []
    for declaration in schema.declarations:
        parser = declaration.key.parse.__name__
        if getattr(value_parsers, parser, None) is not declaration.key.parse:
            return None
        declarations.append({**vars(declaration), "key": {**vars(declaration.key), "parse": parser}})
    return {
        "declarations": declarations,
        "coupled": {
            name: values if isinstance(values, str) else list(values) for name, values in schema.coupled.items()
        },
    }


def _decoded(content: Mapping[str, Any]) -> Schema:
    declarations = []
    for fields in content["declarations"]:
        key = fields["key"]
        key |= {name: tuple(key[name]) for name in ("choices", "read_with")}
        key |= {"parse": getattr(value_parsers, key["parse"])}
        declarations.append(Declaration(**{**fields, "key": Key(**key), "aliases": tuple(fields["aliases"])}))
    return Schema(declarations, content["coupled"])
