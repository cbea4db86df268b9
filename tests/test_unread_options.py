"""Options on the command line that nothing reads, given the others, end in one line."""

import fnmatch
from collections.abc import Callable
from pathlib import Path

import pytest
from yacs.config import CfgNode

from tailtune.configs import names
from tailtune.configs.errors import UserError
from tailtune.configs.unread_options import refuse_unread_options
from tailtune.models.tuners.table import TUNERS
from tailtune.trainers.config_checks import check
from tailtune.trainers.option_schema import choices_of, declared
from tailtune.trainers.python_api import build_model

Config = Callable[..., CfgNode]
UNREAD = {
    "adapter_dim 4": "nothing without lora True or lora_mlp True or adapter True …; add one of them, or leave",
    "lora_layers 1 adaptformer True": "lora_layers 1 does nothing without lora True; add it, or leave lora_layers out",
    "lora_layers 1 text_lora True classifier TextClassifier": "lora_layers 1",
    "text_mask_ratio 0.1 text_aft True classifier TextClassifier": "text_mask_ratio 0.1",
    "text_adapter_dim 8 adapter True": "text_adapter_dim 8",
    "text_partial 1": "text_partial 1 does nothing without text_full_tuning True or",
    "mask_seed 0": "mask_seed 0 does nothing without mask True or text_mask True; add one of them",
    "tau 2 loss_type BS": "tau 2.0 does nothing without loss_type LA; add it, or leave tau out",
    "scale 30 classifier LinearClassifier": "without classifier CosineClassifier or loss_type LDAM or loss_type GCL;",
    "tipadapter.alpha 2": "tipadapter.alpha 2.0 does nothing without classifier TipAdapter",
    "ride.diversity -1": "without method ride",
    "method mixup mixup.inner sade num_experts 2 ride.diversity -1": "without method ride",
    "subset_seed 3": "subset_seed 3 does nothing without subset_cap",
    "expert_split 1": "expert_split 1 does nothing without num_experts",
    "adam_eps 0.1": "adam_eps 0.1 does nothing without optimizer adamw; add it, or leave adam_eps out",
    "adam_betas [0.9,0.99]": "without optimizer adamw",
    "optimizer adamw momentum 0.5": "without optimizer sgd",
    "optimizer adamw nesterov True": "nesterov True does nothing without optimizer sgd",
    "lr_steps [3,5]": "without schedule multistep",
    "schedule constant lr_gamma 0.5": "without schedule multistep",
    "sam_rho 0.1": "sam_rho 0.1 does nothing without sam sam or sam focal or sam gnm",
    "sam sam sam_gamma 2": "without sam focal",
    "sam gnm sam_rho_late 0.2": "without sam sam or sam focal",
    "mda_func max": "without augment mda",
    "context_len 4": "without context;",
    "context maple context_position front": "without context coop",
    "context coop context_depth 3": "without context maple",
    "clip_adapter_dim 4": "without clip_adapter;",
    "clip_adapter residual clip_adapter_ratio 0.5": "without clip_adapter original",
    "tte_mode tencrop": "tte_mode tencrop does nothing without tte True;",
    "tte True crop_margin 8": "crop_margin 8 does nothing without tte False",
    "test_dists uniform shift_ratios [7]": "without test_dists all",
    "shift_seed 1": "shift_seed 1 does nothing without test_dists or target_prior",
    "test_dists all dirichlet_trials 9": "without test_dists dirichlet*",
    "target_prior estimate adapt_batch_size 64": "without target_prior estimate_online or adapt sade",
    "ensemble_alpha 0.2": "without ensemble wise or ensemble logits",
    "test_only True ensemble gla ensemble_alpha 0.2": "ensemble_alpha 0.2 does nothing",
    "test_only True ensemble wise ensemble_runs other": "does nothing without ensemble soup",
    "adapt_lr 1": "without adapt sade or adapt sade_online",
}
READ = (
    "adapter_dim 4 lora_mlp True",
    "mask_seed 1 text_mask True classifier TextClassifier",
    "text_adapter_dim 8 text_lora True classifier TextClassifier",
    "text_partial 1 text_lora True classifier TextClassifier",
    "lora_layers none",
    "partial 1",
    "tau 2",
    "tau 1 loss_type BS",
    "scale 30 classifier LinearClassifier loss_type LDAM",
    "method mixup mixup.inner ride num_experts 2 loss_type CE ride.diversity -1",
    "subset_cap 5 subset_seed 3",
    "num_experts 2 expert_split 1",
    "tte True tte_mode tencrop expand 8",
    "crop_margin 8",
    "target_prior forward10 shift_order label",
    "test_dists uniform,dirichlet dirichlet_trials 9",
    "test_dists dirichlet-forward dirichlet_trials 9",
    "feature_cache False feature_cache_dir kept",
    "target_prior estimate_online adapt_seed 1",
    "adapt sade_online adapt_lr 1",
)


