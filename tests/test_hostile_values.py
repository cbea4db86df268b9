"""Values that no user means: each ends in one line that names its option, before it costs time or memory."""

import json
import logging
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from conftest import Cli
from test_bad_input import FAKE, OWN, data, one_line  # noqa: F401 (data is a fixture)
from tiers import slow_except
from yacs.config import CfgNode

from tailtune import main
from tailtune.configs import UserError, load_configs
from tailtune.configs.errors import prefix_errors, unknown
from tailtune.configs.known_as import KNOWN_AS
from tailtune.configs.launch_environment import check_environment
from tailtune.configs.time_limit import time_limit
from tailtune.configs.value_parsers import (
    as_float,
    as_int,
    as_ints,
    as_micro,
    as_names,
    as_path,
    as_paths,
    as_span,
    as_str,
)
from tailtune.models.heads.head_init import HEAD_INITS, HeadContext
from tailtune.trainers.config_checks import outline
from tailtune.trainers.evaluation.tta import warnings_of
from tailtune.trainers.methods import METHODS
from tailtune.trainers.option_schema import declared

SCHEMA = declared()
KEYS = {key: SCHEMA[key] for key in SCHEMA.settable()}
WHOLE = [key for key, entry in KEYS.items() if entry.parse in (as_int, as_ints, as_micro, as_span)]
TEXTS = [key for key, entry in KEYS.items() if entry.parse in (as_str, as_path, as_names, as_paths)]
NUMBERS = [key for key, entry in KEYS.items() if entry.parse is as_float]
ONE_OF_EACH_KIND = list({KEYS[key].parse: key for key in reversed(TEXTS)}.values())
SIZES = ["batch_size", "num_classes", "num_experts", "vpt_len", "adapter_dim", "batchformer.layers", "partial"]
"""Whole numbers that say how much is built, and one of each kind."""
HOSTILE = ("\udcff\udcfe", "a\nb", "\x00", "\x1b[31m", "9" * 5000, str(2**64), "1e300", "[" * 3000, "!!timestamp x", "")
EXPERTS = "num_experts 3 loss_type CE"
Told = Callable[..., str]


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """`told(key, value)`: standard error of a dry run with it, empty if it is accepted. Nothing else can come out."""
    monkeypatch.chdir(tmp_path)

    def call(key: str, value: object, *more: str) -> str:
        capsys.readouterr()
        method = f"{EXPERTS} method {key.split('.')[0]}" if "." in key else ""
        if method and METHODS[key.split(".")[0]].continues_from_earlier_run:
            method += f" after tiny_clip_peft after.pretrained none {EXPERTS.replace('num', 'after.num')}"
        code = main.main([*f"{FAKE} --dry-run {method}".split(), *more, key, str(value)])
        error = capsys.readouterr().err
        if code == 0:
            assert error == ""
            return ""
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, (value, error)
        assert len(error) < 1500 and not any(tmp_path.iterdir())
        return error

    return call


