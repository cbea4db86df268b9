"""Builds frozen configs, one for each stage of a run, from config names and `KEY VALUE` pairs.

Merge order: defaults < data YAML < model YAML < the model YAML's `by_dataset` entries whose pattern matches the data
name (most specific last) < pairs. Every value is parsed to the type that the schema declares for its key.
"""

import os
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from yacs.config import CfgNode

from tailtune.configs.command_words import separated
from tailtune.configs.config_files import describe, find_config, is_shipped, names
from tailtune.configs.errors import UserError, lookup, printable, unknown
from tailtune.configs.key import TRAIN
from tailtune.configs.known_as import KNOWN_AS
from tailtune.configs.run_names import config_hash, run_name, test_key, values_of
from tailtune.configs.schema import Config, Schema, schema_of, with_values
from tailtune.configs.unread_options import refuse_unread_options
from tailtune.configs.value_parsers import check_text
from tailtune.configs.yaml_reader import read_yaml

__all__ = [
    "CfgNode",
    "Schema",
    "UserError",
    "config_hash",
    "describe",
    "load_configs",
    "load_data_config",
    "load_resolved",
    "lookup",
    "names",
    "schema_of",
    "values_of",
    "with_values",
]

MODEL_LAYER = 2
"""Place of the model YAML in `_yaml_layers`."""
AFTER = "after."
"""Prefix of an option's name that assigns the option to the previous stage."""
Values = dict[str, Any]


def load_configs(
    data: str, model: str, pairs: Sequence[str], schema: Schema, where: str = "the command line"
) -> list[CfgNode]:
    """Build the frozen configs of all stages. The last one is the config of the requested run.

    Args:
        data: name of a file in configs/data, or the path of a YAML.
        model: name of a file in configs/model, or the path of a YAML.
        pairs: `KEY VALUE KEY=VALUE …`; `after.KEY` sets an option of the previous stage.
        schema: all options.
        where: where the pairs come from, for messages.

    Raises:
        UserError: a name or key is unknown, a value has the wrong type, a key has no value, or a YAML is unreadable.
    """
    return _stages(data, model, _pair_up(pairs, schema), schema, where, depth=0)


def load_data_config(data: str, pairs: Sequence[str], schema: Schema, where: str = "the command line") -> CfgNode:
    """Build the frozen config of a data set without a model. The options of models have their defaults.

    Args:
        data: name of a file in configs/data, the path of a YAML, or a folder with `train/<class>/…`.
        pairs: `KEY VALUE KEY VALUE …`.
        schema: all options.
        where: where the pairs come from, for messages.

    Raises:
        UserError: as `load_configs`.
    """
    layers = _layers_of_data(data, schema)
    values = _merge(layers, schema)
    return _freeze(values | {key: _parse(key, value, schema, where) for key, value in _pair_up(pairs, schema)}, schema)


def options_of_data(data: str, pairs: Sequence[str], schema: Schema, where: str = "the command line") -> dict[str, Any]:
    """The options that a data config and pairs set, as values for another data config.

    Args:
        data: as for `load_data_config`.
        pairs: `KEY VALUE KEY VALUE …`.
        schema: all options.
        where: where the pairs come from, for messages.

    Raises:
        UserError: as `load_configs`.
    """
    given = {key: _parse(key, value, schema, data) for key, value in _layers_of_data(data, schema)[-1][1].items()}
    return given | {key: _parse(key, value, schema, where) for key, value in _pair_up(pairs, schema)}


def _layers_of_data(data: str, schema: Schema) -> list[tuple[str, Values]]:
    """The layers of a data config, or of a folder with `train/<class>/…`."""
    if data not in names("data") and os.path.isdir(data):
        folder = {"dataset": "ImageFolder", "root": os.path.abspath(data)}
        return [("", {"data": os.path.basename(folder["root"])}), (data, folder)]
    return _data_layers(find_config("data", data), schema)


