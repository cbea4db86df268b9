"""The package `tailtune`: its modules are the folders beside this file (`tailtune.models`, `tailtune.trainers`, …).

Some of these folders have names that other packages have too: `datasets` is also a package of Hugging Face. So our code
imports them below `tailtune` only, and `import datasets` means the other package. Python puts the folder of `main.py`
on `sys.path`, where the bare names would be found first; importing this module takes the folder off again.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent

__path__ = [str(ROOT)]


def _is_root(entry: str) -> bool:
    """Whether an entry of `sys.path` is the folder of this file; an empty entry is the working directory."""
    try:
        return os.path.samefile(entry or os.curdir, ROOT)
    except OSError:  # the entry does not exist
        return False


sys.path[:] = [entry for entry in sys.path if not _is_root(entry)]
