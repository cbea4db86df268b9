"""The package `tailtune`. Its modules are the folders beside this file: `tailtune.models`, `tailtune.trainers`, …

Some folders have the names of other packages: `datasets` is also a package of Hugging Face. So our code imports its
modules below `tailtune` only, and `import datasets` means the other package. Python adds the folder of `main.py` to
`sys.path`, where our folders would be found under their short names; importing this module removes it from there.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

__path__ = [str(ROOT)]


def _is_root(entry: str) -> bool:
    """Whether an entry of `sys.path` is the folder of this file. An empty entry means the working directory."""
    try:
        return os.path.samefile(entry or os.curdir, ROOT)
    except OSError:  # the entry does not exist
        return False


sys.path[:] = [entry for entry in sys.path if not _is_root(entry)]
