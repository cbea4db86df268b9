"""Hooks of the documentation site, called by mkdocs (see `hooks` in mkdocs.yml)."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / ".mkdocs_cache" / "tailtune"
FOLDERS = ("configs", "datasets", "models", "trainers")


def on_config(config: Any) -> Any:
    """Make our folders visible as parts of the package `tailtune`, which is how they import each other.

    mkdocstrings reads the docstrings from the source files without importing them. It finds `tailtune.trainers` only in
    a folder that is called `tailtune`, and a checkout may be called something else. The links are in a folder that git
    ignores, and they leave out `.venv` and `output`, which would be read as well.

    Args:
        config: the configuration of mkdocs.

    Returns:
        The same configuration.
    """
    PACKAGE.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        link = PACKAGE / name
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", name))
    return config
