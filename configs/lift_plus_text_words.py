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
        "aft": ("text_aft",),
    }
)
"""Tuner of the text tower of LIFT+ → ours."""
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
    asked = flags_on(given, [*(f"l.{name}" for name in TEXT_TUNERS), *OF_TEXT])
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
    """Our tuners of the text tower with their widths and blocks: one option for all, or one with those of each."""
    for name in on:
        yield from ((ours, "True") for ours in TEXT_TUNERS[name])
    if {"adapter", "adaptformer"} & set(on):
        yield "adapter_init", "uniform"  # tuner_rules lift_plus says so for the image tower only
    widths = {name: given.get(f"l.{name}_dim", TEXT_DIM) for name in WIDTHS if name in on}
    layers = {name: _text_layers(f"l.{name}_layers", given.get(f"l.{name}_layers", "None")) for name in on}
    own: dict[str, list[str]] = {}  # options of each of our tuners
    for name, width in widths.items():
        _given_size(f"l.{name}_dim", width)
    if len(set(widths.values())) > 1:
        _give(own, "dim", widths)
    elif widths:
        yield "text_adapter_dim", widths.popitem()[1]
    different = set(layers.values())
    span = _span(different.pop()) if len(different) == 1 else None
    if span is None:
        _give(own, "layers", layers)
    elif span:
        yield "text_partial", span
    if "aft" in on:  # each of its options, because those of the image tower would be read else
        for option, default in (("loc", "all"), ("seed", "0"), ("ratio", "None")):
            _give(own, option, {"aft": given.get(f"l.aft_{option}", default)})
    if own:
        yield "text_tuner_args", "{" + ", ".join(f"{ours}: {{{', '.join(args)}}}" for ours, args in own.items()) + "}"


def _give(own: dict[str, list[str]], option: str, values: Options) -> None:
    """Add an option of tuners of LIFT+ to those of ours, but for the value None, which is the default."""
    for name, value in values.items():
        for ours in TEXT_TUNERS[name] if value != "None" else ():
            own.setdefault(ours, []).append(f"{option}: {value}")


def _given_size(key: str, value: str) -> str:
    if value == "None":
        raise UserError(f"{key} None: there is no rule for this size here; give a value")
    return value


def _text_layers(key: str, value: str) -> str:
    """The blocks of `l.<tuner>_layers`: a number of last ones, a list in ascending order, or None for all."""
    if value in ("None", "deep"):  # "deep", the default of l.pt_layers, ends LIFT+ with an error; it means all
        return "None"
    try:
        layers = as_layers(value)
    except ValueError as error:
        raise UserError(f"{key} must be {error}, not '{value}'") from None
    return str(layers) if isinstance(layers, int) else str(sorted(layers)).replace(" ", "")


def _span(layers: str) -> str | None:
    """The value of `text_partial` that means these blocks; empty for all, None if there is no such value."""
    if layers == "None":
        return ""
    blocks = as_layers(layers)
    if isinstance(blocks, int) or not blocks:
        return str(blocks or 0)
    is_span = blocks[0] >= 0 and blocks[-1] - blocks[0] + 1 == len(blocks)
    return f"[{blocks[0]},{blocks[-1] + 1}]" if is_span else None


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
