"""What others have put into a folder stays there, whatever its name and whatever a run is asked to do."""

import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from conftest import Cli, HasRun
from test_bad_input import FAKE, RUN, SHORT, data, one_line, refuses, signal_after  # noqa: F401
from test_bad_input import OWN as OWN_DATA
from tiers import slow_except

from tailtune.trainers.storage.manifest import LOCK, MARKER, Manifest

NAMES = ("tensorboard", "analysis", "export", "log.txt", "config.yaml", "checkpoint", "metrics.json", "state", "tests")
FOLDERS = ("tensorboard", "analysis", "export", "checkpoint", "state", "tests", "splits", "stage1")


def everything(folder: Path) -> dict[str, bytes]:
    """Path → content of every file below a folder."""
    return {str(each.relative_to(folder)): each.read_bytes() for each in folder.rglob("*") if each.is_file()}


def put(folder: Path, name: str) -> None:
    """Something of the user's by that name."""
    path = folder / name
    if name in FOLDERS:
        path.mkdir(parents=True)
        (path / "thesis.txt").write_text("years")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("years")


OTHERS = [*NAMES, "splits", "stage1", "notes.txt", "logits.safetensors", ".lock", LOCK + ".old"]
COMMANDS = ["", "resume False", "loss_type LAX", "test_only True"]
EITHER = [(name, words) for name, words in product(OTHERS, COMMANDS) if name == "notes.txt" or not words]


@pytest.mark.parametrize(("name", "words"), slow_except(EITHER, product(OTHERS, COMMANDS)))
def test_a_folder_of_others_is_refused(launch: Cli, name: str, words: str) -> None:
    put(RUN, name)
    before = everything(RUN)
    one_line(launch(f"{SHORT} {words}"), "LAX" if "LAX" in words else "output/run holds")
    assert everything(RUN) == before


def test_another_program_has_a_file_of_the_markers_name(launch: Cli) -> None:
    put(RUN, MARKER)
    one_line(launch(SHORT), MARKER)
    assert everything(RUN) == {MARKER: b"years"}


def test_what_an_export_needs_is_looked_at_before_training(launch: Cli, has_run: HasRun) -> None:
    has_run(SHORT)
    put(RUN, "export")
    before = everything(Path("output"))
    one_line(launch(f"{SHORT} export lift resume False"), "output/run/export", "was not made by the run")
    assert everything(Path("output")) == before


@pytest.mark.parametrize("name", ["export", "tests"])
def test_a_name_that_a_run_needs_later(launch: Cli, has_run: HasRun, name: str) -> None:
    """It was free when the run began."""
    has_run(SHORT)
    put(RUN, name)
    before = everything(RUN)
    words = {"export": "export lift", "tests": "test_only True"}[name]
    one_line(launch(f"{SHORT} {words}"), f"output/run/{name}", "was not made by the run")
    assert {path: each for path, each in everything(RUN).items() if path != "log.txt"} == {
        path: each for path, each in before.items() if path != "log.txt"
    }


