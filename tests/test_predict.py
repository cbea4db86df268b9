"""`predict`: labels for images that belong to no data set, equal to those of an evaluation of the same images."""

import csv
import io
import json
import logging
import math
import os
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image
from safetensors.torch import load_file
from test_data_verify import picture
from test_startup import modules_after
from tiers import slow_except

import tailtune
from tailtune.configs.errors import UserError
from tailtune.datasets.sources.given_paths import given_paths
from tailtune.trainers import labeller
from tailtune.trainers.methods.base import combine
from tailtune.trainers.option_schema import declared
from tailtune.trainers.prediction.class_folders import folder_names
from tailtune.trainers.prediction.outputs import open_outputs
from tailtune.trainers.prediction.request import PredictRequest
from tailtune.trainers.storage import large_tensors

CLASSES = ("ant", "bee", "wasp")
CONFIG = "dataset: ImageFolder\nroot: insects\nval_per_class: 4\n"
TRAINED = "-d insects.yaml -m tiny_clip_peft loss_type CE max_steps 2 lr 0.01 num_workers 0 output_dir run"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with images of three classes and a run that was trained on them. The tests do not change the run."""
    folder = tmp_path_factory.mktemp("predict")
    number = 0
    for split, counts in (("train", (10, 7, 6)), ("test", (5, 3, 4))):
        for name, count in zip(CLASSES, counts, strict=True):
            for i in range(count):
                path = folder / "insects" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture(number := number + 1).resize((48, 40 + number)).save(path)
    (folder / "insects.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = TRAINED.split()[4:]
        options = dict(zip(words[::2], words[1::2], strict=True))
        tailtune.train("insects.yaml", "tiny_clip_peft", **options)
    yield folder


@pytest.fixture
def run(home: Path, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> Cli:
    """`launch` in the folder of the run: `run("predict run photos")`."""
    monkeypatch.chdir(home)
    return launch


@pytest.fixture
def rows(run: Cli) -> Callable[..., list[Row]]:
    """Predicts the test images → the rows of the table."""

    def call(*words: object, code: int = 0) -> list[Row]:
        done = run("predict run --option num_workers 0", *words)
        assert done.returncode == code, done.stderr
        return [*csv.DictReader(io.StringIO(done.stdout))]

    return call


TEST = "insects/test"


def probability(row: Row, name: str) -> float:
    """The probability of a class in a row, which has all three."""
    return next(float(row[f"probability_{n}"]) for n in (1, 2, 3) if row[f"label_{n}"] == name)


def nll(table: list[Row]) -> float:
    """Mean of −log of the probability of the true class, which is the name of the folder."""
    return -sum(math.log(probability(row, Path(row["path"]).parent.name)) for row in table) / len(table)


def evaluated(run: Cli, *words: object) -> dict[str, Any]:
    """metrics.json of `test_only` with some options."""
    before = {*Path("output/run/tests").glob("*/metrics.json")}
    done = run(TRAINED, "test_only True", *words)
    assert done.returncode == 0, done.stderr
    (new,) = {*Path("output/run/tests").glob("*/metrics.json")} - before
    return json.loads(new.read_text())


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_the_evaluation(rows: Callable[..., list[Row]], home: Path) -> None:
    table = rows(TEST, "--option calibrate False")
    stored = load_file(home / "output/run/logits.safetensors")
    logits = combine(stored["logits"].float() + stored["row_max"].unsqueeze(-1))
    assert len(table) == len(logits) == 12
    for row, expected, label in zip(table, logits.softmax(1), stored["labels"].tolist(), strict=True):
        assert Path(row["path"]).parent.name == CLASSES[label], "the order is that of the split"
        assert row["label"] == row["label_1"] == CLASSES[expected.argmax()]
        assert row["probability"] == row["probability_1"]
        found = [probability(row, name) for name in CLASSES]
        assert found == pytest.approx(expected.tolist(), abs=2e-3), "stored in half precision"
    metrics = json.loads((home / "output/run/metrics.json").read_text())["test"]
    assert nll(table) == pytest.approx(metrics["nll"], abs=1e-5), "full precision"
    right = [Path(row["path"]).parent.name == row["label"] for row in table]
    assert 100 * np.mean(right) == pytest.approx(metrics["accuracy"])


PRIORS = ("uniform", "estimate", "estimate_online", "estimate_bbse", "prior.json")


@pytest.mark.parametrize("prior", slow_except(["estimate", "prior.json"], PRIORS))
def test_a_target_prior_is_that_of_an_evaluation(prior: str, run: Cli, rows: Callable[..., list[Row]]) -> None:
    Path("prior.json").write_text('{"bee": 0.2, "ant": 0.7, "wasp": 0.1}')
    table = rows(TEST, "--target-prior", prior)
    (distribution,) = evaluated(run, "target_prior", prior)["distributions"].values()
    expected = distribution["predictors"]["target_prior"]
    assert expected["temperature"] != 1, "the validation images gave one"
    # estimate_online predicts every image with the estimate after its batch; the order of the batches has another seed.
    assert nll(table) == pytest.approx(expected["nll"], abs=1e-3)


def test_an_estimate_from_a_file(rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    in_memory = rows(TEST, "--target-prior estimate")
    monkeypatch.setattr(large_tensors, "IN_MEMORY", 4)
    in_file = rows(TEST, "--target-prior estimate")
    for a, b in zip(in_memory, in_file, strict=True):
        assert a["label"] == b["label"] and float(a["probability"]) == pytest.approx(float(b["probability"]), abs=2e-3)


def test_a_validation_split_calibrates(rows: Callable[..., list[Row]]) -> None:
    """One temperature divides all logits."""
    plain, calibrated = (rows(TEST, f"--option calibrate {value}") for value in (False, True))
    ratios = {
        round(math.log(probability(b, "ant") / probability(b, "bee"))
        / math.log(probability(a, "ant") / probability(a, "bee")), 2)
        for a, b in zip(plain, calibrated, strict=True)
    }  # fmt: skip
    assert len(ratios) == 1 and ratios != {1.0}


def test_options_that_change_no_logits_do_not_end_the_calibration(run: Cli) -> None:
    """The run was evaluated with ten crops; one crop of each image has logits of its own, whatever the crops were."""
    words = TRAINED.replace("output_dir run", "output_dir crops")
    assert run(words, "tte True tte_mode tencrop expand 4").returncode == 0
    predict = f"predict crops {TEST} --option num_workers 0 --option tte False"
    assert "not calibrated" in run(predict).stderr
    assert run(words, "test_only True tte False").returncode == 0
    done = run(predict)
    assert done.returncode == 0 and "not calibrated" not in done.stderr


def test_views_are_those_of_an_evaluation(run: Cli, rows: Callable[..., list[Row]]) -> None:
    table = rows(TEST, "--tte --option calibrate False")
    assert nll(table) == pytest.approx(evaluated(run, "tte True")["test"]["nll"], abs=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        "-m zstiny_clip",
        "-m tiny_clip_sade image_backend pil",
        "-m resnet32_ride_ea",
        "-m tiny_clip_h2t test_prec bf16",
        "-m tiny_clip_batchformer",
    ],
)
def test_other_models(words: str, run: Cli) -> None:
    """Zero-shot, experts that share, skip or have features of their own, second stages, and other arithmetic."""
    name = words.split()[1]
    done = run("-d insects.yaml", words, "max_steps 1 num_workers 0 output_dir", name)
    assert done.returncode == 0, done.stderr
    expected = json.loads(Path("output", name, "metrics.json").read_text())["test"]
    for flags in ("", "--embeddings other.safetensors"):
        done = run("predict", name, TEST, "--option calibrate False --option num_workers 0", flags)
        assert done.returncode == 0, done.stderr
        table = [*csv.DictReader(io.StringIO(done.stdout))]
        assert nll(table) == pytest.approx(expected["nll"], rel=1e-4)
    assert len(load_file("other.safetensors")["embeddings"]) == len(table)


def test_nothing_but_the_table_is_written(rows: Callable[..., list[Row]], home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in home.rglob("*")}
    rows(TEST)
    assert {path: path.stat().st_mtime_ns for path in home.rglob("*")} == before


def test_a_turned_image(rows: Callable[..., list[Row]], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = picture(7).resize((60, 40))
    upright.save(tmp_path / "upright.png")
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    turned, straight = rows(tmp_path)
    assert {**turned, "path": ""} == {**straight, "path": ""}


def test_a_checkpoint_of_another_project(run: Cli, rows: Callable[..., list[Row]]) -> None:
    assert run(TRAINED, "export lift").returncode == 0
    words = "predict output/run/export/lift", TEST, "-d insects.yaml -m tiny_clip_peft --option num_workers 0"
    done = run(*words)
    assert done.returncode == 0, done.stderr
    assert [*csv.DictReader(io.StringIO(done.stdout))] == rows(TEST, "--option calibrate False")
    refused = run("predict output/run/export/lift", TEST)
    assert refused.returncode == 2 and "add -d DATA -m MODEL" in refused.stderr


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images in two folders, and files that are none."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a.png", "b.JPG", "deep/a.png", "deep/er/ü 1.png", ".hidden.png", ".thumbs/a.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (tmp_path / "photos" / "notes.doc").write_text("no image")
    (tmp_path / "photos" / "deep" / "round").symlink_to(tmp_path / "photos")
    return tmp_path / "photos"


ALL = ["photos/a.png", "photos/b.JPG", "photos/deep/a.png", "photos/deep/er/ü 1.png"]


@pytest.mark.parametrize(
    "source, found",
    [
        ("photos", ALL),
        ("photos/deep", ALL[2:]),
        ("photos/b.JPG", ALL[1:2]),
        ("photos/*.png", ALL[:1]),
        ("photos/*", ALL),
        ("photos/**/a.*", [ALL[0], ALL[2]]),
    ],
)
def test_files_folders_and_patterns(source: str, found: list[str], photos: Path) -> None:
    if source != "photos":  # there, the link from deep to photos leads to a folder that was searched already
        (photos / "deep" / "round").unlink()
    assert [*given_paths([source])] == found


def test_lists_and_standard_input(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = [path.removeprefix("photos/") for path in ALL]
    (photos / "list.txt").write_text("\ufeff" + "\r\n".join(below) + "\n\n", encoding="utf-8")
    assert [*given_paths(["photos/list.txt"])] == ALL, "paths start from the list"
    Path("here.lst").write_text("\n".join(ALL), encoding="utf-8")
    Path("elsewhere").mkdir()
    os.rename("here.lst", "elsewhere/here.lst")
    assert [*given_paths(["elsewhere/here.lst"])] == ALL, "or from the current folder"
    (photos / "labels.txt").write_text("".join(f"{path} {n}\n" for n, path in enumerate(below)), encoding="utf-8")
    assert [*given_paths(["photos/labels.txt"])] == ALL, "a list file of a training"
    stdin = io.TextIOWrapper(io.BytesIO(b"photos/a.png\n\nodd \xff.png\r\n"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert [*given_paths(["-"])] == ["photos/a.png", "odd \udcff.png"]


def test_the_folder_of_the_copies_is_not_searched(photos: Path) -> None:
    assert [*given_paths(["photos"], Path("photos/deep"))] == ALL[:2]


def test_paths_that_are_no_text(rows: Callable[..., list[Row]], run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsencode(f"{TEST}/ant/") + b"\xe9.png"
    picture(1).save(os.fsdecode(name))
    try:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(name + b"\n")))
        assert run("predict run - --out odd.csv").returncode == 0
        assert name in Path("odd.csv").read_bytes()
    finally:
        os.unlink(name)


# --- unreadable images, formats, copies, embeddings -------------------------------------------------------------------


def test_unreadable_images(run: Cli, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:200])
    (tmp_path / "empty.jpg").touch()
    done = run("predict run", tmp_path, tmp_path / "good.png", "--option num_workers 0")
    assert done.returncode == 1
    assert [row["path"] for row in csv.DictReader(io.StringIO(done.stdout))] == [str(tmp_path / "good.png")] * 2
    assert f"cannot read image {tmp_path}/empty.jpg: an empty file" in done.stderr
    assert f"cannot read image {tmp_path}/torn.png: " in done.stderr
    assert done.stderr.endswith("2 of 4 images could not be read and are left out\n")
    none = run("predict run", tmp_path / "torn.png")
    assert none.returncode == 1 and len(none.stdout.splitlines()) == 1, "the names of the columns"
    none = run("predict run", tmp_path / "torn.png", "--target-prior estimate")
    assert none.returncode == 2 and "no image could be read" in none.stderr


def test_json_lines(run: Cli, rows: Callable[..., list[Row]]) -> None:
    assert run("predict run", TEST, "--out labels.jsonl").stdout == ""
    for line, row in zip(Path("labels.jsonl").read_text().splitlines(), rows(TEST), strict=True):
        found = json.loads(line)
        assert (found["path"], found["label"], found["probability"]) == (
            row["path"], row["label"], float(row["probability"])
        )  # fmt: skip
        assert [each["label"] for each in found["top"]] == [row[f"label_{n}"] for n in (1, 2, 3)]


def test_parquet(run: Cli, rows: Callable[..., list[Row]]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run("predict run", TEST, "--out labels.parquet").returncode == 0
    table = parquet.read_table("labels.parquet").to_pylist()
    assert [{name: str(value) for name, value in row.items()} for row in table] == rows(TEST)


def test_copies_in_class_folders(run: Cli, rows: Callable[..., list[Row]], home: Path) -> None:
    table = rows(TEST)
    limit = sorted(float(row["probability"]) for row in table)[6]
    done = run("predict run", TEST, f"--threshold {limit} --copy-into sorted --out sorted.csv")
    assert done.returncode == 0, done.stderr
    with open("sorted.csv", newline="") as file:
        labels = [row["label"] for row in csv.DictReader(file)]
    expected = [row["label"] if float(row["probability"]) >= limit else "unsure" for row in table]
    assert labels == expected and "unsure" in labels
    for name in {*labels}:
        originals = [Path(row["path"]).read_bytes() for row, label in zip(table, labels, strict=True) if label == name]
        assert sorted(path.read_bytes() for path in Path("sorted", name).iterdir()) == sorted(originals)
    assert any(path.name == "0_2.png" for path in Path("sorted").rglob("*")), "two images of one name"
    again = run("predict run", TEST, "--copy-into sorted")
    assert again.returncode == 2 and "exists already" in again.stderr


def test_names_of_class_folders() -> None:
    labels = ["a/b", "a_b", "A_B", "..", " ", "tap\0", "bazaar, indoor"]
    assert folder_names(labels) == ["a_b", "a_b_2", "A_B_3", "class", "class_2", "tap_", "bazaar, indoor"]


def test_embeddings(run: Cli, rows: Callable[..., list[Row]]) -> None:
    """The head makes the probabilities of the table from them. Rows of unreadable images are left out of both."""
    Path("torn.png").write_bytes(b"torn")
    table = rows("torn.png", TEST, "--embeddings new/e.safetensors --option calibrate False", code=1)
    features = load_file("new/e.safetensors")["embeddings"]
    assert features.shape == (12, 128)
    with torch.no_grad():
        logits = combine(tailtune.load("run").method.head_logits(features))
    assert [CLASSES[label] for label in logits.argmax(1)] == [row["label"] for row in table]
    assert logits.softmax(1).amax(1).tolist() == pytest.approx([float(row["probability"]) for row in table], rel=1e-4)


# --- Python ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(home: Path, monkeypatch: pytest.MonkeyPatch) -> tailtune.TrainedModel:
    monkeypatch.chdir(home)
    return tailtune.load("run")


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, ""),
        ({"calibrate": False, "threshold": 0.36}, "--option calibrate False --threshold 0.36"),
        ({"target_prior": "uniform", "batch_size": 5}, "--target-prior uniform"),
        (
            {"target_prior": "estimate", "batch_size": 5, "embeddings": True},
            "--target-prior estimate --embeddings py.safetensors",
        ),
        ({"tte": True}, "--tte"),
        ({"tte": "tencrop"}, "--tte --option tte_mode tencrop"),
    ],
)
def test_python_predicts_as_the_command(
    given: dict[str, Any], words: str, model: tailtune.TrainedModel, rows: Callable[..., list[Row]]
) -> None:
    found = [*model.predict(TEST, num_workers=0, **given)]
    for position, (row, made) in enumerate(zip(rows(TEST, words), found, strict=True)):
        assert (made.index, made.path, made.label) == (position, row["path"], row["label"])
        assert made.probability == made.top[0][1] == pytest.approx(float(row["probability"]), rel=1e-4)
        assert [name for name, _ in made.top] == [row[f"label_{n}"] for n in (1, 2, 3)]
    if "embeddings" in given:
        features = torch.stack([made.features for made in found if made.features is not None])
        torch.testing.assert_close(features, load_file("py.safetensors")["embeddings"], atol=1e-5, rtol=1e-4)
    else:
        assert found[0].features is None


def test_python_takes_images_of_pillow(model: tailtune.TrainedModel, tmp_path: Path) -> None:
    """Of any mode, turned or damaged: as their files. What was not opened from a file has no path."""
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, mode in (("a", "RGB"), ("b", "L"), ("c", "RGBA"), ("d", "P")):
        picture(ord(name)).convert(mode).save(tmp_path / f"{name}.png", exif=exif)
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    paths = sorted(tmp_path.iterdir())
    expected, found = [*model.predict(tmp_path)], [*model.predict([Image.open(path) for path in paths])]
    assert [(each.index, each.path, each.top) for each in found] == [
        (n, str(p), e.top) for n, p, e in zip(range(4), paths, expected, strict=False)
    ]
    (alone,) = model.predict(Image.open(paths[1]).rotate(0))
    assert (alone.index, alone.path) == (0, None) and sum(p for _, p in alone.top) == pytest.approx(1)


def test_python_leaves_unreadable_images_out(
    model: tailtune.TrainedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    picture(1).save(tmp_path / "b.png")
    (tmp_path / "a.png").write_bytes(b"torn")
    (found,) = model.predict([tmp_path / "a.png", str(tmp_path / "b.png")])
    assert (found.index, found.path) == (1, str(tmp_path / "b.png"))
    assert f"cannot read image {tmp_path}/a.png" in caplog.text
    assert [*model.predict(tmp_path / "a.png")] == []


@pytest.mark.parametrize(
    "images, given, says",
    [
        ([], {}, "no image was given"),
        ("nowhere.png", {}, "no such file or folder: nowhere.png"),
        (np.zeros((4, 4, 3)), {}, "paths or images of Pillow, not ndarray"),
        (7, {}, "paths or images of Pillow, not int"),
        ([Image.new("L", (4, 4)), TEST], {}, "not both"),
        (TEST, {"threshold": 1.5}, "threshold must be a probability from 0 to 1, not 1.5"),
        (TEST, {"target_prior": "unifrom"}, "did you mean 'uniform'"),
        (TEST, {"tte": "tencrops"}, "tte_mode"),
        (TEST, {"tte": True, "embeddings": True}, "embeddings are of one view"),
        (TEST, {"batch_size": 0}, "test_batch_size"),
    ],
)
def test_wrong_input_in_python_is_found_at_once(
    images: Any, given: dict[str, Any], says: str, model: tailtune.TrainedModel
) -> None:
    with pytest.raises(UserError, match=says):
        model.predict(images, **given)


# --- memory, interruptions, errors ------------------------------------------------------------------------------------


def test_batches_are_dropped(rows: Callable[..., list[Row]], monkeypatch: pytest.MonkeyPatch) -> None:
    """While the table is written, one batch of images is alive, and the next one at most."""
    loader, alive, most = labeller.eval_loader, weakref.WeakSet[torch.Tensor](), []

    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in loader(*args, **options):
            alive.add(batch["image"])
            most.append(len(alive))
            yield batch

    monkeypatch.setattr(labeller, "eval_loader", counted)
    assert len(rows(*[TEST] * 5, "--option test_batch_size 3")) == 60
    assert len(most) == 20 and max(most) <= 2


def test_what_ends_early_leaves_nothing(run: Cli, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "predict run", TEST, "--out early.csv --copy-into early --embeddings early.safetensors"
    words += ("--option test_batch_size 3 --option num_workers 0",)
    Path("early.csv").write_text("before")
    before = {*home.rglob("*")}
    loader = labeller.eval_loader

    def ending(end: Callable[[], None]) -> Callable[..., Iterator[Any]]:
        def batches(*args: Any, **options: Any) -> Iterator[Any]:
            for number, batch in enumerate(loader(*args, **options)):
                if number == 2:
                    end()
                yield batch

        return batches

    def fail() -> None:
        raise UserError("the loader failed")

    for end, code, line in (
        (lambda: signal.raise_signal(signal.SIGINT), 130, "interrupted"),
        (fail, 2, "error: the loader failed"),
    ):
        monkeypatch.setattr(labeller, "eval_loader", ending(end))
        done = run(*words)
        assert (done.returncode, done.stderr.splitlines()[-1]) == (code, line)
        assert {*home.rglob("*")} == before and Path("early.csv").read_text() == "before"


@pytest.mark.parametrize(
    "words, says",
    [
        ("", "the following arguments are required: RUN, SOURCE"),
        ("run", "the following arguments are required: SOURCE"),
        ("nowhere insects", "predict: nowhere holds no checkpoint"),
        ("insects insects", "predict: insects holds no checkpoint"),
        ("run nowhere.png", "no such file or folder: nowhere.png"),
        ("run nowhere/*.png", "no file or folder fits the pattern nowhere/*.png"),
        ("run void", "no image in void"),
        ("run void.txt", "no image in void.txt"),
        ("run insects --threshold 2", "--threshold must be a probability from 0 to 1, not 2"),
        ("run insects --threshold nan", "--threshold must be a probability"),
        ("run insects --format parquet", "name a file with --out"),
        ("run insects --out labels.parquet", 'needs the package pyarrow: `pip install "tailtune[parquet]"`'),
        ("run insects --format xml", "invalid choice: 'xml'"),
        ("run insects --out void", "--out void is a folder"),
        ("run insects --out insects.yaml/a.csv", "files cannot be written into"),
        ("run insects --out a.x --embeddings a.x", "both name a.x"),
        ("run insects --copy-into insects", "--copy-into insects exists already"),
        ("run insects --copy-into insects.yaml", "--copy-into insects.yaml exists already"),
        ("run insects -d insects.yaml", "leave out -d and -m"),
        ("run insects --option lr 0.1", "lr belongs to the training"),
        ("run insects --option max_test_images 3", "predict: max_test_images changes nothing in the labels"),
        ("run insects --option tte_mode tencrop", "tte_mode tencrop does nothing without tte"),
        ("run insects --option nonsense 1", "unknown option 'nonsense'"),
        ("run insects --option test_prec fp8", "test_prec"),
        ("run insects --target-prior unifrom", "did you mean 'uniform'"),
        ("run insects --target-prior known", "target_prior known reads labels"),
        ("run insects --target-prior nowhere.json", "no file 'nowhere.json'"),
        ("run insects --target-prior other.json", "'hornet'"),
        ("run insects --tte --embeddings e.safetensors", "--embeddings are of one view"),
    ],
)
def test_wrong_input_is_one_line(words: str, says: str, run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    Path("void").mkdir(exist_ok=True)
    Path("void.txt").write_text("\n")
    Path("other.json").write_text('{"bee": 0.2, "ant": 0.7, "hornet": 0.1}')
    before = {*Path().rglob("*")}
    done = run("predict", words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") or "\nerror: " in done.stderr, done.stderr
    assert says in done.stderr.splitlines()[-1] and {*Path().rglob("*")} == before


def test_the_options_of_a_request_exist() -> None:
    schema = declared()
    assert all(schema[key].cls != "train" for key in labeller.READ)


def test_a_class_called_unsure(tmp_path: Path) -> None:
    request = PredictRequest("run", paths=given_paths([__file__]), threshold=0.5)
    with pytest.raises(UserError, match="the class 'unsure'"), open_outputs(request, ["unsure", "b"], io.BytesIO(), {}):
        pass


def test_a_closed_pipe(rows: Callable[..., list[Row]], run: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.BytesIO):
        def write(self, _: Any) -> int:
            raise BrokenPipeError

    stdout = io.TextIOWrapper(Closed())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        assert tailtune.main.main(["predict", "run", TEST]) == 0
        patch.setattr(sys, "stdout", stdout)
        assert tailtune.main.main(["predict", "run", TEST, "--copy-into", "pipe"]) == 2
    assert not Path("pipe").exists()
    stdout.detach()


def test_the_log_is_left_as_it_was(rows: Callable[..., list[Row]]) -> None:
    log = logging.getLogger("tailtune")
    before = [*log.handlers]
    rows(TEST)
    assert log.handlers == before


def test_wrong_input_is_found_before_torch(home: Path) -> None:
    codes, modules = modules_after(
        home,
        "predict nowhere insects",
        "predict run nowhere",
        "predict run insects --threshold 2",
        "predict run void.txt",
    )
    assert codes == [2] * 4 and not modules & {"torch", "torchvision", "timm", "open_clip", "accelerate", "sklearn"}