def load_resolved(path: Path, schema: Schema, pairs: Sequence[str] = ()) -> CfgNode:
    """Load the frozen config of a run from its `config.yaml`. Missing options get what earlier versions did.

    Args:
        path: the file.
        schema: all options.
        pairs: `KEY VALUE KEY VALUE …`, options of the evaluation or of the machine that replace those of the file.

    Raises:
        UserError: the file is unreadable, contains an option that this version does not have, or a pair is wrong.
    """
    values = schema.defaults | schema.earlier
    stored = _read_yaml(path, schema)
    if "data" not in stored:
        raise UserError(f"{path} is no run's config")
    for key, value in stored.items():
        values[key] = value if key in schema and schema[key].internal else _parse(key, value, schema, str(path))
    given = {key: _parse(key, value, schema, "the command line") for key, value in _pair_up(pairs, schema)}
    for key in given:
        if schema[key].cls == TRAIN:
            raise UserError(f"{key} belongs to the training of a run, which has ended: leave it out")
    internal = {"given": list(given) or None, "test_key": test_key(schema, values | given, values)}
    return _freeze(values | given | internal, schema)


def _pair_up(words: Sequence[str], schema: Schema) -> list[tuple[str, str]]:
    """Pairs (name of the option, text of its value), also for options of previous stages."""
    words = separated(words)
    if len(words) % 2:
        raise UserError(f"options come as KEY VALUE or KEY=VALUE, but '{printable(words[-1])}' has no value")
    return [(_full_name(word, schema), value) for word, value in zip(words[::2], words[1::2], strict=True)]


def _full_name(word: str, schema: Schema) -> str:
    """Replace an alias by the name of its option, after any number of prefixes `after.`."""
    name = word.removeprefix(AFTER)
    return schema.name(word) if name == word else AFTER + _full_name(name, schema)


def _stages(
    data: str, model: str, pairs: list[tuple[str, str]], schema: Schema, where: str, depth: int
) -> list[CfgNode]:
    if depth > 4:
        raise UserError(f"model config '{model}': the chain that its `after` begins never ends")
    given = {key: value for key, value in pairs if not key.startswith(AFTER)}
    earlier = {key: value for key, value in pairs if key.startswith(AFTER)}
    layers = _yaml_layers(data, model, schema)
    base = _merge(layers, schema)
    chosen = base | {key: _parse(key, value, schema, where) for key, value in given.items()}
    if chosen["model_dir"] and not chosen["test_only"]:
        raise UserError(f"model_dir {chosen['model_dir']} is evaluated, not trained on: add `test_only True`")
    if chosen["model_dir"] and chosen["zero_shot"]:
        raise UserError(f"zero_shot loads no checkpoint: leave out model_dir {chosen['model_dir']}, or zero_shot")
    if earlier and not chosen["after"]:
        raise UserError(f"'{next(iter(earlier))}': this run has no stage before it; `after` names one")
    chosen["given"] = list(given) or None
    chosen["micro_explicit"] = "micro_batch_size" in given
    for values in (base, chosen):
        values["coupled_micro"] = _coupled_micro(values, schema)
    chosen["run_name"] = run_name(schema, chosen, base, earlier)
    chosen["test_key"] = test_key(schema, chosen, base)
    before: list[CfgNode] = []
    if chosen["after"]:
        if chosen["after"] not in names("model"):
            raise unknown("model config in after", chosen["after"], names("model"))
        passed = _inherited(pairs, chosen["output_dir"], schema)
        before = _stages(data, chosen["after"], passed, schema, where, depth + 1)
        chosen["after_hash"] = config_hash(before[-1])
    if chosen["model_file"]:
        _refuse_unread_in_yaml(*layers[MODEL_LAYER], schema)
    return [*before, _freeze(chosen, schema)]


def _refuse_unread_in_yaml(path: str, own: Values, schema: Schema) -> None:
    """Refuse a training option of the user's model YAML that nothing reads, whatever the command line says.

    Options of a switch are allowed, such as the size of a tuner that the command line may turn on.
    """
    values = _merge([(path, own)], schema)
    trained = [key for key in map(schema.name, own) if schema[key].cls == TRAIN]
    given = [key for key in trained if not any(schema.defaults.get(reader) is False for reader in schema.readers[key])]
    refuse_unread_options(_freeze(values | {"given": given}, schema), f"{path}: ")


