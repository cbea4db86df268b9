"""Every command line of LIFT's scripts, of both generations: generated, accepted, and every option at work.

The digests are of the original's lines, sorted, comments and surplus spaces taken out (shijxcs/LIFT, June 2024, and
its May 2024 state, PEL). So the grids say what the original says, word for word.
"""

import hashlib
import json
from functools import cache
from itertools import chain
from typing import Any

import pytest
from conftest import Cli
from tiers import slow_except

from tailtune.configs import CfgNode, load_configs, values_of
from tailtune.configs.key import TEST, TRAIN
from tailtune.scripts import _grid
from tailtune.trainers.config_checks import check
from tailtune.trainers.dry_run import dry_run
from tailtune.trainers.option_schema import declared

SCHEMA = declared()

ORIGINAL = {
    "lift/fig10_partial_ft": (126, "c9e6ad4b986681fa"),
    "lift/fig11_expand_sizes": (36, "96cfd294c00b879f"),
    "lift/fig2_zsclip": (11, "27370472c0a41078"),
    "lift/fig4_ft_ratio": (120, "142856a7a6c77dda"),
    "lift/fig6_adapter_dim": (29, "976ac0a4883817ce"),
    "lift/tab12_tte_methods": (6, "afbb0c2396556448"),
    "lift/tab13_init_prompts": (5, "441e708b7c1337a3"),
    "lift/tab14_epochs": (24, "733226df22943621"),
    "lift/tab15_classifiers": (21, "574103baba8d5678"),
    "lift/tab16_losses": (21, "243dcce22781f897"),
    "lift/tab17to23_backbones": (17, "0dcca715c57e7808"),
    "lift/tab1to4_main_results": (15, "237f3982041b7536"),
    "lift/tab5_ablation": (10, "458175e8ae5da3a0"),
    "lift/tab6_peft_methods": (20, "5a4264c8b49b61c8"),
    "lift/tab7_init_methods": (6, "a7687676edb89d94"),
    "lift/tab8_training_acc": (15, "b3eb20e94df262da"),
    "pel/adapter_dim": (29, "fc02ac3b7dfd454e"),
    "pel/cifar_in21k": (3, "1cf57328341c89ea"),
    "pel/classifiers": (21, "12258e9cd6f4b939"),
    "pel/expand_sizes": (39, "b700ce43f2170d05"),
    "pel/inat_epochs": (12, "5c72cb71fc2e4ee1"),
    "pel/init_methods": (6, "f0125058ff6c2877"),
    "pel/losses": (14, "1b922f9986cce1ef"),
    "pel/main": (6, "038274cffe0b0d4c"),
    "pel/main_without_tte": (6, "20a02e178f08ed2f"),
    "pel/partial_ft": (126, "35ed8b6f0db41a18"),
    "pel/peft_methods": (20, "1a4baafe90dc07e2"),
    "pel/training_acc": (15, "dc9f3220947a8905"),
}
"""Grid → number of lines of the original's script and the start of their SHA-256."""

CLASSES = {"imagenet_lt": 1000, "places_lt": 365, "inat2018": 8142}
RANKS = dict(zip("kpcofgs", (6, 25, 57, 272, 1118, 4401, 8142), strict=True))
AUTO_RANK = {100: 4, 365: 8, 1000: 32, 8142: 256}
FIXED = {"bias_tuning": 101_376, "ln_tuning": 36_864, "vpt_shallow": 7_680, "vpt_deep": 92_160}
FIXED |= {"ssf_attn": 73_728, "ssf_mlp": 92_160, "ssf_ln": 36_864}
RESNET = {("bias_tuning",): 33_792, ("ssf_attn",): 2_048, ("bias_tuning", "ssf_attn"): 35_840}
LARGE = {365: 270_456, 1000: 860_568, 8142: 6_368_280}
"""Learned parameters that the original prints (LIFT specification §13.1)."""

NOT_BUILT = (
    "model",
    "run_name",
    "test_key",
    "lr",
    "num_epochs",
    "test_only",
    *(k for k in SCHEMA if SCHEMA[k].cls == TEST),
)
"""Keys that building a model, a method and the facts of a data set does not ask for; `-m slow` builds every line."""

REPRESENTATIVE = "one line of each kind"
FEW = ["lift/fig11_expand_sizes", "lift/tab12_tte_methods", "lift/tab13_init_prompts", "pel/training_acc"]
"""Scripts whose last line goes through the command line itself in the default tier; in `-m slow` all."""

each_grid = pytest.mark.parametrize("name", ORIGINAL)
few_lines = pytest.mark.parametrize("name", slow_except([REPRESENTATIVE], [REPRESENTATIVE, *ORIGINAL]))
built: dict[str, dict[str, int]] = {}


@cache
def lines(name: str) -> list[tuple[str, ...]]:
    """Of a grid, or of all grids those in which a config, an option or a name as its value occurs first."""
    if name != REPRESENTATIVE:
        return [cell.words for cell in _grid.read(name).cells]
    known: set[tuple[str, ...]] = set()
    found = []
    for words in chain.from_iterable(map(lines, ORIGINAL)):
        pairs = list(zip(words[::2], words[1::2], strict=True))
        kinds = {(key,) if any(letter.isdigit() for letter in value) else (key, value) for key, value in pairs[2:]}
        kinds |= set(pairs[:2])
        if kinds - known:
            found.append(words)
            known |= kinds
    return found


