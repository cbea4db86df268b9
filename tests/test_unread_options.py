"""Options of tuners that the command line sets, and that no chosen tuner reads, end in one line."""

from collections.abc import Callable

import pytest
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.unread_options import refuse_unread_options

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
        refuse_unread_options(config("fake_lt", "tiny_clip", *words.split()))
    assert UNREAD[words] in str(error.value)


@pytest.mark.parametrize("words", READ)
def test_an_option_with_a_tuner_that_reads_it_passes(words: str, config: Config) -> None:
    refuse_unread_options(config("fake_lt", "tiny_clip", *words.split()))


@pytest.mark.parametrize("name", TUNERS)
def test_every_tuner_reads_its_own_layers(name: str, config: Config) -> None:
    refuse_unread_options(config("fake_lt", "tiny_clip", name, "True", f"{name}_layers", "1"))
    with pytest.raises(UserError, match=f"{name}_layers 1 does nothing"):
        refuse_unread_options(config("fake_lt", "tiny_clip", f"{name}_layers", "1"))


def test_a_model_config_may_hold_options_of_a_tuner_that_the_command_line_turns_off(config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip_peft", "adaptformer", "False")
    assert cfg.adapter_dim == 8
    refuse_unread_options(cfg)