@contextmanager
def at_most_a_gigabyte() -> Iterator[None]:
    """More address space than that ends in MemoryError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


# --- every option ----------------------------------------------------------------------------------------------------


def of_each_kind() -> Iterator[tuple[str, str]]:
    """Every text for one option of each kind of value, and every option with one of the texts."""
    yield from product({entry.parse: key for key, entry in KEYS.items()}.values(), HOSTILE)
    yield from zip(KEYS, cycle(HOSTILE), strict=False)


@pytest.mark.parametrize("cases", slow_except(["few"], ["few", "all"]))
def test_no_text_is_a_traceback(cases: str) -> None:
    for key, value in product(KEYS, HOSTILE) if cases == "all" else of_each_kind():
        try:
            load_configs("fake_lt", "tiny_clip_peft", [key, value], SCHEMA)
        except UserError as error:
            line = str(error)
            assert key in line and "\n" not in line and len(line) < 1500, (key, value)


@pytest.mark.parametrize("key", slow_except(ONE_OF_EACH_KIND, TEXTS))
def test_odd_text_is_refused_with_the_name_of_its_option(key: str, told: Told) -> None:
    for value in ("x" * 200, "!!timestamp x"):
        error = told(key, value)
        assert not error or key in error


@pytest.mark.parametrize("key", slow_except(SIZES, WHOLE))
def test_no_whole_number_is_without_a_bound(key: str, told: Told) -> None:
    """The largest that is allowed is built, or refused, within a gigabyte and seconds; one more is none."""
    largest = KEYS[key].most
    assert largest is not None
    started = time.process_time()
    with at_most_a_gigabyte():
        error = told(key, int(largest))
    assert time.process_time() - started < 20
    assert not error or key in error


def refused(key: str, value: object) -> str:
    """The error of a command line with it."""
    with pytest.raises(UserError) as raised:
        load_configs("fake_lt", "tiny_clip_peft", [key, str(value)], SCHEMA)
    return str(raised.value)


def test_more_than_the_bound_of_a_whole_number_is_refused() -> None:
    for key in WHOLE:
        largest = KEYS[key].most
        assert largest is not None and key in refused(key, int(largest) + 1), key


def test_a_number_that_single_precision_does_not_hold() -> None:
    for key in NUMBERS:
        assert f"{key} must be a number up to 3.4e+38" in refused(key, "1e300")


# --- single options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["..", "../x", "a/../../x", ".", "/", "", "a" * 256, "a/" * 1600, "é" * 128])
def test_a_run_folder_that_cannot_be(value: str, told: Told) -> None:
    assert "output_dir must be a" in told("output_dir", value)


@pytest.mark.parametrize("value", ["mine", "a/b", "./a", "...", "/tmp/elsewhere", "é" * 127])
def test_a_run_folder_that_can_be(value: str, told: Told) -> None:
    assert told("output_dir", value) == ""


@pytest.mark.parametrize(
    ("key", "value", "parts"),
    [
        ("adapt_views", "x", ["unknown adapt_views"]),
        ("after", "tiny_clop", ["in after", "did you mean 'tiny_clip'"]),
        ("num_classes", 100_000, ["dataset Fake", "1000"]),
        ("test_dists", "forward" + "9" * 5000, ["test_dists"]),
        ("backbone", "timm:resnet18.", ["backbone", "tag of timm's resnet18"]),
        ("backbone", "timm:resnet18.a1_in1k.", ["backbone"]),
        ("backbone", "timm:vit_base_patch16_224_in21k", ["backbone", "'vit_base_patch16_224'"]),
        ("backbone", "timm:" + "a" * 3000, ["backbone", "3,000 characters"]),
        ("backbone", "open_clip:../x", ["backbone"]),
        ("learning_rate", 0.1, ["did you mean 'lr'"]),
        ("epochs", 3, ["did you mean 'num_epochs'"]),
        ("lr", "0" * 5000 + "x", ["lr must be a number", "5,001 characters"]),
    ],
)
def test_what_is_said(key: str, value: object, parts: list[str], told: Told) -> None:
    error = told(key, value)
    assert all(part in error for part in parts), error


@pytest.mark.parametrize(
    "value",
    [
        "{target_modules: '(.*)*.*.*.*x'}",
        "{exclude_modules: '(a*)*(.*)*.*.*y'}",
        "{rank_pattern: {'(([a-z0-9.]+)+)+!': 3}}",
        "{target_modules: '['}",
        "{r: 99999999999999999999}",
        "{rank_pattern: {qkv: 1000000000}}",
        "{target_modules: []}",
        "{target_modules: [1]}",
        "{r: [1]}",
    ],
)
def test_patterns_and_numbers_for_peft(value: str, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailtune.models.tuners.peft_wrapper.time_limit", lambda seconds, what: time_limit(0.3, what))
    assert "peft_args" in told("peft_args", value, "peft", "LoRA")


def test_a_model_that_this_machine_cannot_hold(launch: Cli, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run may be of another machine's work."""
    monkeypatch.setattr("tailtune.trainers.config_checks.total_memory", lambda: 10**6)
    assert told("adapter_dim", 4096) == ""
    one_line(launch(f"{FAKE} adapter_dim 4096"), "parameters", "GB", "adapter_dim", "num_classes")
    assert not Path("output").exists()


def test_what_others_call_an_option_is_no_option_of_ours() -> None:
    assert set(KNOWN_AS.values()) <= KEYS.keys()
    assert not KNOWN_AS.keys() & (KEYS.keys() | SCHEMA.aliases.keys())


def test_a_far_name_means_nothing() -> None:
    assert "did you mean" not in str(unknown("option", "learning_rate", ["calibrate", "seed"]))
    assert "did you mean 'batch_size'?" in str(unknown("option", "BatchSize", ["batch_size", "test_batch_size"]))


def test_a_message_names_its_option_once() -> None:
    for text in ("no such model", "the lr of others"):
        with pytest.raises(UserError, match=f"^{'lr: ' if 'lr' not in text else ''}{text}$"), prefix_errors("lr"):
            raise UserError(text)


