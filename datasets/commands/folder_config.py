"""The data config of a folder that `-d FOLDER` names: it is made once, by the rules of `data new`, and then reused."""

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from tailtune.configs.atomic_file import atomic_file, atomic_folder
from tailtune.configs.errors import UserError
from tailtune.configs.launch_environment import world_size
from tailtune.configs.program import print_text
from tailtune.configs.yaml_reader import read_yaml
from tailtune.datasets.commands.new import NewRequest, config_name, new_data, split_command
from tailtune.datasets.commands.result_files import cannot_write
from tailtune.datasets.sources.image_folder import SPLITS, class_folders


@contextmanager
def config_of_folder(data: str, outputs: Path, defaults: Mapping[str, Any], keep: bool = True) -> Iterator[str]:
    """The path of the YAML of a folder with class folders, or with `train/<class>/…`.

    It lies in `<outputs>/<name>_data/`, with the lists of the split. If it is there already, it is used again, so that
    all runs on the folder, and resumed runs, have the same split.

    Args:
        data: the folder of the images.
        outputs: the folder of all runs.
        defaults: default of each option, of which `many_above` and `few_below` are used.
        keep: False: what is made is removed at the end of the block.

    Raises:
        UserError: no class folders with images, the split of another folder, or several processes that would make it.
    """
    folder = Path(data)
    name = config_name(folder)
    home = outputs / f"{name}_data"
    names = set(class_folders(folder))
    split = names <= set(SPLITS)
    images = folder / "train" if split and "test" not in names else folder
    if Path(os.path.realpath(home)).is_relative_to(os.path.realpath(images)):
        raise UserError(
            f"the folder of the images, {os.path.abspath(images)}, holds {outputs}/, where the split and the runs go: "
            "start the command in another folder"
        )
    if os.path.lexists(home):
        yield str(_used_again(home / f"{name}.yaml", images))
        return
    if world_size() > 1:
        raise UserError(
            f"{folder} has no split yet, and several processes cannot make it: start `{split_command(images)} "
            f"--output {shlex.quote(str(home))}` first"
        )
    shots = {key: defaults[key] for key in ("many_above", "few_below")}
    with TemporaryDirectory() as scratch:
        target = home if keep else Path(scratch, home.name)
        if split and "test" in names:
            _write(target, name, {"dataset": "ImageFolder", "root": os.path.abspath(images), **shots})
        else:
            made = new_data(NewRequest(images, target, many_above=shots["many_above"], few_below=shots["few_below"]))
            made += _not_read(folder / "val") if split and "val" in names else ""
            print_text(made if keep else f"would be made, not written: {made.replace(str(target), str(home), 1)}")
        yield str(target / f"{name}.yaml")


def _not_read(val: Path) -> str:
    return f"\n  note: {val} is not read; a YAML with dataset ImageFolder makes it the validation split"


def _used_again(path: Path, images: Path) -> Path:
    """The YAML that an earlier run has made.

    Raises:
        UserError: it is of other images, or missing.
    """
    values = read_yaml(path) if path.is_file() else None
    root = values.get("root") if isinstance(values, dict) else None
    if root != os.path.abspath(images):
        found = f"holds the split of {root}" if root else f"has no {path.name}"
        command = f"{split_command(images)} --output FOLDER"
        raise UserError(f"{path.parent} {found}; rename one of the folders, or make a YAML: `{command}`")
    print_text(f"the split of {path.parent} is used; images that were added later are not in it")
    return path


def _write(home: Path, name: str, values: Mapping[str, Any]) -> None:
    text = f"# the folder of -d {values['root']}\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)}"
    try:
        with atomic_folder(home) as made, atomic_file(made / f"{name}.yaml") as file:
            file.write(text.encode(errors="surrogateescape"))
    except OSError as error:
        raise cannot_write(home, error) from error
