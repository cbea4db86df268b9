"""A step of `pip install`, named in pyproject.toml: it refuses an installation that would not follow the checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NotEditable(BuildHookInterface):
    """Refuses `pip install -e .`. It would copy the files, because the folders of the checkout lie in no package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a build.

        Args:
            version: `standard` for a wheel, `editable` for `pip install -e`.
            build_data: settings of the build, which stay as they are.
        """
        if version == "editable":
            self.app.abort(
                "an editable installation is not possible: run python main.py in the checkout, and for the Python API "
                f"set PYTHONPATH={self.root}; or install a copy with pip install ."
            )