# --- files and data --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ([0.1] * 9 + [0.2], "sum to 1.1, not to 1"),
        ([0.5] * 10, "sum to 5, not to 1"),
        ([1.0] * 10, "sum to 10, not to 1"),
        ([1.0, *[0.0] * 8, -0.0, 0], "each of the 10 classes, not 11"),
        ([1e300] * 10, "numbers from 0 on"),
        ([10**400] * 10, "numbers from 0 on"),
        ([True] * 10, "numbers from 0 on"),
    ],
)
def test_frequencies_that_are_none(
    content: list[float], part: str, config: Callable[..., CfgNode], tmp_path: Path
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=part):
        outline(config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", tmp_path / "mine.json"))


@pytest.mark.parametrize("content", [[0.1] * 10, [0.0999] * 10, [3] * 10, [1, *[0] * 9]])
def test_frequencies_and_counts(content: list[float], config: Callable[..., CfgNode], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(content))
    outline(config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", tmp_path / "mine.json"))


@pytest.mark.parametrize("key", ["train_list", "test_list", "val_list", "classnames", "descriptors", "class_counts"])
@pytest.mark.parametrize("content", [None, b"\xff\xfe", b""])
def test_a_file_is_named_with_its_option(key: str, content: bytes | None, launch: Cli, data: Path) -> None:  # noqa: F811
    if content is not None:
        (data / "mine.x").write_bytes(content)
    done = launch(f"{OWN} {key} mine.x", *(["prompt", "descriptor"] if key == "descriptors" else []))
    one_line(done, key, "mine.x")


def test_a_data_config_of_no_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for name, part in (
        ("a" * 300, "does not exist"),
        ("x\udcff", "UTF-8"),
        ("x\n", "control characters"),
        ("x\x00", "not"),
    ):
        path = f"{tmp_path}/{name}.yaml"
        if len(name) < 10 and "\0" not in name:
            os.close(os.open(path, os.O_CREAT))
        assert main.main(["-d", path, "-m", "tiny_clip"]) == 2
        error = capsys.readouterr().err
        assert part in error and error.count("\n") == 1
    assert main.main(["-d", "fake_lt", "-m", "tiny_clip", "lr", "1", "\udcff" * 500]) == 2
    assert "has no value" in capsys.readouterr().err


@pytest.mark.parametrize("backbone", ["TinyCLIP", "IN21K-ViT-B/16", "ResNet-20"])
def test_weights_are_named_with_their_option(backbone: str, launch: Cli, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(b"hello")
    tuned = "init_head none adaptformer False"
    one_line(
        launch(f"-d fake_lt -m tiny_clip_peft {tuned} backbone {backbone} pretrained ./w.pt"), "pretrained", "w.pt"
    )


def test_one_class(launch: Cli, data: Path) -> None:  # noqa: F811
    for split in ("train", "test"):
        file = data / f"{split}.txt"
        file.write_text("".join(line for line in file.read_text().splitlines(True) if line.endswith(" 0\n")))
    one_line(launch(OWN), "only one class", "at least two")
    (data / "train.txt").write_text("train/0_0.png 0\n")
    (data / "test.txt").write_text("train/0_0.png 0\n")
    one_line(launch(f"{OWN} --dry-run"), "only one class")


@pytest.mark.parametrize("name", ["class_mean", "1_shot", "linear_probe"])
@pytest.mark.parametrize("readable", [0, 1])
def test_a_head_of_images_that_cannot_be_read(name: str, readable: int) -> None:
    context = HeadContext(
        labels=torch.tensor([0, 0, 1]),
        num_classes=2,
        feature_dim=4,
        seed=0,
        device=torch.device("cpu"),
        encode_images=lambda positions: [(torch.ones(readable, 4), torch.arange(readable))],
        sum_over_processes=lambda tensor: tensor,
    )
    if readable and name != "linear_probe":
        assert HEAD_INITS[name](context, None, ()).isfinite().all()
        return
    with pytest.raises(UserError, match="init_head"):
        HEAD_INITS[name](context, None, ())


def test_weights_that_came_spoilt_are_not_blamed_on_the_learning_rate(
    launch: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tailtune.models.backbones.vit_encoder import ViTEncoder

    original = ViTEncoder.set_precision

    def spoilt(self: ViTEncoder, *args: object, **kwargs: object) -> None:
        original(self, *args, **kwargs)  # type: ignore[arg-type]
        norm = self.net.norm.weight
        if not norm.is_meta:
            norm.data[0] = float("nan")

    monkeypatch.setattr(ViTEncoder, "set_precision", spoilt)
    line = one_line(launch(f"{FAKE} max_steps 1 batch_size 8 num_workers 0 init_head none"), "pretrained", "not finite")
    assert "lower lr" not in line


# --- crops of small images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "resolution", "expand", "told_so"),
    [
        ("fivecrop", 224, 24, False),  # LIFT
        ("fivecrop", 224, 48, False),  # its patches of 32
        ("fivecrop", 32, 3, False),
        ("fivecrop", 32, 12, True),  # the embedded CLIP
        ("tencrop", 32, 24, True),  # ResNet-32
        ("fivecrop", 224, 1024, True),
        ("randaug", 32, 12, False),
    ],
)
def test_crops_that_leave_much_out(mode: str, resolution: int, expand: int, told_so: bool) -> None:
    texts = list(warnings_of(mode, resolution, expand, "lift"))
    assert len(texts) == told_so
    for text in texts:
        assert not list(warnings_of(mode, resolution, int(text.split("or set expand ")[1].split(",")[0]), "lift"))


def test_views_of_digits_in_the_mirror() -> None:
    assert "fivecrop" in next(warnings_of("tencrop", 224, 24, "digits"))
    assert not list(warnings_of("fivecrop", 224, 24, "digits"))


def test_the_warning_stands_in_the_result(launch: Cli) -> None:
    done = launch(f"{FAKE} zero_shot True adaptformer False init_head none tte True output_dir run num_workers 0")
    assert "warning: tte cuts crops of 32 pixels from 44" in done.stdout, done.stderr
    notes = json.loads(Path("output/run/metrics.json").read_text())["notes"]
    assert any("tte cuts crops" in note for note in notes)


# --- where a command is started --------------------------------------------------------------------------------------

LAUNCH = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0"),
        ({"WORLD_SIZE": "٢"}, "WORLD_SIZE"),
        ({"RANK": "1"}, "RANK 1 and WORLD_SIZE unset"),
        ({"WORLD_SIZE": "2"}, "no RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK 0 but no RANK"),
        ({**LAUNCH, "RANK": "2"}, "RANK 2 and WORLD_SIZE 2"),
        ({**LAUNCH, "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_leftovers_of_a_launcher(environment: dict[str, str], part: str) -> None:
    with pytest.raises(UserError, match="unset") as raised:
        check_environment(environment)
    assert part in str(raised.value)


def test_file_names_in_another_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists and YAML files are UTF-8, so their paths would name other files."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    with pytest.raises(UserError, match="iso8859-1 .* set PYTHONUTF8=1"):
        check_environment({})


@pytest.mark.parametrize("environment", [{}, LAUNCH, {"RANK": "0", "WORLD_SIZE": "1"}, {"MASTER_PORT": "29500"}])
def test_a_launch_and_none(environment: dict[str, str]) -> None:
    check_environment(environment)


def test_commands_look_at_it(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    one_line(launch(FAKE), "WORLD_SIZE 2")


def test_a_deleted_working_directory(launch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        one_line(launch(FAKE), "working directory")
    finally:
        os.chdir(tmp_path)


# --- what libraries say ----------------------------------------------------------------------------------------------


def test_libraries_do_not_speak_beside_our_line(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def talks(*_: object) -> int:
        warnings.warn("an old name\nis used", FutureWarning, stacklevel=1)
        logging.getLogger("timm.models").warning("no such %s", "weights")
        raise UserError("lr: no")

    monkeypatch.setattr(main, "run_command", talks)
    shown = warnings.showwarning
    done = launch("")
    one_line(done, "lr: no")
    assert done.stdout.splitlines() == [
        "library: FutureWarning: an old name is used",
        "library: timm.models: no such weights",
    ]
    assert warnings.showwarning is shown


# --- scripts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("my_run --metrics calibration", "unknown metric 'calibration'"),
        ("my_run --metrics accuracy per_class_acc", "'per_class_acc'"),
        ("my_run --format pdf", "--help"),
        ("my_run --seeds x", "--help"),
        ("", "--help"),
        ("nowhere/*", "nowhere"),
        ("empty", "no metrics.json of a run in empty (no run)"),
        ("many.yaml", "more than 10,000"),
        ("odd.yaml", "odd.yaml"),
    ],
)
def test_collect(
    words: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tailtune.scripts import collect

    monkeypatch.chdir(tmp_path)
    for name in ("my_run", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "my_run" / "metrics.json").write_text("{}")
    axes = "\n".join(f"  {letter}: [{', '.join(map(str, range(40)))}]" for letter in "abcdef")
    row = "lr {a}{b}{c}{d}{e}{f}"
    (tmp_path / "many.yaml").write_text(f"axes:\n{axes}\nrows:\n  x: -d fake_lt -m tiny_clip {row}\n")
    (tmp_path / "odd.yaml").write_text('rows: {x: "-d fake_lt -m tiny_clip \'lr"}\n')
    assert collect.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and part in error


def test_collect_leaves_out_what_is_no_run(launch: Cli, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from tailtune.scripts import collect

    assert (
        launch(f"{FAKE} zero_shot True adaptformer False init_head none output_dir run num_workers 0").returncode == 0
    )
    (tmp_path / "output" / "tables").mkdir()
    (tmp_path / "output" / "notes.txt").write_text("mine")
    assert collect.main([str(each) for each in sorted(Path("output").iterdir())]) == 0
    printed = capsys.readouterr()
    assert "run" in printed.out and "left out" in printed.err and "output/tables" in printed.err
    assert "output/notes.txt" in printed.err
