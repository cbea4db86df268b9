"""Where a run's numbers go besides metrics.json: TensorBoard, trackers of Accelerate, the terminal."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate.tracking import GeneralTracker
from conftest import Cli, HasRun
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from test_report import subject
from tqdm import tqdm

from tailtune.configs.console_text import WIDTH
from tailtune.datasets.build_data import build_data
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.models.backbones.clip_text_encoder import ClipTextEncoder
from tailtune.trainers.evaluation.curves_of_evaluation import class_pictures
from tailtune.trainers.processes.console_log import attach_file, console_restored, start_console
from tailtune.trainers.progress import Curves, Progress
from tailtune.trainers.report.plots import accuracy_by_class

COMMAND = "-d fake_lt -m tiny_clip_peft pretrained none batch_size 64 max_test_images 20 num_epochs 1 output_dir run "
VALIDATED = f"{COMMAND} val_per_class 1 val_every 1 lr 0.25"


def events_of(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return events


def test_tags_and_steps(has_run: HasRun, tmp_path: Path) -> None:
    has_run(VALIDATED)
    run = tmp_path / "output" / "run"
    events, result = events_of(run), json.loads((run / "metrics.json").read_text())
    steps = result["train"]["steps"]
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/loss_avg", "train/acc", "train/acc_avg", "val/accuracy", "val/nll"} <= tags
    assert not {tag for tag in tags if tag.endswith((".val", ".avg"))}
    for tag in ("test/accuracy", "val/accuracy"):
        (point,) = events.Scalars(tag)
        assert point.step == steps and point.value == pytest.approx(result[tag.split("/")[0]]["accuracy"])


def test_old_tags(launch: Cli, tmp_path: Path) -> None:
    assert launch(f"{COMMAND} tensorboard_tags lift").returncode == 0
    tags = set(events_of(tmp_path / "output" / "run").Tags()["scalars"])
    assert {"train/loss.val", "train/loss.avg", "train/acc.val", "train/acc.avg"} <= tags and "train/loss" not in tags


def test_hyperparameters(has_run: HasRun, tmp_path: Path) -> None:
    """What TensorBoard's tab reads: the options of the session, and metrics that are curves of this run."""
    has_run(VALIDATED)
    events = events_of(tmp_path / "output" / "run")
    found = events.summary_metadata
    session = plugin_data_pb2.HParamsPluginData.FromString(
        found["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert session.hparams["lr"].number_value == 0.25 and session.hparams["data"].string_value == "fake_lt"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(found["_hparams_/experiment"].plugin_data.content)
    metrics = {each.name.tag for each in experiment.experiment.metric_infos}
    assert "test/accuracy" in metrics and metrics <= set(events.Tags()["scalars"])


# --- pictures ------------------------------------------------------------------------------------------------------

PICTURES = {"test/accuracy_by_frequency", "test/accuracy_by_class"}
DRAWN_BY = "tailtune.trainers.evaluation.curves_of_evaluation.class_pictures"


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest.py leaves them out."""
    monkeypatch.setattr(DRAWN_BY, class_pictures)


def test_pictures_of_the_class_accuracies(pictures: None, launch: Cli, tmp_path: Path) -> None:
    assert launch(COMMAND).returncode == 0
    run = tmp_path / "output" / "run"
    events, result = events_of(run), json.loads((run / "metrics.json").read_text())
    assert {*events.Tags()["images"]} == PICTURES
    for tag in PICTURES:
        (found,) = events.Images(tag)
        shown = Image.open(io.BytesIO(found.encoded_image_string))
        assert found.step == result["train"]["steps"] and shown.size == (found.width, found.height)
        assert shown.convert("RGB").getcolors(20) is None, "not blank"
    assert launch(f"{COMMAND} test_only True test_dists uniform").returncode == 0  # an evaluation from stored logits
    (later,) = (run / "tests").iterdir()
    assert {*events_of(later).Tags()["images"]} == PICTURES


def test_a_picture_that_fails_is_a_note(launch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DRAWN_BY, mock.Mock(side_effect=MemoryError("no room")))
    done = launch(COMMAND)
    assert done.returncode == 0 and "warning: no pictures of class accuracies (MemoryError: no room)" in done.stdout
    run = tmp_path / "output" / "run"
    assert "MemoryError: no room" in str(json.loads((run / "metrics.json").read_text())["notes"])
    assert "test/accuracy" in events_of(run).Tags()["scalars"]


@pytest.mark.parametrize("counts", [[300, 40, 3], [500 - number for number in range(500)]], ids=["names", "many"])
def test_classes_are_in_the_order_of_their_frequency(counts: list[int]) -> None:
    """Each class has its own accuracy, and the classes are given in another order."""
    order = np.random.default_rng(0).permutation(len(counts))
    shuffled = np.array(counts)[order]
    drawn = subject(shuffled.tolist(), [f"class of {count}" for count in shuffled])
    accuracies = 100.0 * shuffled / shuffled.max()
    drawn.result["test"]["per_class_acc"] = accuracies.tolist()  # type: ignore[index]
    figure = accuracy_by_class(drawn)
    figure.canvas.draw()
    (axes,) = figure.axes
    if len(counts) == 3:
        bars = sorted((patch.get_x(), patch.get_height()) for patch in axes.patches)
        assert [height for _, height in bars] == pytest.approx(sorted(accuracies)[::-1])
        assert [label.get_text() for label in axes.get_xticklabels()] == [f"class of {count}" for count in counts]
    else:
        tops = [segment[1] for lines in axes.collections for segment in lines.get_segments()]
        assert [height for _, height in sorted(tuple(top) for top in tops)] == pytest.approx(sorted(accuracies)[::-1])


# --- trackers ------------------------------------------------------------------------------------------------------


class Notebook(GeneralTracker):
    """A tracker that keeps what it is given."""

    name, requires_logging_directory, tracker = "notebook", False, None
    begun: list[dict[str, Any]] = []
    points: list[tuple[int | None, dict[str, float]]] = []
    finished = 0

    def __init__(self, run_name: str) -> None:
        super().__init__()

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.begun.append(values)

    def log(self, values: dict[str, float], step: int | None, **_: Any) -> None:
        self.points.append((step, values))

    def finish(self) -> None:
        type(self).finished += 1


@pytest.fixture
def notebook() -> Iterator[type[Notebook]]:
    Notebook.begun.clear(), Notebook.points.clear()
    Notebook.finished = 0
    with mock.patch.dict("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"notebook": Notebook}):
        yield Notebook


def test_a_tracker_gets_every_point(notebook: type[Notebook], launch: Cli, tmp_path: Path) -> None:
    assert launch(f"{COMMAND} val_per_class 1 val_every 1 trackers [tensorboard,notebook]").returncode == 0
    run = tmp_path / "output" / "run"
    given = {(tag, step): value for step, values in notebook.points for tag, value in values.items()}
    events = events_of(run)
    written = {(tag, each.step): each.value for tag in events.Tags()["scalars"] for each in events.Scalars(tag)}
    assert given == pytest.approx(written) and ("test/accuracy", 3) in given
    assert notebook.begun[0]["num_epochs"] == 1 and notebook.finished == 1


@pytest.mark.parametrize("single", [False, True])
def test_a_tracker_that_takes_images_gets_the_pictures(
    single: bool,
    pictures: None,
    notebook: type[Notebook],
    launch: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[tuple[int | None, dict[str, Any]]] = []

    def log_images(self: Notebook, values: dict[str, Any], step: int | None) -> None:
        given.append((step, values))

    monkeypatch.setattr(notebook, "log_images", log_images, raising=False)
    if single:
        monkeypatch.setattr("tailtune.trainers.evaluation.curves_of_evaluation.ONE_IMAGE", ("notebook",))
    assert launch(f"{COMMAND} trackers notebook").returncode == 0
    ((step, values),) = given
    assert step == 3 and {*values} == PICTURES and not (tmp_path / "output" / "run" / "tensorboard").exists()
    for value in values.values():
        assert isinstance(value if single else value[0], Image.Image)


def test_only_another_tracker(notebook: type[Notebook], launch: Cli, tmp_path: Path) -> None:
    with mock.patch(DRAWN_BY) as draw:
        assert launch(f"{COMMAND} trackers notebook").returncode == 0
        assert launch(f"{COMMAND} output_dir other report none").returncode == 0
    assert notebook.points and not (tmp_path / "output" / "run" / "tensorboard").exists()
    draw.assert_not_called()  # the one takes no images, the other shall have none


def test_trackers_that_cannot_start(notebook: type[Notebook], launch: Cli, tmp_path: Path) -> None:
    with mock.patch("tailtune.trainers.trackers.get_available_trackers", lambda: []):
        done = launch(f"{COMMAND} trackers [tensorboard,wandb]")
    assert done.returncode == 2
    assert done.stderr == "error: trackers: wandb is not installed; run `pip install wandb`, or leave it out\n"
    done = launch(f"{COMMAND} trackers tensorbored")
    assert done.returncode == 2 and "tensorboard" in done.stderr
    assert not (tmp_path / "output").exists()
    with mock.patch.object(notebook, "store_init_configuration", side_effect=ConnectionError("no\nnetwork")):
        done = launch(f"{COMMAND} trackers notebook")
    assert done.returncode == 2 and "trackers notebook cannot start (no network)" in done.stderr
    assert done.stderr.count("\n") == 1 and notebook.finished == 1


# --- the terminal --------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("validated", [False, True])
def test_a_line_fits_the_terminal_and_the_log_has_all_of_it(
    validated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large numbers: a long run whose steps take hours."""
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    groups: dict[str, float | None] = dict.fromkeys(("mean_acc", "many_acc", "med_acc", "few_acc"), 100.0)
    metrics = {"epoch": 300, "step": 299_999, "accuracy": 100.0, "nll": 12.3456, **groups} if validated else None
    with console_restored():
        start_console(main=True)
        attach_file(tmp_path / "log.txt")
        progress = Progress(Curves(True, None, lambda values, step: None, False), 300, 1000, 0, 300_000)
        progress.since -= 3000.0 * 150_000
        values = {"loss": 1234.5678, "loss_avg": 1234.5678, "acc": 100.0, "acc_avg": 100.0}
        progress.show(150_000, lambda step, steps: 0.1, [values], groups, metrics)
        progress.close()
        for handler in logging.getLogger("tailtune").handlers:
            handler.flush()
    (line,) = screen.getvalue().splitlines()
    assert len(line) <= WIDTH and line.startswith("epoch 150/300 ") and "eta " in line and "loss 1235" in line
    assert ("val 100.0 mean 100.0" in line) == validated
    text = (tmp_path / "log.txt").read_text()
    for part in ("batch [1000/1000]", "loss 1234.5678 (1234.5678)", "many 100.00", "lr 1.0000e-01", "eta "):
        assert part in text and part not in line.removesuffix(line.partition("eta ")[2]).removesuffix("eta ")
    assert ("val acc 100.00" in text) == validated


@pytest.mark.parametrize(
    ("stream", "title", "rank", "shown"),
    [
        (Terminal(), "test images", 0, True),
        (Terminal(), "", 0, False),
        (Terminal(), "test images", 1, False),
        (io.StringIO(), "test images", 0, False),
    ],
    ids=["terminal", "no title", "second process", "file"],
)
def test_a_bar_is_shown_on_a_terminal_only(
    stream: io.StringIO, title: str, rank: int, shown: bool, monkeypatch: pytest.MonkeyPatch, config: Any
) -> None:
    view = build_data(config("fake_lt", "tiny_clip")).test
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("COLUMNS", "80")
    at_once = lambda **given: tqdm(**{**given, "delay": 0, "mininterval": 0})  # noqa: E731
    monkeypatch.setattr("tailtune.datasets.loading.data_loader.tqdm", at_once)
    assert len(list(eval_loader(view, 10, 0, rank, 2, title=title))) == 5
    written = stream.getvalue()
    assert (title in written and "5/5" in written and "batch/s" in written) if shown else not written
    assert all(len(line) <= 80 for line in written.replace("\r", "\n").splitlines())


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_only_the_first_process_shows_that_texts_are_encoded(
    rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("sys.stderr", screen)
    at_once = lambda chunks, **given: tqdm(chunks, **{**given, "delay": 0})  # noqa: E731
    monkeypatch.setattr("tailtune.models.backbones.clip_text_encoder.tqdm", at_once)
    clip = torch.nn.Identity()
    clip.logit_scale, clip.encode_text = torch.zeros(()), lambda tokens: torch.ones(len(tokens), 4)
    encoder = ClipTextEncoder(clip, lambda chunk: torch.zeros(len(chunk), 7), None)
    assert encoder.class_features([("a cat", "one cat"), ("a dog",)]).shape == (2, 4)
    assert ("class texts" in screen.getvalue()) == shown
