"""Hooks of the documentation site, called by mkdocs (see `hooks` in mkdocs.yml)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / ".mkdocs_cache" / "tailtune"
PARTS = {"__init__.py": "tailtune.py", **{name: name for name in ("configs", "datasets", "models", "trainers")}}
"""Name in the package → file or folder of the checkout."""


def on_startup(**_: object) -> None:
    """Make our folders visible as the package `tailtune`, which is how they import each other.

    mkdocstrings reads docstrings from source files without importing them. It finds `tailtune.trainers` only in a
    folder that is called `tailtune`, and a checkout may be called something else. The links are in a folder that git
    ignores.
    """
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        link = PACKAGE / name
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", part))
