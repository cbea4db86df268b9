"""report.html and predictions.csv: what they show, that they need nothing else, and how they are made again."""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli, HasRun
from PIL import Image

from tailtune import main
from tailtune.datasets.shot_groups import shot_groups
from tailtune.trainers.evaluation.metrics import Predictions, evaluate_predictions
from tailtune.trainers.evaluation.report_of_evaluation import add_report
from tailtune.trainers.report.page import page
from tailtune.trainers.report.subject import EvaluatedImages, Launch, Predicted, Subject
from tailtune.trainers.report.tables import metric_rows
from tailtune.trainers.runs.result_table import number
from tailtune.trainers.storage.manifest import Manifest

FAKE = "-d fake_lt -m tiny_clip_peft max_steps 1 num_workers 0 output_dir run"
RUN = Path("output/run")
REFERENCE = re.compile(
    r"""(?:src|href|action|data|poster)\s*=\s*["']?\s*(?!data:|#)[^\s"'>]|url\((?!#)|@import|https?://"""
)
"""What makes a browser ask for another file, and any address."""


@pytest.fixture(autouse=True)
def reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest.py leaves reports out."""
    monkeypatch.setattr("tailtune.trainers.evaluation.evaluate.add_report", add_report)


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with a report, not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("reported"))
        patch.setattr("tailtune.trainers.evaluation.evaluate.add_report", add_report)
        assert main.main(FAKE.split()) == 0
        return RUN.absolute()


class Tables(HTMLParser):
    """The cells of the tables of a page: id of the table → rows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.within = False
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: Sequence[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes).get("id") or "", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
            self.within = True

    def handle_endtag(self, tag: str) -> None:
        self.within = self.within and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.within:
            self.rows[-1][-1] += data.strip()


def read(folder: Path) -> tuple[str, dict[str, list[list[str]]], dict[str, Any]]:
    """The page of a folder, its tables, and metrics.json."""
    html = (folder / "report.html").read_text("utf-8")
    return html, Tables(html).tables, json.loads((folder / "metrics.json").read_text())


