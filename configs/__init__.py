"""From names and `KEY VALUE` pairs to frozen configs, one for each stage of a run.

Merge order: defaults < data YAML < model YAML < the model YAML's `by_dataset` entries whose pattern fits the data
name (most specific last) < pairs. Every value is parsed by the type that the schema declares for its key.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from tailtune.configs.errors import UserError, lookup, printable, unknown
from tailtune.configs.key import RUNTIME, Key, option_keys
from tailtune.configs.run_names import config_hash, run_name, test_key, values_of
from tailtune.configs.schema import ALIASES, KNOWN_AS, SCHEMA, SHARED
from tailtune.configs.value_parsers import check_text
from tailtune.configs.yaml_reader import read_yaml

__all__ = [
    "CfgNode",
    "Declared",
    "UserError",
    "config_hash",
    "describe",
    "load_configs",
    "load_resolved",
    "lookup",
    "names",
    "values_of",
]

FOLDER = Path(__file__).resolve().parent
LAST_ONLY = ("test_only", "model_dir", "resume", "output_dir", "export")
"""Runtime keys of the command line that mean the last stage."""

Values = dict[str, Any]


@dataclass(frozen=True)
class Declared:
    """What the tables of the code say about options.

    Args:
        options: method name → its `Options` dataclass, whose fields become the keys `<method>.<field>`.
        coupled: key → whether a value makes the result depend on the images that a process holds at once.
    """

    options: Mapping[str, type] = field(default_factory=dict)
    coupled: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)

    def couples(self, values: Mapping[str, Any]) -> bool:
        return any(couples(values[key]) for key, couples in self.coupled.items())


def names(kind: str) -> dict[str, Path]:
    """The shipped configs of a kind (`data` or `model`): name → file, sorted."""
    return {path.stem: path for path in sorted((FOLDER / kind).glob("*.yaml"))}


def describe(path: Path) -> str:
    """The first line of a config file, a comment, for `--list`."""
    return path.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()


def load_configs(data: str, model: str, pairs: Sequence[str], declared: Declared | None = None) -> list[CfgNode]:
    """The frozen configs of all stages, the last one being the run that was asked for.

    Args:
        data: name of a file in configs/data, or the path of a YAML.
        model: name of a file in configs/model.
        pairs: `KEY VALUE KEY VALUE …`; `after.KEY` sets an option of the stage before.
        declared: what the tables of the code add to the schema.

    Raises:
        UserError: unknown name or key, wrong type, odd number of words, unreadable YAML.
    """
    return _stages(data, model, _pair_up(pairs), declared or Declared(), depth=0)


def load_resolved(path: Path, declared: Declared | None = None) -> CfgNode:
    """The frozen config of a run from its `config.yaml`; runtime keys that are not in it have their defaults.

    Raises:
        UserError: the file is unreadable, or holds what is no option of this version.
    """
    schema = _schema(declared or Declared())
    values = {key: each.default for key, each in schema.items()}
    stored = _read_yaml(path)
    if "data" not in stored:
        raise UserError(f"{path} is no run's config")
    for key, value in stored.items():
        values[key] = value if key in schema and schema[key].internal else _parse(key, value, schema, str(path))
    return _freeze(values)


def _schema(declared: Declared) -> dict[str, Key]:
    own = (option_keys(method, kind) for method, kind in declared.options.items())
    return {**SCHEMA, **{key: entry for keys in own for key, entry in keys.items()}}


def _pair_up(words: Sequence[str]) -> list[tuple[str, str]]:
    if len(words) % 2:
        raise UserError(f"options come as KEY VALUE pairs, but '{printable(words[-1])}' has no value")
    return list(zip(words[::2], words[1::2], strict=True))


def _stages(data: str, model: str, pairs: list[tuple[str, str]], declared: Declared, depth: int) -> list[CfgNode]:
    if depth > 4:
        raise UserError(f"model config '{model}': the chain that its `after` begins never ends")
    own = {key: value for key, value in pairs if not key.startswith("after.")}
    earlier = {key: value for key, value in pairs if key.startswith("after.")}
    schema = _schema(declared)
    base = _merge(_yaml_layers(data, model), schema)
    chosen = dict(base)
    for key, value in own.items():
        key = ALIASES.get(key, key)
        chosen[key] = _parse(key, value, schema, "the command line")
    if chosen["model_dir"] and not chosen["test_only"]:
        raise UserError(f"model_dir {chosen['model_dir']} is evaluated, not trained on: add `test_only True`")
    if chosen["model_dir"] and chosen["zero_shot"]:
        raise UserError(f"zero_shot loads no checkpoint: leave out model_dir {chosen['model_dir']}, or zero_shot")
    if earlier and not chosen["after"]:
        raise UserError(f"'{next(iter(earlier))}': this run has no stage before it; `after` names one")
    chosen["micro_explicit"] = "micro_batch_size" in own
    for values in (base, chosen):
        values["coupled_micro"] = _coupled_micro(values, declared)
    chosen["run_name"] = run_name(chosen, base, earlier)
    chosen["test_key"] = test_key(chosen, base)
    before: list[CfgNode] = []
    if chosen["after"]:
        if chosen["after"] not in names("model"):
            raise unknown("model config in after", chosen["after"], names("model"))
        before = _stages(data, chosen["after"], _inherited(pairs, chosen["output_dir"]), declared, depth + 1)
        chosen["after_hash"] = config_hash(before[-1])
    return [*before, _freeze(chosen)]


def _coupled_micro(values: Values, declared: Declared) -> int | None:
    """The micro-batch size where the result depends on it, else None."""
    size = values["micro_batch_size"]
    if not declared.couples(values) or size is None:
        return None
    if size == "auto":
        raise UserError("micro_batch_size auto: here the loss depends on it, so it must not depend on memory; name one")
    return int(size) if size < values["batch_size"] else None


def _inherited(pairs: list[tuple[str, str]], output_dir: str | None) -> list[tuple[str, str]]:
    """What of the command line reaches the stage before: data, runtime and shared keys, and `after.KEY`.

    Not `resume`: the stage before is an ordinary run, reused when it is finished; `after.resume False` repeats it.
    """
    passed = [
        (key, value)
        for key, value in pairs
        if key in SHARED or (key in SCHEMA and SCHEMA[key].cls == RUNTIME and key not in LAST_ONLY)
    ]
    if output_dir:
        passed.append(("output_dir", f"{output_dir}/stage1"))
    return passed + [(key.removeprefix("after."), value) for key, value in pairs if key.startswith("after.")]


def _yaml_layers(data: str, model: str) -> list[tuple[str, Values]]:
    """(where it stands, values) in merge order, the loader's own keys first."""
    data_path, model_path = _find("data", data), _find("model", model)
    body = _read_yaml(model_path)
    by_dataset = body.pop("by_dataset", {})
    if not isinstance(by_dataset, dict) or not all(isinstance(each, dict) for each in by_dataset.values()):
        raise UserError(f"{model_path}: by_dataset must map patterns of data names to options")
    name = data_path.stem
    shipped = data_path.resolve().parent == FOLDER / "data"
    own = {"data": name, "model": model_path.stem, "data_dir": "" if shipped else str(data_path.parent.resolve())}
    of_data = _read_yaml(data_path)
    final = {key: value for key, value in of_data.items() if key in SCHEMA and SCHEMA[key].data_wins}
    layers = [("", own), (str(data_path), of_data), (str(model_path), body), (str(data_path), final)]
    fitting = sorted((pattern for pattern in by_dataset if fnmatchcase(name, pattern)), key=_specificity)
    return layers + [(f"{model_path}: by_dataset: {pattern}", by_dataset[pattern]) for pattern in fitting]


