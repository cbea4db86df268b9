"""PEFTS: the tuners of the peft library that can be used on an image encoder, and why others are refused."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tailtune.configs.errors import UserError, lookup


@dataclass(frozen=True)
class PeftType:
    """A tuner of peft.

    Args:
        type: peft's name of its type.
        args: fields of peft's configuration that we set; the user's `peft_args` override them.
        conv: whether it also wraps convolutions.
        frozen: whether the weights of the layers that it wraps must not train.
        sampled: whether it chooses positions in a layer by the values there, which the meta device does not have.
    """

    type: str
    args: Mapping[str, Any] = field(default_factory=dict)
    conv: bool = False
    frozen: bool = False
    sampled: bool = False


PEFTS: dict[str, PeftType] = {
    "LoRA": PeftType("LORA", conv=True),
    "rsLoRA": PeftType("LORA", {"use_rslora": True}, conv=True),
    "DoRA": PeftType("LORA", {"use_dora": True}, conv=True),
    # peft needs a number here; `AdaLora.before_training` sets the run's number of steps.
    "AdaLoRA": PeftType("ADALORA", {"total_step": 2**31}, conv=True),
    "BEFT": PeftType("BEFT"),
    "BOFT": PeftType("BOFT", conv=True, sampled=True),
    "C3A": PeftType("C3A"),
    "DEFT": PeftType("DEFT"),
    "DeLoRA": PeftType("DELORA"),
    "FourierFT": PeftType("FOURIERFT"),
    "GLoRA": PeftType("GLORA", frozen=True),
    "GraLoRA": PeftType("GRALORA"),
    "HiRA": PeftType("HIRA", conv=True),
    "HRA": PeftType("HRA", conv=True, frozen=True),
    "IA3": PeftType("IA3", conv=True),
    "Lily": PeftType("LILY"),
    "LoHa": PeftType("LOHA", conv=True),
    "LoKr": PeftType("LOKR", conv=True),
    "MiSS": PeftType("MISS"),
    "OFT": PeftType("OFT", conv=True),
    "PEANuT": PeftType("PEANUT"),
    "RandLoRA": PeftType("RANDLORA"),
    "RoAd": PeftType("ROAD"),
    # One fixed mask for every run: the adapter's file does not say which entries of a weight its values belong to.
    "SHiRA": PeftType("SHIRA", {"random_seed": 0}, frozen=True, sampled=True),
    "SuperTuning": PeftType("SUPERTUNING", frozen=True),
    "TinyLoRA": PeftType("TINYLORA"),
    "UniLoRA": PeftType("UNILORA", sampled=True),
    "VBLoRA": PeftType("VBLORA"),
    "VeRA": PeftType("VERA"),
    "WaveFT": PeftType("WAVEFT", sampled=True),
}

_TOKENS = "it adds tokens to a language model; vpt_shallow and vpt_deep do that for images"
_FACTORS = "each machine decomposes the weights into its frozen factors again, so a checkpoint would not be safe"
REFUSED_TYPES = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _TOKENS),
    **dict.fromkeys(("CARTRIDGE", "CPT", "ADAPTION_PROMPT"), _TOKENS),
    **dict.fromkeys(("ADAMSS", "FROD", "OSF", "PSOFT"), _FACTORS),
    "LN_TUNING": "`ln_tuning True` does that",
    "POLY": "it needs the task of each sample",
    "PVERA": "it draws new weights in every forward, so the result would depend on micro_batch_size",
    "SHADOW": "it wraps the blocks of a language model",
    "TRAINABLE_TOKENS": "it trains rows of an embedding, and an image encoder has none",
    "XLORA": "it mixes adapters that are trained already",
}
"""Type of peft that cannot be used here → why not."""

_OURS = "TailTune sets it"
_NOT_HERE = "it is for language models, or needs data or losses that are not given here"
_UNREACHED = "it leaves layers at random without gradient, which several processes cannot agree on"
REFUSED_FIELDS = {
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"), _OURS),
    **dict.fromkeys(("base_model_name_or_path", "revision", "runtime_config"), _OURS),
    "total_step": "it is always the number of steps of the run",
    "bias": "use `bias_tuning True` together with it",
    "modules_to_save": "the head trains anyway; `full_tuning True` with `partial` trains blocks",
    "module_dropout": _UNREACHED,
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "kasa_config"), _NOT_HERE),
    **dict.fromkeys(("velora_config", "monteclora_config", "arrow_config", "megatron_config"), _NOT_HERE),
    **dict.fromkeys(("megatron_core", "trainable_token_indices", "alora_invocation_tokens"), _NOT_HERE),
    **dict.fromkeys(("use_qalora", "qalora_group_size", "use_bdlora", "layer_replication"), _NOT_HERE),
    **dict.fromkeys(("target_parameters", "ensure_weight_tying"), _NOT_HERE),
}
"""Field of peft's configurations that `peft_args` may not set → why not."""

LORA_INITS = (True, False, None, "gaussian", "orthogonal")
"""Values of `init_lora_weights` that neither change the pre-trained weights nor read data."""


def find_peft_type(name: str) -> PeftType:
    """The entry of PEFTS.

    Args:
        name: spelled exactly as in the table, because it becomes part of the name of the run.

    Raises:
        UserError: there is no such tuner, or it cannot be used here.
    """
    reason = REFUSED_TYPES.get(name.upper())
    if reason:
        raise UserError(f"peft {name} cannot be used here: {reason}")
    return lookup(PEFTS, name, "peft")
