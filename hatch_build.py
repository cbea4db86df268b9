"""Steps of `pip install`, named in pyproject.toml: which files the wheel has, and which installation is refused."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("configs", "datasets", "models", "trainers")
SUFFIXES = (".py", ".yaml", ".json", ".txt", ".md", ".html")
"""Endings of the files that the wheel takes from FOLDERS. Files that lie there by chance are left out."""
EMBEDDED = "models/tiny_clip/weights.safetensors"


class PackageFiles(BuildHookInterface):
    """Collects the files of the wheel, and refuses `pip install -e .`.

    An editable installation would copy the files, because the folders of the checkout lie in no package.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a build.

        Args:
            version: `standard` for a wheel, `editable` for `pip install -e`.
            build_data: settings of the build; `force_include` gets file of the checkout → path in the wheel.
        """
        if version == "editable":
            self.app.abort(
                "an editable installation is not possible: run python main.py in the checkout, and for the Python API "
                f"set PYTHONPATH={self.root}; or install a copy with pip install ."
            )
        root = Path(self.root)
        files = [
            path.relative_to(root).as_posix()
            for folder in FOLDERS
            for path in sorted((root / folder).rglob("[!.]*"))
            if path.suffix in SUFFIXES and path.is_file() and path.parent.name != "__pycache__"
        ]
        build_data["force_include"] |= {str(root / name): f"tailtune/{name}" for name in [*files, EMBEDDED]}
