"""Strategies of option values: what a key's type, table or bounds allow, and what nobody should give."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tailtune.configs import value_parsers as values
from tailtune.configs.key import Key
from tailtune.trainers.option_schema import choices_of, declared

Texts = SearchStrategy[str]

OTHERS: Mapping[str, tuple[str, ...]] = {
    "backbone": (
        "timm:resnet18",
        "timm:resnet18.",
        "timm:",
        "open_clip:",
        "open_clip:RN50",
        "timm:vit_tiny_patch16_224",
    ),
    "pretrained": ("default", "embedded", "openai", "laion2b_s34b_b88k", "nowhere.pt", "none"),
    "prompt": ("a photo of a {}", "{", "{} {}", "{0}", "{name}", "no hole"),
    "test_dists": ("uniform", "all", "forward50,backward50", "dirichlet", "dirichlet-forward2", "forward", "backward0"),
    "target_prior": ("forward10", "backward3", "prior.json"),
    "partial": ("2", "0", "[0,1]", "[1,1]", "(0,2]"),
    "peft_args": ("{r: 2}", "{target_modules: [qkv]}", "{r: 2, target_modules: [fc1, fc2]}", "{rank: 2}", "{r: -1}"),
    "lr_factors": ("{tuner: 0.1}", "{head: 2, tuner: 0}", "{nobody: 1}"),
    "shift_factors": ("{forward3: 0.3333}", "{forward2: 2}", "{x: 1}"),
}
"""Values that no table lists."""

BOMB = (
    "{a: &a [x,x,x,x,x,x,x,x,x]"
    + "".join(f", {n}: &{n} [{','.join([f'*{p}'] * 9)}]" for p, n in zip("abcdefgh", "bcdefghi", strict=True))
    + "}"
)
NASTY = (
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\udcff\udcfe",
        '"\\ud800"',
        "\x1b[2J",
        "\u202eabc",
        "é" * 130,
        "½",
        "٣",
        "\n",
        "a\nb: c",
        "\t",
    ),
    *(
        "x" * 300,
        "x" * 5000,
        "/" * 5000,
        "../" * 50,
        "a/" * 200,
        ".",
        "..",
        "/",
        "~",
        "~root",
        "~nobody/x",
        "-",
        "--",
        "-d",
    ),
    *("nan", "inf", "-inf", "1e300", "-1e300", "1e-320", "1e1000", "9" * 5000, "1" + "0" * 30, "-1", "-" + "9" * 19),
    *(
        str(2**31),
        str(2**63),
        str(2**64),
        "1000000000",
        "100000",
        "0",
        "-0",
        "0.0",
        "0x1F",
        "0o17",
        "017",
        "1_000",
        "+1",
    ),
    *(
        "1:30",
        "1e",
        "1.",
        ".5",
        "True",
        "yes",
        "on",
        "null",
        "none",
        "~",
        "2001-99-99",
        "2001-01-01",
        "2001-01-01 1:2:3",
    ),
    *("!!int x", "!!timestamp x", "!!float x", "!!bool x", "!!binary x", "!!binary aGk=", "!!set {a}", "!!omap [a: 1]"),
    *("!!python/object/apply:os.system [id]", "!!null x", "!!str 1", "!x", "&a [*a]", "&a {a: *a}", "*a", "<<: 1"),
    *("[" * 10000, "[" * 400 + "]" * 400, "{a: " * 300 + "1" + "}" * 300, BOMB, "{? [a]: 1}", "{1: 2}", "{a: {b: {}}}"),
    *(
        "[]",
        "{}",
        "[1",
        "{a",
        "[1,2,3]",
        "[-1,5]",
        "[5,1]",
        "[1.5,2]",
        "[nan,nan,nan]",
        "[1e300,1,1]",
        "[0,0,0]",
        "[a,b]",
    ),
    *(str(list(range(5000))), "{r: 1000000}", "{r: 0}", "{target_modules: '(.*)*.*.*.*x'}", "{target_modules: '('}"),
    *(
        "{target_modules: all-linear}",
        "{target_modules: []}",
        "{lora_alpha: nan}",
        "{modules_to_save: [qkv]}",
        "{a: !!int x}",
    ),
    *(
        "(a+)+$",
        "%s%n",
        "%(x)s",
        "{}",
        "{0.__class__}",
        "{x!r:>9999999999}",
        "${HOME}",
        "$(id)",
        "`id`",
        "'",
        '"',
        "\\",
        "#",
        "|",
    ),
    *(
        "timm:resnet18.",
        "timm:hf-hub:a/b",
        "timm:local-dir:/",
        "open_clip:hf-hub:a/b",
        "timm:../x",
        "timm:resnet18.nope",
    ),
    *("fifo", "empty", "sparse", "folder", "loop", "binary", "/dev/zero", "/dev/full", "/dev/stdin", "/proc/self/mem"),
    *(
        "uniform,uniform",
        "forward1e9",
        "forward999999999999",
        "dirichlet-forward99999",
        ",",
        "a,,b",
        "forward-1",
        "forward0",
    ),
)
"""Text that has broken some program or other; the names in the last lines are prepared by `hazards`."""

_INT = st.one_of(st.integers(-2, 6), st.integers(0, 300), st.integers(-(2**65), 2**65)).map(str)
_FLOAT = st.one_of(st.floats(0, 1), st.floats(-10, 1000), st.floats()).map(repr)
_NAME = st.text("abcdefghijklmnopqrstuvwxyz0123456789_-./@:", max_size=12)
_PATH = _NAME | st.text(max_size=20) | st.text(st.characters(codec="utf-8"), min_size=200, max_size=400)
_SCALAR = st.one_of(st.integers(-3, 10**12), st.floats(), st.booleans(), _NAME, st.none())
_TREE = st.recursive(_SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAME, inner, max_size=3))
_WRITTEN = _TREE.map(
    lambda tree: yaml.safe_dump(tree, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
)
WILD: Mapping[Callable[[Any], Any], Texts] = {
    values.as_bool: st.booleans().map(str),
    values.as_int: _INT,
    values.as_float: _FLOAT | _INT,
    values.as_str: _NAME | st.text(max_size=20),
    values.as_path: _PATH,
    values.as_folder: _PATH,
    values.as_paths: st.lists(_PATH, max_size=3).map(",".join),
    values.as_micro: _INT | st.just("auto"),
    values.as_span: _INT | st.lists(st.integers(-1, 14), min_size=1, max_size=3).map(str),
    values.as_layers: _INT | st.lists(st.integers(-1, 14), max_size=3).map(str) | st.just("range(0,12,2)"),
    values.as_scale: _FLOAT | st.just("learnable"),
    values.as_mapping: _WRITTEN,
    values.as_names: st.lists(_NAME, max_size=3).map(",".join),
    values.as_ints: st.lists(st.integers(-1, 10**10), max_size=3).map(str),
    values.as_factors: st.dictionaries(st.sampled_from(["tuner", "head", "x"]), st.floats() | st.integers()).map(str),
    values.as_numbers: st.lists(st.floats(-3, 3), max_size=4).map(str),
    values.as_triple: st.lists(st.floats(0, 2), min_size=2, max_size=4).map(str),
    values.as_pair: st.lists(st.floats(0, 1), min_size=1, max_size=3).map(str),
}
"""Parser → text of its kind, sensible or not."""
MODEST: Mapping[Callable[[Any], Any], Texts] = {
    **WILD,
    values.as_int: st.integers(0, 6).map(str),
    values.as_float: st.sampled_from(["0", "0.1", "0.5", "1", "2"]),
    **dict.fromkeys((values.as_str, values.as_path, values.as_folder, values.as_paths), st.nothing()),
    values.as_mapping: st.nothing(),
}
"""Parser → what people give."""


@cache
def schema() -> dict[str, Key]:
    """Every key that a user may set."""
    every = declared()
    return {key: every[key] for key in every.settable()}


def sensible(key: str) -> Texts:
    """Values of a key that a person might give."""
    entry = schema()[key]
    listed = (*choices_of(key, entry), *OTHERS.get(key, ()))
    return st.sampled_from(listed) if listed else MODEST.get(entry.parse, st.nothing())


def hostile(key: str) -> Texts:
    """Values of a key's kind, of other kinds, and `NASTY` ones."""
    return st.one_of(
        sensible(key), WILD.get(schema()[key].parse, st.nothing()), st.sampled_from(NASTY), st.text(max_size=8)
    )
