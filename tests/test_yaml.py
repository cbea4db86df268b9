"""The one reader of YAML and JSON: what a text may ask for is bounded, and what it is not is said in one line."""

import json
import os
import time
from pathlib import Path

import pytest

from tailtune.configs import UserError, load_configs, load_resolved
from tailtune.configs.value_parsers import as_mapping
from tailtune.configs.yaml_reader import MAX_LENGTH, MAX_VALUES, parse_yaml, read_yaml
from tailtune.datasets.sources.text_files import read_json
from tailtune.trainers.option_schema import declared

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(8)
)
"""Nine lists of nine lists of … nine letters: 9⁹ values in 400 characters."""

REFUSED = {
    "seed: !!int x\n": "is not a value of type 'int'",
    "seed: !!timestamp x\n": "type 'timestamp'",
    "seed: !!binary x\n": "type 'binary'",
    "seed: !!python/object/apply:os.getcwd []\n": "type 'python/object/apply:os.getcwd'",
    "seed: !mine x\n": "type '!mine'",
    "peft_args: " + "[" * 10_000 + "\n": "levels of lists or mappings",
    LAUGHS + "test_dists: *i\n": "values",
    "peft_args: &a {b: *a}\n": "contains itself",
    "seed: " + "9" * 5000 + "\n": "is not a value of type 'int'",
    "lr: 0.1\nlr: 0.2\n": "'lr' occurs twice",
    "lr: 0.1\n? [a, b]\n: c\n": "unhashable",
    "lr: 0.1\n---\nlr: 0.2\n": "another document",
    "lr: *nowhere\n": "undefined alias",
    "lr: =\n": "could not determine",
    "a: [" + "1," * MAX_VALUES + "1]\n": "values",
}


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_is_one_line_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"dataset: Fake\n{text}")
    started = time.process_time()
    with pytest.raises(UserError) as raised:
        load_configs(str(tmp_path / "my.yaml"), "tiny_clip", [], declared())
    assert time.process_time() - started < 10
    line = str(raised.value)
    assert "my.yaml line" in line and REFUSED[text] in line and "\n" not in line and len(line) < 400


@pytest.mark.parametrize("content", [b"lr: \xff\xfe\n", b"\x00\x01", b"lr: \x07\n", b"x: '\\uD800'\xed\xa0\x80"])
def test_bytes_that_are_no_text(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"my\.yaml.*not valid YAML"):
        read_yaml(tmp_path / "my.yaml")


def test_a_long_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "my.yaml").open("wb") as file:
        file.truncate(2**40)  # a hole of a terabyte
    with pytest.raises(UserError, match=rf"my\.yaml: larger than {MAX_LENGTH:,} bytes"):
        read_yaml(tmp_path / "my.yaml")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="not a regular file"):
        load_resolved(tmp_path / "config.yaml", declared())


def test_what_is_usual_is_read() -> None:
    text = "\ufeff# mine\nbase: &b {lr: 0.1, mixed: [1, 0x10, true, ~, 'x']}\nown: {<<: *b, day: 2001-99-99}\n"
    assert parse_yaml(text.removeprefix("\ufeff")) == {
        "base": {"lr": 0.1, "mixed": [1, 16, True, None, "x"]},
        "own": {"lr": 0.1, "mixed": [1, 16, True, None, "x"], "day": "2001-99-99"},
    }


def test_a_date_is_text(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("dataset: Fake\noutput_dir: 2001-01-31\n")
    assert load_configs(str(tmp_path / "my.yaml"), "tiny_clip", [], declared())[-1].output_dir == "2001-01-31"
    (tmp_path / "my.yaml").write_text("dataset: Fake\nseed: 2001-99-99\n")
    with pytest.raises(UserError, match="my.yaml: seed must be a whole number, not '2001-99-99'"):
        load_configs(str(tmp_path / "my.yaml"), "tiny_clip", [], declared())


@pytest.mark.parametrize("text", ["{r: &a [*a]}", "[" * 10_000, LAUGHS, "{a: !!timestamp x}", '{a: "\\0"}'])
def test_a_structure_on_the_command_line(text: str) -> None:
    with pytest.raises(ValueError):
        as_mapping(text)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b"[1e", b"[" + b"9" * 5000 + b"]", b""])
def test_json_that_is_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    with pytest.raises(UserError, match=r"^class_counts: .*mine\.json"):
        read_json(tmp_path / "mine.json", "class_counts")


def test_json_that_is(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text("\ufeff" + json.dumps({"é": [1, 2.5]}), encoding="utf-8")
    assert read_json(tmp_path / "mine.json", "class_counts") == {"é": [1, 2.5]}
