"""Hooks of the documentation site, called by mkdocs (see `hooks` in mkdocs.yml)."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / ".mkdocs_cache" / "tailtune"
PARTS = {"__init__.py": "tailtune.py", **{name: name for name in ("configs", "datasets", "models", "trainers")}}
"""Name in the package → file or folder of the checkout."""
LOADED = re.compile(r"""<(?!a\b)\w[^>]*?\b(?:src|srcset|href|data)=["'](?:https?:)?//[^"']*["'][^>]*>""", re.IGNORECASE)
"""A tag by which a browser loads something from another host. A link that a reader clicks on is no such tag."""


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


def on_post_page(output: str, **_: object) -> str:
    """Refuse a page that makes a browser ask another host, for a font, a script or a picture.

    Args:
        output: the HTML of a page.

    Returns:
        The same HTML.

    Raises:
        PluginError: the page has such a tag.
    """
    if found := LOADED.search(output):
        raise PluginError(f"a page loads something from another host: {found[0][:200]}; put the file into docs/")
    return output