def configured(words: tuple[str, ...], pairs: bool = True) -> CfgNode:
    return load_configs(words[1], words[3], words[4:] if pairs else (), declared())[-1]


def params(cfg: CfgNode) -> dict[str, int]:
    """Parameter counts; what differs in learning rate or evaluation is built once."""
    key = json.dumps({k: v for k, v in values_of(cfg).items() if k not in NOT_BUILT}, sort_keys=True)
    if key not in built:
        built[key] = check(cfg).counts()
    return built[key]


def test_all_grids_of_the_original_are_here() -> None:
    assert {name for name in _grid.names() if name.startswith(("lift/", "pel/"))} == set(ORIGINAL)
    assert sum(number for name, (number, _) in ORIGINAL.items() if name.startswith("lift/")) == 482
    assert sum(number for number, _ in ORIGINAL.values()) == 779


@each_grid
def test_a_grid_generates_the_lines_of_the_original(name: str) -> None:
    commands = sorted(" ".join(("python main.py", *words)) for words in lines(name))
    assert (len(commands), hashlib.sha256("\n".join(commands).encode()).hexdigest()[:16]) == ORIGINAL[name]


@few_lines
def test_every_option_of_a_line_is_in_the_config_and_in_the_names(name: str) -> None:
    for words in lines(name):
        cfg, base = configured(words), configured(words, pairs=False)
        for key, text in zip(words[4::2], words[5::2], strict=True):
            key = SCHEMA.name(key)
            value = None if text == "None" else SCHEMA[key].parse(text)
            assert cfg[key] == value, (words, key)
            changed = value != base[key]
            assert (f"_{key}_{text}" in cfg.run_name) == (changed and SCHEMA[key].cls == TRAIN), (words, key)
            shown = "train" if key == "test_train" else f"{key}_{text}"
            assert (shown in cfg.test_key) == (changed and SCHEMA[key].cls == TEST), (words, key)
        assert (cfg.test_key == "default") == (values_of(cfg, TEST) == values_of(base, TEST))


@few_lines
def test_a_line_passes_the_dry_run_and_its_options_act_on_the_model(name: str) -> None:
    for words in lines(name):
        cfg = configured(words)
        counts = params(cfg)
        classes = class_count(words[1])
        assert (counts["tuner"], counts["head"]) == (tuner_params(cfg, classes), head_params(cfg, classes)), words


@pytest.mark.slow
@each_grid
def test_every_single_line_passes_the_dry_run(name: str) -> None:
    for words in lines(name):
        result, _ = dry_run(configured(words))
        assert result["gflops_per_image"] > 1, words


@pytest.mark.parametrize("name", slow_except(FEW, ORIGINAL))
def test_the_command_line_accepts_the_last_line_of_a_script(launch: Cli, name: str) -> None:
    words = lines(name)[-1]
    done = launch(*words, "--dry-run")
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert result["params"]["tuner"] == tuner_params(configured(words), class_count(words[1]))
    for key, text in zip(words[4::2], words[5::2], strict=True):
        assert str(result["config"][SCHEMA.name(key)]) in (text, text.removesuffix(".0"), f"{text}.0")


def class_count(data: str) -> int:
    return 100 if data.startswith("cifar") else RANKS[data[-1]] if data[:-1] == "inat2018_" else CLASSES[data]


def head_params(cfg: CfgNode, classes: int) -> int:
    wide = 1024 if "L/14" in cfg.backbone or "RN50" in cfg.backbone else 768
    width = 512 if cfg.zero_shot else wide
    return classes * width + (classes if cfg.classifier == "LinearClassifier" else 0)


def tuner_params(cfg: CfgNode, classes: int) -> int:
    """What the original counts as learned parameters, from the options of a line."""
    chosen = tuple(key for key in (*FIXED, "full_tuning", "mask", "adapter", "lora", "adaptformer") if cfg[key])
    rank = cfg.adapter_dim or AUTO_RANK.get(classes, 1)
    if not chosen:
        return 0
    if "RN50" in cfg.backbone:
        return RESNET[chosen]
    assert len(chosen) == 1, "the scripts never combine tuners of a ViT"
    if "L/14" in cfg.backbone:
        return LARGE[classes]
    layers = (2304 * 769, 768 * 769, 3072 * 769, 768 * 3073)  # qkv, proj, fc1, fc2 with their biases
    formulas = {
        "mask": 12 * sum(int(size * (cfg.mask_ratio or 0)) for size in layers),
        "full_tuning": 7_087_872 * (12 if cfg.partial is None else cfg.partial or 0),
        "adaptformer": 12 * (1537 * rank + 2305),
        "adapter": 12 * (1537 * rank + 2304),
        "lora": 12 * 4 * 768 * rank,
    }
    return {**FIXED, **formulas}[chosen[0]]