def _coupled_micro(values: Values, schema: Schema) -> int | None:
    """The micro-batch size, in images, if the result depends on it; otherwise None."""
    size = values["micro_batch_size"]
    if not schema.couples(values) or size is None:
        return None
    if size == "auto":
        raise UserError("micro_batch_size auto: here the loss depends on it, so it must not depend on memory; name one")
    return int(size) if size < values["batch_size"] else None


def _inherited(pairs: list[tuple[str, str]], output_dir: str | None, schema: Schema) -> list[tuple[str, str]]:
    """The options of the command line that apply to the previous stage: options of every stage, and `after.KEY`.

    `resume` is not among them. The previous stage is an ordinary run, which is reused if it is finished.
    `after.resume False` repeats it.
    """
    passed = [(key, value) for key, value in pairs if key in schema and schema[key].every_stage]
    if output_dir:
        passed.append(("output_dir", f"{output_dir}/stage1"))
    return passed + [(key.removeprefix(AFTER), value) for key, value in pairs if key.startswith(AFTER)]


def _yaml_layers(data: str, model: str, schema: Schema) -> list[tuple[str, Values]]:
    """Pairs (source, values) in merge order. The first one holds the internal keys of the loader."""
    data_path, model_path = find_config("data", data), find_config("model", model)
    body = _read_yaml(model_path, schema)
    by_dataset = body.pop("by_dataset", {})
    if not isinstance(by_dataset, dict) or not all(isinstance(values, dict) for values in by_dataset.values()):
        raise UserError(f"{model_path}: by_dataset must map patterns of data names to options")
    name = data_path.stem
    (_, internal), (_, of_data) = _data_layers(data_path, schema)
    if "dataset" in body:
        raise UserError(f"{model_path} is a data config, because it sets `dataset`: give it with -d")
    own = not is_shipped("model", model_path)
    internal |= {"model": model_path.stem, "model_file": str(model_path.resolve()) if own else ""}
    final = {key: value for key, value in of_data.items() if key in schema and schema[key].data_wins}
    layers = [("", internal), (str(data_path), of_data), (str(model_path), body), (str(data_path), final)]
    fitting = sorted((pattern for pattern in by_dataset if fnmatchcase(name, pattern)), key=_specificity)
    return layers + [(f"{model_path}: by_dataset: {pattern}", by_dataset[pattern]) for pattern in fitting]


def _data_layers(path: Path, schema: Schema) -> list[tuple[str, Values]]:
    """The internal keys that the path of a data config gives, and the values of the file."""
    shipped = is_shipped("data", path)
    internal = {"data": path.stem, "data_dir": "" if shipped else str(path.parent.resolve())}
    return [("", internal), (str(path), _read_yaml(path, schema))]


def _specificity(pattern: str) -> tuple[bool, int]:
    """Sort key for patterns. Longer patterns come later, and names without wildcards come last."""
    return (not any(char in pattern for char in "*?["), len(pattern))


def _read_yaml(path: Path, schema: Schema) -> Values:
    body = read_yaml(path)
    body = {} if body is None else body
    if not isinstance(body, dict) or any(not isinstance(key, str) for key in body):
        raise UserError(f"{path}: must hold `key: value` lines")
    return {schema.name(key): value for key, value in body.items()}


def _merge(layers: list[tuple[str, Values]], schema: Schema) -> Values:
    merged = schema.defaults
    for where, values in layers:
        for key, value in values.items():
            key = schema.name(key)
            merged[key] = value if where == "" else _parse(key, value, schema, where)
    return merged


def _parse(key: str, value: Any, schema: Schema, where: str) -> Any:
    """Parse and check a value with the type and limits that the schema declares for `key`."""
    if key not in schema or schema[key].internal:
        raise UserError(f"{where}: {unknown('option', key, schema.settable(), KNOWN_AS)}")
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


def _freeze(values: Values, schema: Schema) -> CfgNode:
    node = Config(schema)
    for key, value in values.items():
        group, _, name = key.rpartition(".")
        if group:
            node.setdefault(group, CfgNode())[name] = value
        else:
            node[key] = value
    node.freeze()
    return node
