"""Translates the command lines of LIFT+, `-d DATA -b BACKBONE -m METHOD KEY VALUE …`, to those of TailTune.

A backbone with a method is the model config `<backbone>_lift_plus` with some options. The keys of towers are nested:
`v.lora_dim` of images, `l.lora_dim` of texts. Words that LIFT+ does not know stay as they are, so options of TailTune
may be among them.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from tailtune.configs import names
from tailtune.configs.command_words import separated
from tailtune.configs.errors import UserError, lookup, unknown
from tailtune.configs.lift_plus_text_words import (
    TEXT_KEYS,
    WIDTHS,
    Options,
    Words,
    flags_on,
    is_true,
    of_text,
    same_value,
)

SUFFIX = "_lift_plus"
"""End of the names of the model configs with the recipe of LIFT+."""
TUNERS: Mapping[str, str] = MappingProxyType(
    {
        "fft": "full_tuning",
        "bitfit": "bias_tuning",
        "pt": "vpt_deep",
        "lora": "lora",
        "adapter": "adapter",
        "adaptformer": "adaptformer",
        "ssf": "ssf_attn",
        "aft": "aft",
    }
)
"""Tuner of LIFT+ → ours. `ssf` is also our ssf_mlp, but not on a residual network."""
METHODS: Mapping[str, str] = MappingProxyType(
    {
        "lift+": "v.adaptformer True",
        "lift": "v.adaptformer True num_epochs 10 lr 0.01 mda False",
        "lp": "",
        "fft": "v.fft True",
        "aft": "v.aft True",
        "coop": "classifier None coop True num_epochs 50 batch_size 32 lr 0.002 mda False",
        "zs": "classifier None zero_shot True",
    }
)
"""Method of LIFT+ → what it sets, in the keys of LIFT+. The others have a classifier, as our configs."""
RENAMED: Mapping[str, str] = MappingProxyType(
    {
        **{f"v.aft_{key}": f"aft_{key}" for key in ("ratio", "loc", "seed")},
        **{f"v.{theirs}_layers": f"{ours}_layers" for theirs, ours in TUNERS.items()},
        "prec_train": "prec",
        "classifier_scale": "scale",
        "v.pt_len": "vpt_len",
    }
)
"""Key of LIFT+ → our option with the same values, where the names differ."""
VALUES: Mapping[str, tuple[str, Options]] = MappingProxyType(
    {
        "mda": ("augment", {"True": "mda", "False": "lift"}),
        "classifier": (
            "classifier",
            {
                "CosineClassifier": "CosineClassifier",
                "LinearClassifier": "LinearClassifier",
                "L2NormClassifier": "L2NormedClassifier",
                "LayerNormClassifier": "LayerNormedClassifier",
            },
        ),
        "classifier_init": (
            "init_head",
            {
                "semantic": "text_feat",
                "class_mean": "100_shot",
                "linear_probing": "100_shot_linear_probe",
                "None": "none",
            },
        ),
    }
)
"""Key of LIFT+ → our option, and value of LIFT+ → ours."""
OF_TOWER = (
    *TUNERS,
    *(f"{name}_layers" for name in TUNERS),
    *(f"{name}_dim" for name in WIDTHS),
    *("pt_len", "aft_ratio", "aft_loc", "aft_seed"),
)
"""Options of a tower of LIFT+, `v.…` of images and `l.…` of texts."""


def translated(backbone: str | None, model: str, pairs: Words) -> tuple[str, list[str]]:
    """The model config and the options that a command line means.

    Args:
        backbone: word after `-b`; None: the line is one of TailTune and stays as it is.
        model: word after `-m`: a method of LIFT+, or without `-b` a model config.
        pairs: `KEY VALUE KEY=VALUE …`; with `-b` in the keys of LIFT+.

    Raises:
        UserError: a name that LIFT+ does not have, or what TailTune does not train; the message says why.
    """
    if backbone is None:
        return model, list(pairs)
    backbones = {name.removesuffix(SUFFIX): name for name in names("model") if name.endswith(SUFFIX)}
    config = lookup(backbones, backbone, "backbone of LIFT+ (-b)")
    words = [*lookup(METHODS, model, "method of LIFT+ (-m)").split(), *separated(pairs)]
    if len(words) % 2:
        raise UserError(f"options come as KEY VALUE or KEY=VALUE, but '{words[-1]}' has no value")
    given = dict(zip(words[::2], words[1::2], strict=True))  # of a key that is there twice, the last value counts
    if "tte_expand" in given:  # in the scripts of LIFT+, whose code has the option `expand`
        given["expand"] = given.pop("tte_expand")
    convnet = "_rn" in backbone
    ours = dict(_tuners(given, convnet)) | dict(of_text(given))
    for key, value in given.items():
        ours |= dict(_option(key, value, given))
    return config, [word for pair in ours.items() for word in pair]


def _tuners(given: Options, convnet: bool) -> Iterator[tuple[str, str]]:
    """Our tuners and their sizes; that of the model config is off if the line has others."""
    on = [key.removeprefix("v.") for key in flags_on(given, [f"v.{name}" for name in TUNERS])]
    default = "ssf" if convnet else "adaptformer"
    if default not in on:
        yield TUNERS[default], "False"
    for name in on:
        if name != default:
            yield TUNERS[name], "True"
        if name == "ssf" and not convnet:
            yield "ssf_mlp", "True"
            if "v.ssf_layers" in given:
                yield "ssf_mlp_layers", given["v.ssf_layers"]
        if convnet and name in ("fft", "bitfit"):
            if given.get(f"v.{name}_layers", "None") != "None":
                raise UserError(
                    f"v.{name}_layers has no effect on a residual network in LIFT+; leave it out, or use "
                    f"{TUNERS[name]}_layers, which counts the four stages"
                )
            yield f"{TUNERS[name]}_layers", "4"  # not the stem and the pooling, as in LIFT+
    widths = {f"v.{name}_dim": given.get(f"v.{name}_dim", "None") for name in WIDTHS if name in on}
    yield from (("adapter_dim", width) for width in same_value(widths, "adapter_dim") if width != "None")


def _option(key: str, value: str, given: Options) -> Iterator[tuple[str, str]]:
    """Our options for a key of LIFT+ that belongs to no tuner's flag or width."""
    tower, _, name = key.rpartition(".")
    if tower in ("v", "l") and name not in OF_TOWER:
        raise unknown("option of LIFT+", key, [f"{tower}.{each}" for each in OF_TOWER])
    if tower == "l" or key in TEXT_KEYS or key == "classifier" and value == "None":
        return  # `of_text` has read them
    if key in RENAMED:
        yield RENAMED[key], value
    elif key in VALUES:
        option, values = VALUES[key]
        yield option, lookup(values, value, f"value of {key}")
    elif key in SPECIAL:
        yield from SPECIAL[key](value, given)
    elif tower != "v":
        yield key, value  # LIFT+ and TailTune call it the same, or nobody does, which the loader of the configs refuses


