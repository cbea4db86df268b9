"""Writes docs/options.md, the reference of all options, from the tables of the code.

python scripts/make_options.py
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # Python starts with this file's folder on its path; the one above it holds tailtune.py
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.configs import value_parsers as values
from tailtune.configs.key import RUNTIME, TEST, TRAIN, Key, option_keys, plain
from tailtune.configs.schema import ALIASES, SCHEMA
from tailtune.datasets import DATASETS
from tailtune.datasets.images.transforms import AUGMENTS
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.models import BACKBONES
from tailtune.models.backbones.prompts import PROMPTS
from tailtune.models.heads.classifiers import HEADS
from tailtune.models.heads.head_init import HEAD_INITS
from tailtune.models.tuners.peft_table import PEFTS
from tailtune.trainers.evaluation.ensembles import ENSEMBLES
from tailtune.trainers.evaluation.expert_weights import ADAPTS
from tailtune.trainers.evaluation.target_prior import TARGETS
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import METHODS, declared
from tailtune.trainers.optim import OPTIMIZERS, SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs" / "options.md"
TYPES: Mapping[Callable[[Any], Any], str] = {
    values.as_str: "text",
    values.as_path: "path",
    values.as_paths: "path,path …",
    values.as_folder: "folder, without `..`",
    values.as_bool: "True, False",
    values.as_int: "whole number",
    values.as_float: "number",
    values.as_micro: "whole number, auto",
    values.as_span: "k or [start,end)",
    values.as_scale: "learnable, or a number",
    values.as_mapping: "{key: value}",
    values.as_triple: "[r, g, b]",
    values.as_pair: "[number, number]",
    values.as_names: "name,name …",
    values.as_ints: "[number, …]",
    values.as_factors: "{name: number}",
}
TABLES: Mapping[str, Mapping[str, Any]] = {
    "ADAPTS": ADAPTS,
    "ENSEMBLES": ENSEMBLES,
    "AUGMENTS": AUGMENTS,
    "BACKBONES": BACKBONES,
    "DATASETS": DATASETS,
    "HEADS": HEADS,
    "HEAD_INITS": HEAD_INITS,
    "LOSSES": LOSSES,
    "METHODS": METHODS,
    "OPTIMIZERS": OPTIMIZERS,
    "PEFTS": PEFTS,
    "PROMPTS": PROMPTS,
    "SAMPLERS": SAMPLERS,
    "SCHEDULES": SCHEDULES,
    "TARGETS": TARGETS,
}
SECTIONS = {
    "dataset": "Data",
    "backbone": "Model",
    "full_tuning": "Tuners",
    "seed": "Training",
    "tte": "Evaluation",
    "test_only": "How it runs",
}
"""The first option of each section of the schema → its title."""

INTRODUCTION = f"""# Options

`python main.py -d DATA -m MODEL [KEY VALUE ...]`, or `key: value` in a YAML of `configs/`. Later beats earlier:
defaults < data YAML < model YAML < its `by_dataset` entries < the command line. `--dry-run` shows the values of a run.

The class of an option says what a changed value means:

- **{TRAIN}**: another trained model, so another run folder;
- **{TEST}**: another evaluation of the same model, kept in `tests/<key>/` of its run folder;
- **{RUNTIME}**: the same numbers, got differently.

`none` (or `null`) is a value where the default is none or the type says so. {{aliases}}

This file is made by `python scripts/make_options.py`.
"""


def render() -> str:
    """The text of the file."""
    aliases = " ".join(f"`{old}` is another name of `{new}`." for old, new in ALIASES.items())
    parts = [INTRODUCTION.format(aliases=aliases)]
    parts += [f"## {title}\n\n{table(entries)}\n" for title, entries in sections()]
    return "\n".join(parts)


def sections() -> Iterator[tuple[str, dict[str, Key]]]:
    """Title and options of each section in the schema's order, then those of the methods."""
    of_schema: list[tuple[str, dict[str, Key]]] = []
    for key, entry in SCHEMA.items():
        if entry.internal:
            continue
        if key in SECTIONS:
            of_schema.append((SECTIONS[key], {}))
        of_schema[-1][1][key] = entry
    assert [title for title, _ in of_schema] == list(SECTIONS.values()), "SECTIONS and the schema's order differ"
    yield from of_schema
    for method, options in declared().options.items():
        if entries := option_keys(method, options):
            yield f"Method {method}", entries


def table(entries: Mapping[str, Key]) -> str:
    """The Markdown table of some options."""
    rows = ["| key | type | default | class | meaning | choices |", "|---|---|---|---|---|---|"]
    for key, entry in entries.items():
        cells = (f"`{key}`", _type(entry), _default(entry), entry.cls, _meaning(entry), _choices(entry))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def _type(entry: Key) -> str:
    bounds = [f" {sign} {plain(bound)}" for sign, bound in (("≥", entry.least), ("≤", entry.most)) if bound is not None]
    return TYPES[entry.parse] + ",".join(bounds) + (", none" if entry.optional else "")


def _default(entry: Key) -> str:
    if entry.default is None:
        return "none"
    return f"`{entry.default}`" if entry.default != "" else "empty"


def _meaning(entry: Key) -> str:
    return entry.doc + (" (a data YAML's value beats the model YAML's)" if entry.data_wins else "")


def _choices(entry: Key) -> str:
    of_table = re.search(r"entry of ([A-Z_]+)", entry.doc)
    choices = entry.choices or (tuple(TABLES[of_table[1]]) if of_table else ())
    return ", ".join(f"`{choice}`" for choice in choices)


def main() -> None:
    """Write the file."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    FILE.write_text(render(), encoding="utf-8")
    print(f"wrote {FILE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