def class_rows(html: str) -> list[list[Any]]:
    """The rows of the table of classes, which the script of the page draws."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found)


def subject(counts: Sequence[int], names: Sequence[str], seed: int = 0, **changes: Any) -> Subject:
    """Three test images of each class, of which about a third is confused with a class nearby."""
    random, total = np.random.default_rng(seed), len(counts)
    labels = np.repeat(np.arange(total), 3)
    guesses = (labels + (random.random(len(labels)) < 0.3) * random.integers(1, 3, len(labels))) % total
    confidence = random.random(len(labels)).astype(np.float32)
    groups = shot_groups(counts, 100, 20)
    tensors = [torch.from_numpy(array) for array in (labels, guesses, confidence, -np.log(confidence))]
    metrics: Mapping[str, Any] = {**evaluate_predictions(Predictions(*tensors, total), groups), "bad_images": 0}
    result = {"data": "owls", "model": "net", "seed": 1, "class_counts": list(counts), "test": metrics, "notes": []}
    result |= {"stopped_early": False, "evaluation": {"many_above": 100, "few_below": 20}}
    made = Subject(
        result,
        names,
        {name: classes.numpy() for name, classes in groups.items()},
        Predicted(labels, guesses, confidence, np.arange(len(labels))),
        EvaluatedImages("test"),
        Path("nowhere"),
        Launch("python main.py", "lr: 0.1\n"),
    )
    return replace(made, **changes)


def test_the_numbers_are_those_of_the_result(reported: Path) -> None:
    assert f"report {RUN / 'report.html'}" in (reported / "log.txt").read_text()
    html, tables, result = read(reported)
    test, rows = result["test"], {row[0]: row[1] for row in tables["metrics"][1:]}
    shown = {"all": "accuracy", "mean": "mean_acc", "many": "many_acc", "medium": "med_acc", "few": "few_acc"}
    shown |= {"worst": "worst_case_acc", "macro F1": "macro_f1", "ECE": "ece", "error": "error_rate"}
    assert {name: rows[name] for name in shown} == {name: number(test[key]) for name, key in shown.items()}
    assert rows["NLL"] == number(test["nll"], 4) and rows["unreadable"] == "0"
    classes = class_rows(html)
    assert [row[4] for row in classes] == [round(value, 2) for value in test["per_class_acc"]]
    assert [row[2] for row in classes] == result["class_counts"]
    for text in (result["commit"], result["hardware"], "-d fake_lt -m tiny_clip_peft max_steps 1"):
        assert text in html
    assert all(fingerprint in html for fingerprint in result["evaluation"]["images"].values())


@pytest.mark.parametrize(
    ("about", "facts", "said"),
    [
        ({}, {}, "more than 20 training images."),
        ({"group_imb_factor": 0.01}, {}, "more than 20 training images that group_imb_factor 0.01 would leave."),
        ({}, {"subset_cap": 40}, "more than 20 training images before subset_cap 40."),
    ],
)
def test_the_groups_are_explained_by_what_made_them(about: dict[str, Any], facts: dict[str, Any], said: str) -> None:
    """The page also has the number of training images of each class, which is another one then."""
    result = {"evaluation": {"many_above": 20, "few_below": 5, **about}, "test": {"accuracy": 1.0}, **facts}
    assert any(said in meaning for _, _, meaning in metric_rows(result)[1])


def test_the_predictions_are_those_of_the_result(reported: Path) -> None:
    html, tables, result = read(reported)
    with (reported / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "true", "predicted", "probability"]
    hits = [row["true"] == row["predicted"] for row in rows]
    assert 100 * sum(hits) / len(rows) == pytest.approx(result["test"]["accuracy"])
    assert rows[7]["path"] == "test 7" and all(0 < float(row["probability"]) <= 1 for row in rows)
    name, _, _, _, _, precision = next(row for row in class_rows(html) if row[5])
    of_class = [hit for hit, row in zip(hits, rows, strict=True) if row["predicted"] == name]
    assert precision == round(100 * sum(of_class) / len(of_class), 2)
    true, predicted, images = tables["pairs"][1][:3]
    assert int(images) == sum((row["true"], row["predicted"]) == (true, predicted) for row in rows)
    assert html.count('class="thumb"><img src="data:image/jpeg') == min(24, hits.count(False))


def test_the_curves_show_the_epoch_that_was_kept(launch: Cli) -> None:
    words = "num_epochs 2 subset_cap 8 max_test_images 20 val_per_class 1 val_every 1 num_workers 0 output_dir run"
    for keep, shown in (("keep best:mean_acc", True), ("resume False", False)):
        assert launch("-d fake_lt -m tiny_clip_peft", words, keep).returncode == 0
        html, _, result = read(RUN)
        assert ("kept epoch" in html) == shown == ("kept_epoch" in result["train"])


def test_nothing_is_asked_of_anybody(reported: Path) -> None:
    html, _, _ = read(reported)
    found = [html[max(0, match.start() - 30) : match.end() + 60] for match in REFERENCE.finditer(html)]
    assert [text for text in found if "www.w3.org/" not in text] == []  # names of XML, which nobody opens


def names_of_evil(count: int) -> Iterator[str]:
    yield from ("<script>alert(1)</script>", "</script><b>", "$x^2$ & \"'", "猫\x07", 'id="x" url(#y)')
    yield from (f"class {label}" for label in range(5, count))


def test_names_are_text() -> None:
    html = page(subject([200, 150, 90, 60, 30, 15, 9, 4], list(names_of_evil(8)))).decode()
    assert "<script>alert" not in html and "</script><b>" not in html
    assert html.count("<script") == html.count("</script>") == 2
    assert sorted(row[0] for row in class_rows(html))[1] == "</script><b>"
    assert "$x^2$ &amp; " in html and "id=&#34;x&#34; url(#y)" in html


def test_many_classes_stay_small() -> None:
    counts = [max(1, int(1000 * 0.99914**label)) for label in range(8142)]
    html = page(subject(counts, [f"Genus species number {label}" for label in range(8142)]))
    assert len(html) < 2e6
    assert len(class_rows(html.decode())) == 8142 and html.count(b"<tr") < 200, "the script draws the rows"


@pytest.mark.parametrize("counts", [[5, 5], [1, 1, 1], [7, 0, 3]])
def test_few_and_empty_classes(counts: list[int]) -> None:
    assert b"</html>" in page(subject(counts, [f"c{label}" for label in range(len(counts))]))


def test_no_mistake_is_no_error() -> None:
    made = subject([30, 20, 10], ["a", "b", "c"])
    right = replace(made.predicted, classes=made.predicted.labels)
    html = page(replace(made, predicted=right)).decode()
    assert "Every image was classified correctly" in html and "Most confused pairs" not in html


def picture_folder(root: Path) -> None:
    for split, each in (("train", 6), ("test", 4)):
        for label, name in enumerate(("owl", "wren")):
            for index in range(each):
                path = root / split / name / f"{index}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 30), (90 * label, 20 * index, 60)).save(path)


def test_images_that_are_gone(launch: Cli, tmp_path: Path) -> None:
    """Made again without the images, the page has no pictures; paths are those that the run has stored."""
    picture_folder(tmp_path / "birds")
    Path("birds.yaml").write_text("dataset: ImageFolder\nroot: birds\n")
    assert launch("-d birds.yaml -m tiny_clip_peft max_steps 1 num_workers 0 output_dir run").returncode == 0
    html, tables, _ = read(RUN)
    before = (RUN / "predictions.csv").read_bytes()
    assert before.splitlines()[1].startswith(b"test/owl/0.png,owl,") and "data:image/jpeg" in html
    assert launch("report", RUN).returncode == 0
    assert read(RUN)[0] == html, "the same page is made again"
    (tmp_path / "birds").rename(tmp_path / "elsewhere")
    done = launch("report run")
    assert done.returncode == 0 and "the images are not where they were" in done.stdout
    again, tables_again, _ = read(RUN)
    assert "data:image/jpeg" not in again and "no pictures" in again
    assert tables_again["metrics"] == tables["metrics"] and (RUN / "predictions.csv").read_bytes() == before


def test_a_run_with_experts_and_distributions(launch: Cli) -> None:
    words = "-d fake_lt -m tiny_clip_sade max_steps 1 num_workers 0 output_dir run target_prior uniform adapt_epochs 1"
    assert launch(words, "max_test_images 60 report all").returncode == 0
    html, tables, result = read(RUN)
    rows = {(row[0], row[2].split()[0]): row for row in tables["of-distributions"][1:]}
    assert len(result["distributions"]) == 11
    for name, entry in result["distributions"].items():
        for predictor, values in entry["predictors"].items():
            row = rows[name, predictor]
            assert (row[1], row[3]) == (f"{entry['n']:,}", number(values["accuracy"]))
            if "weights" in values:
                assert row[10] == " ".join(f"{weight:.2f}" for weight in values["weights"])
    assert 'class="weights"' in html and 'class="curves"' in html
    names = {path.name for path in (RUN / "figures").iterdir()}
    figures = ("frequency", "distributions", "weights", "confusion", "reliability", "curves")
    assert names == {f"{figure}.{suffix}" for figure in figures for suffix in ("png", "pdf")}


def test_what_is_there_and_what_is_missing(launch: Cli, has_run: HasRun) -> None:
    has_run(FAKE, "report none")
    assert not (RUN / "report.html").exists() and not (RUN / "predictions.csv").exists()
    assert "finished before" in launch(FAKE).stdout, "a run without a report is finished"
    assert launch("report run --figures").returncode == 0
    manifest = Manifest.read(RUN)
    assert manifest is not None and all(map(manifest.intact, (RUN / "report.html", RUN / "figures/confusion.pdf")))
    assert launch(FAKE, "test_only True few_below 3").returncode == 0
    (later,) = (RUN / "tests").iterdir()
    html, _, _ = read(later)
    assert "few_below 3" in html and "test_only True" in html
    assert launch("report", later).returncode == 0 and read(later)[0] == html
    assert "finished before" in launch(FAKE).stdout


def test_a_report_that_fails_costs_no_result(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr("tailtune.trainers.evaluation.report_of_evaluation.write_report", broken)
        done = launch(FAKE)
    assert done.returncode == 0 and "no report (ZeroDivisionError: a bug)" in done.stdout + done.stderr
    assert "no report" in json.loads((RUN / "metrics.json").read_text())["notes"][-1]
    assert launch("report run").returncode == 0 and (RUN / "report.html").exists()


@pytest.mark.parametrize("missing, says", [("metrics.json", "no metrics.json"), ("logits.safetensors", "is missing")])
def test_a_report_of_nothing_is_refused(missing: str, says: str, launch: Cli, has_run: HasRun) -> None:
    has_run(FAKE, "report none")
    (RUN / missing).unlink()
    refused = launch("report run")
    assert refused.returncode == 2 and says in refused.stderr and not (RUN / "report.html").exists()


def test_a_file_of_somebody_else_stays(launch: Cli, has_run: HasRun) -> None:
    has_run(FAKE, "report none")
    manifest = Manifest.read(RUN)
    assert manifest is not None and "report.html" in manifest.made  # as runs of earlier versions have it not
    manifest.made = [name for name in manifest.made if name not in ("report.html", "predictions.csv", "figures")]
    manifest.seal({})
    (RUN / "report.html").write_text("mine")
    refused = launch("report run")
    assert refused.returncode == 2 and "was not made by the run" in refused.stderr
    assert (RUN / "report.html").read_text() == "mine"