def _specificity(pattern: str) -> tuple[bool, int]:
    """Sorts patterns so that the most specific comes last: names without wildcards, then the longest."""
    return (not any(char in pattern for char in "*?["), len(pattern))


def _find(kind: str, name: str) -> Path:
    """A shipped config by name; a data config also by path."""
    if kind == "data" and (name.endswith((".yaml", ".yml")) or "/" in name):
        if not os.path.isfile(name):  # `Path.is_file` raises where a name is too long to be one
            raise UserError(f"data config '{printable(name)}' does not exist")
        try:
            check_text(Path(name).name)
        except ValueError as error:
            raise UserError(f"data config '{printable(name)}': its name must be {error}; rename the file") from None
        return Path(name)
    return lookup(names(kind), name, f"{kind} config")


def _read_yaml(path: Path) -> Values:
    body = read_yaml(path)
    body = {} if body is None else body
    if not isinstance(body, dict) or any(not isinstance(key, str) for key in body):
        raise UserError(f"{path}: must hold `key: value` lines")
    return {ALIASES.get(key, key): value for key, value in body.items()}


def _merge(layers: list[tuple[str, Values]], schema: dict[str, Key]) -> Values:
    merged = {key: each.default for key, each in schema.items()}
    for where, values in layers:
        for key, value in values.items():
            merged[key] = value if where == "" else _parse(key, value, schema, where)
    return merged


def _parse(key: str, value: Any, schema: dict[str, Key], where: str) -> Any:
    """`value` as the type declared for `key`."""
    if key not in schema or schema[key].internal:
        mine = (each for each in schema if not schema[each].internal)
        raise UserError(f"{where}: {unknown('option', key, mine, KNOWN_AS)}")
    entry = schema[key]
    if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
        if entry.optional or entry.default is None:
            return None
        if value is None:
            raise UserError(f"{where}: {key} must not be none")
    try:
        check_text(value)
        parsed = entry.parse(value)
    except ValueError as error:
        raise UserError(f"{where}: {key} must be {error}, not '{printable(value)}'") from None
    if entry.choices and parsed not in entry.choices:
        raise UserError(f"{where}: {unknown(f'value of {key}', str(parsed), entry.choices)}")
    if problem := entry.beyond(parsed):
        raise UserError(f"{where}: {key} must be {problem}")
    return parsed


def _freeze(values: Values) -> CfgNode:
    node = CfgNode()
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        if group:
            node.setdefault(group, CfgNode())[name] = value
        else:
            node[key] = value
    node.freeze()
    return node
