"""Writes docs/models.md, the list of the shipped model configs by kind, from the first lines of their files.

python scripts/make_model_list.py
"""

import sys
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.configs import describe
from tailtune.configs.shipped_configs import KINDS, configs_of
from tailtune.scripts._page import ROOT, write_page

FILE = ROOT / "docs" / "models.md"
INTRODUCTION = """# All model configs

The project ships {number} model configs. A config is a YAML file in `configs/model/`. It sets the backbone, the tuner,
the method and the training recipe. You choose a config with `-m NAME`, and you can change every option of it on the
command line. [Which model for my case](which-model.md) helps to choose.

| kind | configs | what is trained |
|---|---|---|
{kinds}

`python main.py --list` prints all configs, and `python main.py --list KIND` prints those of one kind. The comments at
the top of each file name its command, its paper and the published numbers.

This page is written by `python scripts/make_model_list.py`, which `make docs` runs.
"""


def render() -> str:
    """The text of docs/models.md."""
    found = {kind: configs_of(kind) for kind in KINDS}
    kinds = "\n".join(f"| [{kind}](#{kind}) | {len(found[kind])} | {meaning} |" for kind, meaning in KINDS.items())
    parts = [INTRODUCTION.format(number=sum(map(len, found.values())), kinds=kinds)]
    for kind, paths in found.items():
        rows = [f"| `{name}` | {describe(path).replace('|', '/')} |" for name, path in paths.items()]
        parts.append("\n".join([f"## {kind}", "", "| config | what it is |", "|---|---|", *rows, ""]))
    return "\n".join(parts)


if __name__ == "__main__":
    write_page(FILE, render, __doc__)