def _accum_step(value: str, given: Options) -> Iterator[tuple[str, str]]:
    size, steps = given.get("batch_size", "128"), value
    if not (size.isdecimal() and steps.isdecimal() and int(steps) and int(size) % int(steps) == 0):
        raise UserError(f"accum_step {steps} must be a whole number that divides batch_size {size}")
    if int(steps) > 1:
        yield "micro_batch_size", str(int(size) // int(steps))


def _expand(value: str, given: Options) -> Iterator[tuple[str, str]]:
    if value != "None":
        yield "expand" if is_true(given.get("tte", "")) else "crop_margin", value


def _prec_test(value: str, given: Options) -> Iterator[tuple[str, str]]:
    """Half precision of LIFT+ becomes fp32, because equal logits in half precision would count as errors."""
    yield "test_prec", "fp32" if value in ("fp16", "fp32") else value


def _pixels(option: str) -> Callable[[str, Options], Iterator[tuple[str, str]]]:
    return lambda value, given: iter([(option, value.replace("(", "[").replace(")", "]"))])


SPECIAL: Mapping[str, Callable[[str, Options], Iterator[tuple[str, str]]]] = MappingProxyType(
    {
        "accum_step": _accum_step,
        "expand": _expand,
        "prec_test": _prec_test,
        "mean": _pixels("pixel_mean"),
        "std": _pixels("pixel_std"),
    }
)
"""Key of LIFT+ → function of its value and of all values that gives our options."""