def test_a_refused_command_leaves_the_finished_run(launch: Cli, data: Path) -> None:  # noqa: F811
    """`resume False` finds an unreadable image, or no weights, before anything moves."""
    words = f"{OWN_DATA} output_dir run"
    assert launch(words).returncode == 0
    before = everything(Path("output"))
    image = data / "images/train/0_0.png"
    whole = image.read_bytes()
    for content in (b"no image", whole[: len(whole) // 2]):
        image.write_bytes(content)
        one_line(launch(f"{words} resume False"), "0_0.png")
        assert everything(Path("output")) == before
    image.write_bytes(whole)
    one_line(launch(f"{words} resume False pretrained gone.safetensors"), "gone.safetensors")
    assert everything(Path("output")) == before


def test_starting_over_twice_keeps_both(launch: Cli) -> None:
    for _ in range(3):
        assert launch(f"{SHORT} max_steps 1 resume False").returncode == 0
    assert sorted(each.name for each in Path("output").iterdir()) == ["run", "run.previous-1", "run.previous-2"]
    ids = [Manifest.read(each).run for each in Path("output").iterdir()]  # type: ignore[union-attr]
    assert len(set(ids)) == 3
    assert "finished before" in launch(f"{SHORT} max_steps 1 output_dir run.previous-1").stdout


def test_what_stands_beside_a_run_stays(launch: Cli) -> None:
    """Also in its folders, when it starts over, writes states and its checkpoint again."""
    with signal_after(2):
        assert launch(SHORT).returncode == 130
    own = [RUN / "notes.txt", RUN / "state" / "00000002" / "mine.txt", RUN / "state" / "mine.txt"]
    for path in own:
        path.write_text("years")
    assert launch(SHORT).returncode == 0
    assert all(path.read_text() == "years" for path in own)
    (RUN / "checkpoint" / "mine.txt").write_text("years")
    assert launch(f"{SHORT} test_only True").returncode == 0
    assert launch(f"{SHORT} resume False").returncode == 0
    assert (RUN / "notes.txt").exists()
    assert sum(each == b"years" for each in everything(Path("output")).values()) == 4


def test_a_later_stage_leaves_its_first_stage(launch: Cli) -> None:
    words = f"{FAKE} method crt after tiny_clip_peft after.pretrained none max_steps 1 output_dir run"
    assert launch(words).returncode == 0
    stage = everything(RUN / "stage1")
    assert launch(f"{words} resume False").returncode == 0
    assert {**everything(RUN / "stage1"), "log.txt": b""} == {**stage, "log.txt": b""}
    assert (Path("output/run.previous-1") / "metrics.json").exists()


def test_a_later_stages_folder_is_looked_at_first(launch: Cli) -> None:
    put(RUN, "notes.txt")
    words = f"{FAKE} method crt after tiny_clip_peft after.pretrained none max_steps 1 output_dir run"
    one_line(launch(words), "output/run holds notes.txt")
    assert everything(RUN) == {"notes.txt": b"years"}


def test_names_that_a_write_might_take(launch: Cli, has_run: HasRun) -> None:
    has_run(SHORT)
    paths = [RUN / name for name in (".config.yaml.tmp", ".checkpoint.new.tmp", ".state.old.tmp")]
    for path in paths:
        path.write_text("years")
    for words in ("", "resume False", "test_only True", "resume False lr 0.1 max_steps 1"):
        assert launch(f"{SHORT} {words}").returncode == 0
    assert all(path.read_text() == "years" for path in paths)


def test_a_first_stage_that_never_began_is_no_obstacle(launch: Cli) -> None:
    """It was stopped between its lock and its first file."""
    (RUN / "stage1").mkdir(parents=True)
    (RUN / "stage1" / LOCK).touch()
    words = f"{FAKE} method crt after tiny_clip_peft after.pretrained none max_steps 1 output_dir run"
    assert launch(words).returncode == 0


def test_a_lock_is_not_left_behind(launch: Cli) -> None:
    put(RUN, "checkpoint.pth.tar")
    one_line(launch(f"{SHORT} test_only True"), "checkpoint.pth.tar")
    assert everything(RUN) == {"checkpoint.pth.tar": b"years"}


def test_a_pipe_instead_of_a_marker(launch: Cli) -> None:
    RUN.mkdir(parents=True)
    os.mkfifo(RUN / MARKER)
    one_line(launch(SHORT), MARKER)


@pytest.mark.parametrize("content", ["", "{}", '{"format": "tailtune run"}', "[" * 100_000])
def test_a_damaged_marker(has_run: HasRun, content: str, refuses: Callable[..., str]) -> None:  # noqa: F811
    has_run(SHORT)
    (RUN / MARKER).write_text(content)
    for words in ("", "resume False", "test_only True"):
        refuses(f"{SHORT} {words}", MARKER, "damaged")


def test_a_changed_marker(has_run: HasRun, refuses: Callable[..., str]) -> None:  # noqa: F811
    """A name that is added to what the run has made does not make it the run's."""
    has_run(SHORT)
    (RUN / "notes.txt").write_text("years")
    text = (RUN / MARKER).read_text()
    (RUN / MARKER).write_text(text.replace('"made": [', '"made": [\n  "notes.txt",'))
    refuses(f"{SHORT} resume False", MARKER, "checksum")
    assert (RUN / "notes.txt").read_text() == "years"
