"""Translates the keys of LIFT+ about text: the text tower (`l.…`), CoOp, and what lies behind both towers."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from tailtune.configs.errors import UserError
from tailtune.configs.layer_list import as_layers

Options = Mapping[str, str]
Words = Sequence[str]

TEXT_MODE = "TextClassifier"
"""Our classifier for `classifier None` of LIFT+, with which the logits come from text features."""
WIDTHS = ("lora", "adapter", "adaptformer")
"""Tuners with an option `v.<tuner>_dim`, for all of which we have one option."""
TEXT_TUNERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fft": ("text_full_tuning",),
        "bitfit": ("text_bias_tuning",),
        "pt": ("text_vpt_deep",),
        "lora": ("text_lora",),
        "adapter": ("text_adapter",),
        "adaptformer": ("text_adaptformer",),
        "ssf": ("text_ssf_attn", "text_ssf_mlp"),
    }
)
"""Tuner of the text tower of LIFT+ → ours. LIFT+ has `aft`, too."""
OF_TEXT: Mapping[str, Words] = MappingProxyType(
    {
        "coop": ("context", "coop"),
        "proj_tuning": ("projection_tuning", "True"),
        "clip_adapter": ("clip_adapter", "residual"),
    }
)
"""Flag of LIFT+ that trains text, or what lies behind both towers → ours."""
TEXT_SIZES: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "l.pt_len": ("l.pt", "text_vpt_len", "2"),
        "coop_ctx_len": ("coop", "context_len", "4"),
        "coop_cls_pos": ("coop", "context_position", "end"),
        "clip_adapter_dim": ("clip_adapter", "clip_adapter_dim", "4"),
    }
)
"""Key of LIFT+ → the flag that it belongs to, our option, and its default in LIFT+."""
TEXT_DIM = "4"
"""Width of each tuner of the text tower of LIFT+ if the line has none."""
TEXT_KEYS = (*OF_TEXT, *TEXT_SIZES, "coop_init")
"""Keys of LIFT+ about text, beside those of its tower."""


def of_text(given: Options) -> Iterator[tuple[str, str]]:
    """Our options for everything that trains text, and for the classifier that reads it."""
    asked = flags_on(given, [*(f"l.{name}" for name in TEXT_TUNERS), "l.aft", *OF_TEXT])
    words = ", ".join(f"{flag} True" for flag in asked)
    if is_true(given.get("zero_shot", "")):
        if asked:
            raise UserError(f"{words}: zero_shot True trains nothing; leave one of them out")
        return
    if given.get("classifier") != "None":
        if asked:
            raise UserError(
                f"{words}: LIFT+ trains text without a classifier only; add 'classifier None', or leave this out"
            )
        return
    yield "classifier", TEXT_MODE
    yield from _text_tuners(given, [flag.removeprefix("l.") for flag in asked if flag not in OF_TEXT])
    for flag in asked:
        if flag in OF_TEXT:
            yield OF_TEXT[flag][0], OF_TEXT[flag][1]
    if "coop" in asked and given.get("coop_init", "None") != "None":
        raise UserError(
            f"coop_init {given['coop_init']} ends LIFT+ with an error; leave it out, and write context_words "
            "'a photo of a' for vectors that start from these words"
        )
    for key, (flag, option, default) in TEXT_SIZES.items():
        if flag in asked:
            yield option, _given_size(key, given.get(key, default))


def _text_tuners(given: Options, on: Words) -> Iterator[tuple[str, str]]:
    """Our tuners of the text tower with their width and blocks, which are the same for all of them here."""
    if "aft" in on:
        raise UserError("l.aft True: aft acts in the image tower only here; text_mask draws other weights of the texts")
    for name in on:
        yield from ((ours, "True") for ours in TEXT_TUNERS[name])
    if {"adapter", "adaptformer"} & set(on):
        yield "adapter_init", "uniform"  # tuner_rules lift_plus says so for the image tower only
    widths = {f"l.{name}_dim": given.get(f"l.{name}_dim", TEXT_DIM) for name in WIDTHS if name in on}
    for key, width in widths.items():
        _given_size(key, width)
    yield from (("text_adapter_dim", width) for width in same_value(widths, "text_adapter_dim"))
    keys = [f"l.{name}_layers" for name in on]
    layers = {key: _text_layers(key, given.get(key, "None")) for key in keys}
    yield from (("text_partial", span) for span in same_value(layers, "text_partial") if span != "None")


def _given_size(key: str, value: str) -> str:
    if value == "None":
        raise UserError(f"{key} None: there is no rule for this size here; give a value")
    return value


def _text_layers(key: str, value: str) -> str:
    """The value of `text_partial` that means the blocks of `l.<tuner>_layers`."""
    if value in ("None", "deep"):  # "deep", the default of l.pt_layers, ends LIFT+ with an error; it means all
        return "None"
    try:
        layers = as_layers(value)
    except ValueError as error:
        raise UserError(f"{key} must be {error}, not '{value}'") from None
    if isinstance(layers, int) or not layers:
        return str(layers or 0)
    first, last = min(layers), max(layers)
    if first < 0 or last - first + 1 != len(layers):
        raise UserError(
            f"{key} {value}: text_partial, which all tuners of the text tower have here, is a number k for the last k "
            "blocks, or blocks without a gap between them, counted from 0"
        )
    return f"[{first},{last + 1}]"


def flags_on(given: Options, flags: Words) -> list[str]:
    """The flags that are True."""
    for flag in flags:
        if given.get(flag, "False").lower() not in ("true", "false"):
            raise UserError(f"{flag} must be True or False, not '{given[flag]}'")
    return [flag for flag in flags if is_true(given.get(flag, ""))]


def same_value(values: Options, option: str) -> list[str]:
    """The one value of keys of LIFT+ that are one option here; empty without keys."""
    found = list(dict.fromkeys(values.values()))
    if len(found) > 1:
        listed = ", ".join(f"{key} {value}" for key, value in values.items())
        raise UserError(f"{listed}: all tuners have one {option} here; give them the same value")
    return found


def is_true(value: str) -> bool:
    """Whether the value of a flag is True."""
    return value.lower() == "true"
