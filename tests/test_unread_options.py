"""Options that the command line sets, and that no chosen tuner, loss, classifier or method reads, end in one line."""

from collections.abc import Callable

import pytest
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.unread_options import refuse_unread_tuner_options
from tailtune.trainers.config_checks import check

Config = Callable[..., CfgNode]
UNREAD = {
    "adapter_dim 4": "adapter_dim 4 does nothing: no tuner that reads it is on (lora, lora_mlp, adapter …)",
    "lora_layers 1 adaptformer True": "lora_layers 1",
    "lora_layers 1 text_lora True classifier TextClassifier": "lora_layers 1",
    "text_mask_ratio 0.1 text_aft True classifier TextClassifier": "text_mask_ratio 0.1",
    "text_adapter_dim 8 adapter True": "text_adapter_dim 8",
    "mask_seed 0": "mask_seed 0",
}
READ = (
    "adapter_dim 4 lora_mlp True",
    "mask_seed 1 text_mask True classifier TextClassifier",
    "text_adapter_dim 8 text_lora True classifier TextClassifier",
    "lora_layers none",
    "partial 1",
)


@pytest.mark.parametrize("words", UNREAD)
def test_an_option_without_its_tuner_is_named(words: str, config: Config) -> None:
    with pytest.raises(UserError) as error:
        refuse_unread_tuner_options(config("fake_lt", "tiny_clip", *words.split()))
    assert UNREAD[words] in str(error.value)


@pytest.mark.parametrize("words", READ)
def test_an_option_with_a_tuner_that_reads_it_passes(words: str, config: Config) -> None:
    refuse_unread_tuner_options(config("fake_lt", "tiny_clip", *words.split()))


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_reads_its_own_layers(name: str, config: Config) -> None:
    refuse_unread_tuner_options(config("fake_lt", "tiny_clip", name, "True", f"{name}_layers", "1"))
    with pytest.raises(UserError, match=f"{name}_layers 1 does nothing"):
        refuse_unread_tuner_options(config("fake_lt", "tiny_clip", f"{name}_layers", "1"))


def test_a_model_config_may_hold_options_of_a_tuner_that_the_command_line_turns_off(config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip_peft", "adaptformer", "False")
    assert cfg.adapter_dim == 8
    refuse_unread_tuner_options(cfg)


@pytest.mark.parametrize("ensemble", ["gla", "logits"])
def test_the_zero_shot_classifier_of_a_run_leaves_out_what_only_its_tuners_read(ensemble: str, config: Config) -> None:
    check(config("fake_lt", "tiny_clip_peft", "adapter_dim", 4, "test_only", True, "ensemble", ensemble))


OF_OTHERS = {
    "tau 2 loss_type BS": "tau 2.0 does nothing: nothing but loss_type LA reads it; leave tau out",
    "scale 30 classifier LinearClassifier": "loss_type LDAM or loss_type GCL or classifier CosineClassifier reads it",
    "tipadapter.alpha 2": "tipadapter.alpha 2.0",
    "ride.diversity -1": "method ride",
    "method mixup mixup.inner sade num_experts 2 ride.diversity -1": "method ride",
}
READ_BY_CHOSEN = (
    "tau 2",
    "scale 30 classifier LinearClassifier loss_type LDAM",
    "method mixup mixup.inner ride num_experts 2 loss_type CE ride.diversity -1",
    "tau 1 loss_type BS",
)


@pytest.mark.parametrize("words", OF_OTHERS)
def test_an_option_of_another_loss_classifier_or_method_is_named(words: str, config: Config) -> None:
    with pytest.raises(UserError) as error:
        check(config("fake_lt", "tiny_clip", "pretrained", "none", *words.split()))
    assert OF_OTHERS[words] in str(error.value)


@pytest.mark.parametrize("words", READ_BY_CHOSEN)
def test_an_option_of_what_is_chosen_or_its_default_passes(words: str, config: Config) -> None:
    check(config("fake_lt", "tiny_clip", "pretrained", "none", *words.split()))


def test_a_model_config_may_hold_options_of_a_loss_that_the_command_line_replaces(config: Config) -> None:
    cfg = config("cifar10_ir100", "resnet32_ride", "loss_type", "CE", "method", "classify")
    assert cfg.ride.diversity == -0.45
    check(cfg)
