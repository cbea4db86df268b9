"""PEFTS: the tuners of the peft library that work on the layers of an image encoder, and why others do not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tailtune.configs.errors import UserError, lookup


@dataclass(frozen=True)
class Kind:
    """A tuner of peft.

    Args:
        type: its name in peft.
        args: what its configuration starts from; the user's `peft_args` come on top.
        conv: it also takes convolutions.
        frozen: the weights of its layers must not train.
        sampled: it chooses positions in a layer by their values, which the meta device does not have.
    """

    type: str
    args: Mapping[str, Any] = field(default_factory=dict)
    conv: bool = False
    frozen: bool = False
    sampled: bool = False


PEFTS: dict[str, Kind] = {
    "LoRA": Kind("LORA", conv=True),
    "rsLoRA": Kind("LORA", {"use_rslora": True}, conv=True),
    "DoRA": Kind("LORA", {"use_dora": True}, conv=True),
    # The run's own number of steps follows before its first one; peft asks for some already.
    "AdaLoRA": Kind("ADALORA", {"total_step": 2**31}, conv=True),
    "BEFT": Kind("BEFT"),
    "BOFT": Kind("BOFT", conv=True, sampled=True),
    "C3A": Kind("C3A"),
    "DEFT": Kind("DEFT"),
    "DeLoRA": Kind("DELORA"),
    "FourierFT": Kind("FOURIERFT"),
    "GLoRA": Kind("GLORA", frozen=True),
    "GraLoRA": Kind("GRALORA"),
    "HiRA": Kind("HIRA", conv=True),
    "HRA": Kind("HRA", conv=True, frozen=True),
    "IA3": Kind("IA3", conv=True),
    "Lily": Kind("LILY"),
    "LoHa": Kind("LOHA", conv=True),
    "LoKr": Kind("LOKR", conv=True),
    "MiSS": Kind("MISS"),
    "OFT": Kind("OFT", conv=True),
    "PEANuT": Kind("PEANUT"),
    "RandLoRA": Kind("RANDLORA"),
    "RoAd": Kind("ROAD"),
    # A mask of its own whatever the run's seed is: the file of the adapter does not tell which entries it means.
    "SHiRA": Kind("SHIRA", {"random_seed": 0}, frozen=True, sampled=True),
    "SuperTuning": Kind("SUPERTUNING", frozen=True),
    "TinyLoRA": Kind("TINYLORA"),
    "UniLoRA": Kind("UNILORA", sampled=True),
    "VBLoRA": Kind("VBLORA"),
    "VeRA": Kind("VERA"),
    "WaveFT": Kind("WAVEFT", sampled=True),
}

_TOKENS = "it adds tokens to a language model; vpt_shallow and vpt_deep do that for images"
_FACTORS = "its frozen factors are decomposed from the weights anew on each machine, so a checkpoint would not be safe"
REFUSED = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _TOKENS),
    **dict.fromkeys(("CARTRIDGE", "CPT", "ADAPTION_PROMPT"), _TOKENS),
    **dict.fromkeys(("ADAMSS", "FROD", "OSF", "PSOFT"), _FACTORS),
    "LN_TUNING": "`ln_tuning True` does that",
    "POLY": "it needs the task of each sample",
    "PVERA": "it draws its weights anew in every forward, so that the result would depend on micro_batch_size",
    "SHADOW": "it wraps the blocks of a language model",
    "TRAINABLE_TOKENS": "it trains rows of an embedding, and an image encoder has none",
    "XLORA": "it mixes adapters that are trained already",
}
"""Types of peft that are not in PEFTS, and why."""

_OURS = "TailTune sets it"
_NOT_HERE = "it is for language models, or needs data or losses that are not given here"
_UNREACHED = "it leaves layers at random without gradient, which several processes cannot agree on"
FIELDS = {
    **dict.fromkeys(("task_type", "peft_type", "auto_mapping", "peft_version", "inference_mode"), _OURS),
    **dict.fromkeys(("base_model_name_or_path", "revision", "runtime_config"), _OURS),
    "total_step": "it is the run's own number of steps",
    "bias": "use `bias_tuning True` beside it",
    "modules_to_save": "the head trains anyway; `full_tuning True` with `partial` trains blocks",
    "module_dropout": _UNREACHED,
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "kasa_config"), _NOT_HERE),
    **dict.fromkeys(("velora_config", "monteclora_config", "arrow_config", "megatron_config"), _NOT_HERE),
    **dict.fromkeys(("megatron_core", "trainable_token_indices", "alora_invocation_tokens"), _NOT_HERE),
    **dict.fromkeys(("use_qalora", "qalora_group_size", "use_bdlora", "layer_replication"), _NOT_HERE),
    **dict.fromkeys(("target_parameters", "ensure_weight_tying"), _NOT_HERE),
}
"""Fields of peft's configurations that are refused, and why."""

INITS = (True, False, None, "gaussian", "orthogonal")


def draws(args: Mapping[str, Any] | None) -> bool:
    """Whether training with these `peft_args` draws random numbers, which depends on how a batch is cut: dropout."""
    return any("dropout" in key and bool(value) for key, value in (args or {}).items())


def find(name: str) -> Kind:
    """The entry of PEFTS; spelled as there, because the name is part of the run's.

    Raises:
        UserError: not offered, or no name at all.
    """
    reason = REFUSED.get(name.upper())
    if reason:
        raise UserError(f"peft {name} cannot be used here: {reason}")
    return lookup(PEFTS, name, "peft")
