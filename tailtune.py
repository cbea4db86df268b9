"""The package `tailtune`. Its modules are the folders beside this file: `tailtune.models`, `tailtune.trainers`, …

    import tailtune

    run = tailtune.train("digits_lt", "tiny_clip_peft")
    classifier = run.load()  # or tailtune.load("output/digits_lt_tiny_clip_peft")

In a checkout this file is the module `tailtune`; an installed package has it as `tailtune/__init__.py`.

Some folders have the names of other packages: `datasets` is also a package of Hugging Face. So our code imports its
modules below `tailtune` only, and `import datasets` means the other package. Python adds the folder of `main.py` to
`sys.path`, where our folders would be found under their short names; importing this module removes it from there.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"
__all__ = ["Prediction", "TrainedModel", "TrainedRun", "UserError", "__version__", "build_model", "load", "train"]

ROOT = Path(__file__).resolve().parent
__path__ = [str(ROOT)]

TYPE_CHECKING = False
"""True for type checkers only: importing the modules takes seconds, so `__getattr__` does it on first use."""
if TYPE_CHECKING:
    from tailtune.configs.errors import UserError
    from tailtune.trainers.python_api import Prediction, TrainedModel, TrainedRun, build_model, load, train


def __getattr__(name: str) -> object:
    """A name of the Python API, imported when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'tailtune' has no attribute '{name}'")
    module = "tailtune.configs.errors" if name == "UserError" else "tailtune.trainers.python_api"
    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def command() -> None:
    """Run the command line `tailtune …`: main.py as the program of this process. It ends the process."""
    import runpy

    runpy.run_path(str(ROOT / "main.py"), run_name="__main__")


def _is_root(entry: str) -> bool:
    """Whether an entry of `sys.path` is the folder of this file. An empty entry means the working directory."""
    try:
        return os.path.samefile(entry or os.curdir, ROOT)
    except OSError:  # the entry does not exist
        return False


if __name__ == "__main__":  # `python -m tailtune` in a checkout; main.py imports this file again, as `tailtune`
    command()
sys.path[:] = [entry for entry in sys.path if not _is_root(entry)]