@pytest.mark.parametrize("words", UNREAD)
def test_an_option_that_nothing_reads_is_named(words: str, config: Config) -> None:
    with pytest.raises(UserError) as error:
        refuse_unread_options(config("fake_lt", "tiny_clip", *words.split()))
    assert UNREAD[words] in str(error.value)


@pytest.mark.parametrize("words", READ)
def test_an_option_that_is_read_or_has_its_default_passes(words: str, config: Config) -> None:
    refuse_unread_options(config("fake_lt", "tiny_clip", *words.split()))


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_reads_its_own_layers(name: str, config: Config) -> None:
    refuse_unread_options(config("fake_lt", "tiny_clip", name, "True", f"{name}_layers", "1"))
    with pytest.raises(UserError, match=f"{name}_layers 1 does nothing"):
        refuse_unread_options(config("fake_lt", "tiny_clip", f"{name}_layers", "1"))


def test_a_command_and_the_python_interface_check_it(config: Config) -> None:
    with pytest.raises(UserError, match="tte_mode tencrop does nothing"):
        check(config("fake_lt", "tiny_clip", "pretrained", "none", "tte_mode", "tencrop"))
    with pytest.raises(UserError, match="adapter_dim 4 does nothing"):
        build_model("tiny_clip", num_classes=3, pretrained=None, init_head=None, adapter_dim=4)


def test_a_model_yaml_may_set_what_its_switches_read_and_nothing_else_unread(config: Config, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("backbone: TinyCLIP\nadapter_dim: 4\nadapt_lr: 0.3\n")  # `lora True` and `adapt sade` may follow
    config("fake_lt", str(mine))
    mine.write_text("optimizer: sgd\nsam_rho: 0.1\n")
    with pytest.raises(UserError, match="mine.yaml: sam_rho 0.1 does nothing without sam sam"):
        config("fake_lt", str(mine), "sam", "sam")


def test_our_model_yamls_set_nothing_unread(config: Config, tmp_path: Path) -> None:
    for name, path in names("model").items():
        mine = tmp_path / f"{name}.yaml"
        mine.write_text(path.read_text())
        config("fake_lt", str(mine))


def test_an_unknown_name_is_told_first(config: Config) -> None:
    with pytest.raises(UserError, match="unknown loss_type 'LAX'"):
        check(config("fake_lt", "tiny_clip", "pretrained", "none", "loss_type", "LAX", "tau", "2"))


def test_what_must_be_set_exists() -> None:
    """And an option that the command line sets for all stages needs nothing, because not every stage has to read it."""
    schema = declared()
    for key, readers in schema.readers.items():
        assert not readers or not schema[key].every_stage, key
        for reader in readers:
            option, _, value = reader.partition(" ")
            assert option in schema, f"{key} is read with {option}, which is no option"
            choices = choices_of(option, schema[option])
            assert not value or not choices or fnmatch.filter(choices, value), f"{key}: {option} is never {value}"


@pytest.mark.parametrize(
    ("data", "words", "key", "value"),
    [
        ("fake_lt tiny_clip_peft", "adaptformer False", "adapter_dim", 8),
        ("cifar10_ir100 resnet32_ride", "loss_type CE method classify", "ride.diversity", -0.45),
    ],
)
def test_a_model_config_may_hold_options_of_what_the_command_line_replaces(
    data: str, words: str, key: str, value: float, config: Config
) -> None:
    cfg = config(*data.split(), *words.split())
    group, _, name = key.rpartition(".")
    assert (cfg[group] if group else cfg)[name] == value
    check(cfg)


@pytest.mark.parametrize("ensemble", ["gla", "logits"])
def test_the_zero_shot_classifier_of_a_run_leaves_out_what_only_its_tuners_read(ensemble: str, config: Config) -> None:
    check(config("fake_lt", "tiny_clip_peft", "adapter_dim", 4, "test_only", True, "ensemble", ensemble))
