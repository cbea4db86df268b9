"""The words of a command: KEY=VALUE, model configs of the user, and names that other projects use."""

from pathlib import Path

import pytest
from conftest import Cli

from tailtune.configs import UserError, load_configs, load_data_config
from tailtune.configs.command_words import separated
from tailtune.configs.known_as import VALUES_KNOWN_AS
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.main import split_arguments
from tailtune.models.heads.classifiers import HEADS
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.optimizers_and_schedules import OPTIMIZERS, SCHEDULES
from tailtune.trainers.option_schema import declared
from tailtune.trainers.precision import PRECISIONS


@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        ("lr=0.1 seed 3", ["lr", "0.1", "seed", "3"]),
        ("seed 3 lr=-1e-3 --dry-run", ["seed", "3", "lr", "-1e-3"]),
        ("lr=0.1 -h", ["lr", "0.1"]),
        ("prompt a={}=b seed=1", ["prompt", "a={}=b", "seed", "1"]),
        ("prompt=a={} sade.inverse_strength=2", ["prompt", "a={}", "sade.inverse_strength", "2"]),
        ("after.lr=1 root=", ["after.lr", "1", "root", ""]),
        ("lr -1 x/y=3 z", ["lr", "-1", "x/y=3", "z"]),
    ],
)
def test_an_equals_sign_joins_key_and_value(words: str, pairs: list[str]) -> None:
    assert split_arguments(words.split())[1] == pairs
    assert separated(pairs) == pairs, "what is separated stays as it is"


def test_both_spellings_are_the_same_run() -> None:
    of_pairs, of_words = (
        load_configs("fake_lt", "tiny_clip", words, declared())[-1]
        for words in (["lr", "0.3", "prompt", "a={}"], ["lr=0.3", "prompt=a={}"])
    )
    assert of_pairs == of_words and of_words.run_name.startswith("fake_lt_tiny_clip_lr_0.3_prompt_")
    assert load_data_config("fake_lt", ["num_classes=5"], declared()).num_classes == 5


def test_a_word_without_value_is_named_in_both_spellings() -> None:
    with pytest.raises(UserError, match="KEY VALUE or KEY=VALUE, but 'seed' has no value"):
        load_configs("fake_lt", "tiny_clip", ["lr=0.3", "seed"], declared())


def test_a_model_config_of_the_user(tmp_path: Path, launch: Cli) -> None:
    mine = tmp_path / "my model.yaml"
    mine.write_text("backbone: TinyCLIP\npretrained: none\nlora: true\nby_dataset: {fake_*: {adapter_dim: 2}}\n")
    cfg = load_configs("fake_lt", str(mine), ["lr=0.3"], declared())[-1]
    assert (cfg.lora, cfg.adapter_dim, cfg.model, cfg.model_file) == (True, 2, "my model", str(mine))
    assert cfg.run_name == "fake_lt_my-model_lr_0.3"
    assert load_configs("fake_lt", "tiny_clip", [], declared())[-1].model_file == ""
    mine.write_text("dataset: ImageFolder\nroot: images\n")
    with pytest.raises(UserError, match="my model.yaml is a data config, because it sets `dataset`: give it with -d"):
        load_configs("fake_lt", str(mine), [], declared())
    mine.write_text("lr: fast\n")
    with pytest.raises(UserError, match="my model.yaml: lr must be a number"):
        load_configs("fake_lt", str(mine), [], declared())
    done = launch("-d fake_lt -m none.yaml")
    assert (done.returncode, done.stderr) == (
        2,
        "error: model config 'none.yaml' does not exist: give the path of a YAML file\n",
    )


@pytest.mark.parametrize(
    ("option", "word", "meant"),
    [
        *(("", word, meant) for word, meant in (("learning_rate", "lr"), ("batch", "batch_size"))),
        *(("", word, meant) for word, meant in (("epochs", "num_epochs"), ("workers", "num_workers"))),
        *(("loss_type", word, "CE") for word in ("ce", "cross_entropy", "Cross-Entropy")),
        ("loss_type", "balanced_softmax", "BS"),
        ("prec", "bfloat16", "bf16"),
        ("optimizer", "Adam", "adamw"),
        ("schedule", "step", "multistep"),
    ],
)
def test_a_name_of_the_field_is_understood(option: str, word: str, meant: str, launch: Cli) -> None:
    done = launch(f"-d fake_lt -m tiny_clip pretrained none {f'{option}={word}' if option else f'{word}=1'}")
    assert done.returncode == 2 and f"did you mean '{meant}'?" in done.stderr and done.stderr.count("\n") == 1


def test_every_suggested_value_exists() -> None:
    tables = {"loss_type": LOSSES, "optimizer": OPTIMIZERS, "schedule": SCHEDULES, "sampler": SAMPLERS}
    tables |= {"classifier": HEADS, "prec": PRECISIONS}
    assert VALUES_KNOWN_AS.keys() == tables.keys()
    for option, values in VALUES_KNOWN_AS.items():
        assert set(values.values()) <= tables[option].keys()
        assert not values.keys() & tables[option].keys()
