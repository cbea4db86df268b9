"""Writes docs/options.md, the reference of all options, from the tables of the code.

python scripts/make_options.py
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.configs import Schema
from tailtune.configs import value_parsers as values
from tailtune.configs.key import RUNTIME, TEST, TRAIN, Key, plain
from tailtune.scripts._page import ROOT, write_page
from tailtune.trainers.option_schema import choices_of, declared

FILE = ROOT / "docs" / "options.md"
TYPES: Mapping[Callable[[Any], Any], str] = {
    values.as_str: "text",
    values.as_path: "path",
    values.as_paths: "path,path …",
    values.as_folder: "folder, no `..`",
    values.as_bool: "True, False",
    values.as_int: "whole number",
    values.as_float: "number",
    values.as_micro: "whole number or auto",
    values.as_span: "k, or [start,end)",
    values.as_scale: "learnable, or a number",
    values.as_mapping: "{key: value}",
    values.as_triple: "[r, g, b]",
    values.as_pair: "[number, number]",
    values.as_names: "name,name …",
    values.as_ints: "[number, …]",
    values.as_numbers: "[number, …]",
    values.as_factors: "{name: number}",
    values.as_layers: "k, or [index, …]",
}
INTRODUCTION = f"""# All options

You set an option on the command line as `KEY VALUE`, as in `python main.py -d DATA -m MODEL lr 0.02`, or in a YAML file
as `key: value`. If an option is set in several places, the last of these has priority: defaults, data YAML, model YAML,
entries of `by_dataset` in the model YAML, command line. `--dry-run` shows the options that differ from their defaults,
and `--dry-run --all` shows every option.

The column *class* says what a changed value makes:

- **{TRAIN}**: another trained model, so the run has another folder;
- **{TEST}**: another evaluation of the same model, in `tests/<key>/` of its run folder;
- **{RUNTIME}**: the same numbers, computed in another way.

The column *of* names the entries of a table (losses, tuners, schedules …) that read the option. Such an option has a
second name, `<entry>.<option>`, for example `las.smooth_head`. {{aliases}}

The column *with* names what has to be set so that anything reads the option; of several, one is enough. A command line
that gives the option alone is refused.

`none` (or `null`) is a valid value if the default is none or the type says so.

This page is written by `python scripts/make_options.py`, which `make docs` runs.
"""


def render() -> str:
    """The text of docs/options.md."""
    schema = declared()
    aliases = " ".join(
        f"`{other}` is another name of `{key}`." for other, key in schema.aliases.items() if "." not in other
    )
    parts = [INTRODUCTION.format(aliases=aliases)]
    for title, keys in schema.sections.items():
        if shown := [key for key in keys if not schema[key].internal]:
            parts.append(f'## {title}\n\n<div class="options" markdown>\n\n{table(schema, shown)}\n\n</div>\n')
    return "\n".join(parts)


def table(schema: Schema, keys: list[str]) -> str:
    """The table of the options of a section, with one row for each option."""
    entries = {key: [] if schema[key].method else schema.entries[key] for key in keys}
    readers = {key: schema[key].read_with for key in keys}
    extra = {title: names for title, names in (("of", entries), ("with", readers)) if any(names.values())}
    columns = ["option", *extra, "type", "default", "class", "meaning"]
    rows = [columns]
    for key in keys:
        entry, named = schema[key], [", ".join(f"`{name}`" for name in names[key]) for names in extra.values()]
        rows.append([f"`{key}`", *named, _type(entry), _default(entry), entry.cls, _meaning(key, entry)])
    head, *body = ("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([head, "|---" * len(columns) + "|", *body])


def _type(entry: Key) -> str:
    given = [(sign, bound) for sign, bound in (("≥", entry.least), ("≤", entry.most)) if bound is not None]
    bounds = [f" {sign}\u00a0{plain(bound)}" for sign, bound in given]  # no line break before the number
    return TYPES[entry.parse] + ",".join(bounds) + (" or none" if entry.optional else "")


def _default(entry: Key) -> str:
    if entry.default is None:
        return "none"
    return f"`{entry.default}`" if entry.default != "" else "empty"


def _meaning(key: str, entry: Key) -> str:
    choices = choices_of(key, entry)
    if key == "after":
        listed = " Choices: [all model configs](models.md)."
    else:
        listed = f" Choices: {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
    return entry.doc + (" The data YAML has priority over the model YAML." if entry.data_wins else "") + listed


if __name__ == "__main__":
    write_page(FILE, render, __doc__)
