"""docs/migrating/: every command of the originals' READMEs, and each of ours through the dry run."""

import hashlib
import re
import shlex

import pytest
from conftest import ROOT
from tiers import slow_except

from tailtune.configs import CfgNode, load_configs
from tailtune.main import split_arguments
from tailtune.models import resolve
from tailtune.scripts._grid import names
from tailtune.trainers.config_checks import check
from tailtune.trainers.option_schema import declared

PAGES = ROOT / "docs" / "migrating"
ORIGINAL = {
    "RIDE": (20, "e779853e7b800719"),
    "SADE": (14, "d0e089eb3c09596c"),
    "BatchFormer": (9, "d3551fe92687382c"),
    "DirMixE": (12, "2bbfbb659598cf57"),
    "H2T": (4, "70e91b40acdc26a4"),
    "BalPoE": (14, "4c22fa39f153f432"),
}
"""Commands of the READMEs, without quotes, sorted: number, digest. Commits: RIDE ab8be5c, SADE cba11b8, BatchFormer
305efaa, DirMixE 2b67827, H2T 3dafa70, BalPoE ca607ae, whose optional flag makes two commands of one."""
PARAMETERS = {
    "-d imagenet_lt -m resnext50_ride": 42_889_024,
    "-d imagenet_lt -m resnet10_ride": 9_401_792,
    "-d cifar100_ir100 -m resnet32_sade": 783_856,
    "-d inat2018 -m resnet50_sade": 76_587_584,
    "-d places_lt -m resnet152_sade": 171_543_616,
    "-d cifar10_ir100 -m resnet32_dirmixe": 770_896,
    "-d inat2018 -m resnet50_balpoe": 117_658_688,
    "-d cifar100_ir100 -m resnet32_dirmixe": 783_856,
    "-d imagenet_lt -m resnext50_dirmixe": 42_889_024,
    "-d inat2018 -m resnet50_dirmixe": 76_587_584,
}
Key = tuple[object, ...]
BUILT: dict[Key, int] = {}


def rows(title: str) -> list[tuple[str, str]]:
    """Both columns of the table of commands on the page of a project."""
    text = (PAGES / f"{title.lower()}.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `python")]
    return [(theirs, ours) for theirs, ours in lines]


def commands(column: str) -> list[str]:
    return [text.removeprefix("python main.py ") for text in re.findall(r"`(python main\.py [^`]*)`", column)]


OURS = sorted({command for title in ORIGINAL for _, ours in rows(title) for command in commands(ours)})


@pytest.mark.parametrize("title", ORIGINAL)
def test_every_command_of_a_readme_is_there(title: str) -> None:
    theirs = [re.findall(r"`(python [^`]*)`", column)[0] for column, _ in rows(title)]
    lines = sorted({" ".join(command.replace('"', "").split()) for command in theirs})
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]) == ORIGINAL[title]
    assert all(commands(ours) for _, ours in rows(title))


def configured(command: str) -> CfgNode:
    flags, pairs = split_arguments([word for word in shlex.split(command) if word != "--dry-run"])
    return resolve(load_configs(flags[1], flags[3], pairs, declared())[-1])


def total(cfg: CfgNode) -> int:
    """Parameters, of a network on the meta device; one that differs in nothing of the model is not built again."""
    options = (cfg.backbone, cfg.num_experts, cfg.expert_split, cfg.reduce_dimension, cfg.classifier, cfg.method)
    key = (*options, cfg.num_classes, cfg.data, cfg.after)
    if key not in BUILT:
        BUILT[key] = check(cfg).counts()["total"]
    return BUILT[key]


def test_our_commands_are_configs() -> None:
    for command in OURS:
        configured(command)


@pytest.mark.parametrize("command", slow_except(PARAMETERS, OURS))
def test_our_command_passes_the_dry_run(command: str) -> None:
    parameters = total(configured(command))
    assert parameters == PARAMETERS.get(command, parameters)


def test_flags_name_keys_of_ours() -> None:
    section = (PAGES / "index.md").read_text(encoding="utf-8").split("\n## Flags\n")[1].split("\n## ")[0]
    cfg = configured("-d cifar100_ir100 -m resnet32_ride")
    for line in section.splitlines():
        if not line.startswith("| `") or " | none" in line:
            continue
        for text in re.findall(r"`([^`]+)`", line.split(" | ")[1]):
            name = text.split()[0]
            section_of, _, field = name.partition(".")
            known = cfg[section_of] if field else cfg
            assert name.startswith("-") or (field or name) in known or name.endswith("Classifier"), text


def test_the_grids_that_the_pages_name_exist() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in sorted(PAGES.glob("*.md")))
    named = set(re.findall(r"scripts/reproduce\.py (\w+/\w+)", text))
    assert {"sade/imagenet_lt", "ride/model_zoo", "batchformer/ride"} <= named <= names().keys()
