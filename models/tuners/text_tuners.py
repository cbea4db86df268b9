"""TEXT_TUNERS: the tuners of the text tower. Each is a tuner of the image tower with `text_` before its name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from tailtune.configs.errors import UserError, lookup
from tailtune.configs.key import Key
from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_float, as_mapping, as_scale, as_span
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.tuners.table import TUNERS, add_tuners
from tailtune.models.tuners.tuner_options import Case, MaskOptions, TunerOptions

TEXT_TUNERS: dict[str, str] = {
    "text_full_tuning": "full_tuning",
    "text_bias_tuning": "bias_tuning",
    "text_ln_tuning": "ln_tuning",
    "text_mask": "mask",
    "text_aft": "aft",
    "text_vpt_shallow": "vpt_shallow",
    "text_vpt_deep": "vpt_deep",
    "text_lora": "lora",
    "text_lora_mlp": "lora_mlp",
    "text_clip_lora": "clip_lora",
    "text_ssf_attn": "ssf_attn",
    "text_ssf_mlp": "ssf_mlp",
    "text_ssf_ln": "ssf_ln",
    "text_adapter": "adapter",
    "text_adaptformer": "adaptformer",
}
"""Tuner of the text tower, as an option names it → the entry of TUNERS. LIFT+ writes `l.` in place of `text_`."""


@dataclass(frozen=True)
class TextTunerOptions:
    """Sizes of the tuners of the text tower. Their defaults are those of LIFT+."""

    partial: int | list[int] | None = option(
        None,
        "Blocks of the text tower that its tuners act on: a number k for the last k, or a range [start,end). None "
        "means all.",
        as_span,
        key="text_partial",
        most=1000,
        zero_shot=False,
    )
    dim: int = option(
        4,
        "Bottleneck dimension of adapters in the text tower, which is also the rank of its LoRA.",
        key="text_adapter_dim",
        least=1,
        most=4096,
        zero_shot=False,
    )
    length: int = option(
        2,
        "Number of prompt tokens that text_vpt_shallow and text_vpt_deep put behind the start token.",
        key="text_vpt_len",
        least=1,
        most=1024,
        zero_shot=False,
    )
    scale: float | str = option(
        "learnable",
        "Factor on the output of text_adaptformer: `learnable`, or a fixed number.",
        as_scale,
        key="text_adaptformer_scale",
        zero_shot=False,
        held_with="texts",
    )
    ratio: float | None = option(
        None,
        "Share of a layer's weights that text_mask trains. None means LIFT's rule for the image tower.",
        as_float,
        key="text_mask_ratio",
        least=0.0,
        most=1.0,
        zero_shot=False,
    )

    args: dict[str, Any] | None = option(
        None,
        "Options of single tuners of the text tower, in place of those of all and of those of the image tower, such as "
        "{text_lora: {layers: [0,11], dim: 8}}.",
        as_mapping,
        key="text_tuner_args",
        zero_shot=False,
        held_with="texts",
    )

    def of(self, name: str, options: TunerOptions) -> TunerOptions:
        """The options of a tuner of the image tower, with these sizes where it has such fields.

        Args:
            name: entry of TEXT_TUNERS.
            options: those of the image tower.

        Raises:
            UserError: `args` gives an option that the tuner does not have, or a value that it cannot have.
        """
        values: dict[str, Any] = {"layers": None, "dim": self.dim, "length": self.length, "scale": self.scale}
        values["ratio"] = self.ratio if isinstance(options, MaskOptions) else None
        changed = {field: value for field, value in values.items() if hasattr(options, field)}
        return replace(options, **{**changed, **_parsed(name, options, (self.args or {}).get(name, {}))})


def _parsed(name: str, options: TunerOptions, given: Any) -> dict[str, Any]:
    """Values of fields of a tuner's options, which `text_tuner_args` gives."""
    place, found = f"text_tuner_args: {name}", {}
    if not isinstance(given, dict):
        raise UserError(f"{place} must be a mapping such as {{layers: 3}}, not '{given}'")
    keys: dict[str, Key] = {item.name: item.metadata["option"] for item in fields(options)}
    for field, value in given.items():
        key = lookup(keys, field, f"option of {name} in text_tuner_args")
        try:
            found[field] = key.parse(value)
        except ValueError as error:
            raise UserError(f"{place}: {field} must be {error}, not '{value}'") from None
        wrong_choice = "" if not key.choices or found[field] in key.choices else f"one of {', '.join(key.choices)}"
        if expected := key.beyond(found[field]) or wrong_choice:
            raise UserError(f"{place}: {field} must be {expected}")
    return found


def add_text_tuners(
    tower: TextTower,
    tuners: Mapping[str, TunerOptions],
    sizes: TextTunerOptions,
    classes: int,
    seed: int,
) -> None:
    """Freeze the text tower, then let tuners act in its blocks.

    Args:
        tower: the text tower; it is changed in place.
        tuners: entry of TEXT_TUNERS → the options of this tuner in the image tower.
        sizes: what is different in the text tower.
        classes: number of classes.
        seed: seed of the initial weights.

    Raises:
        UserError: as `add_tuners`, or `sizes` has options of a tuner that is off.
    """
    if unread := (sizes.args or {}).keys() - tuners.keys():
        raise UserError(f"text_tuner_args: {', '.join(sorted(unread))} is not on; turn it on, or leave this out")
    options = {}
    for name, of_images in tuners.items():
        tuner, chosen = TEXT_TUNERS[name], sizes.of(name, of_images)
        blocks = TUNERS[tuner].blocks_of(tower, chosen, sizes.partial)
        options[tuner] = chosen.filled(Case(classes, tower.depth, len(blocks), tower.width))
    add_tuners(tower, options, sizes.partial, seed)
