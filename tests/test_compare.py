"""`compare`: rows of runs, tests over the same test images against a hand computation, and the formats."""

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import Cli
from scipy.stats import bootstrap as scipy_bootstrap

from tailtune.configs import values_of
from tailtune.configs.key import TEST, TRAIN
from tailtune.scripts import _grid, collect
from tailtune.trainers.comparison.answers import compare_with_first
from tailtune.trainers.comparison.curves import overlaid
from tailtune.trainers.comparison.finished_runs import folder_rows
from tailtune.trainers.comparison.latex_format import as_latex
from tailtune.trainers.comparison.paired_tests import bootstrap, class_means, class_weights, mcnemar
from tailtune.trainers.comparison.rows import Row, best, ranked
from tailtune.trainers.comparison.tables import Table
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.logit_files import save_logits
from tailtune.trainers.option_schema import declared
from tailtune.trainers.storage.atomic_io import FACTS
from tailtune.trainers.storage.tensorboard_events import Events

LABELS = [0] * 4 + [1] * 4 + [2] * 2
BASE = [0, 0, 0, 0] + [1, 1, 0, 0] + [0, 0]
BETTER = [0, 0, 0, 1] + [1, 1, 1, 1] + [2, 0]
"""Predictions for ten images. BETTER is right on three images that BASE gets wrong, and wrong on one other image."""


Make = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`run("name", predictions, lr=0.1)` → the folder of a finished run that made these predictions."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, predictions: list[int], images: str = "f00d", left_out: int = 0, **options: object) -> Path:
        words = [str(word) for pair in options.items() for word in pair]
        cfg = _grid.config(["-d", "fake_lt", "-m", "tiny_clip", *words])
        folder = Path("output") / name
        folder.mkdir(parents=True)
        labels, found = torch.tensor(LABELS)[left_out:], torch.tensor(predictions)[left_out:]
        logits = torch.nn.functional.one_hot(found, 3).float().unsqueeze(1)
        index = torch.arange(len(LABELS))[left_out:]
        save_logits(folder / "logits.safetensors", Logits(logits, labels, index), {"images": images})
        accuracy = 100 * float((labels == found).float().mean())
        result = {"data": "fake_lt", "model": "tiny_clip", "seed": cfg.seed, "class_counts": [30, 10, 2]}
        result |= {"evaluation": {"many_above": 20, "few_below": 5}, "params": {"trainable": 1280}, "notes": []}
        result |= {
            "test": {"accuracy": accuracy, "ece": 100 - accuracy, "many_acc": 1.0, "med_acc": 2.0, "few_acc": None}
        }
        (folder / "metrics.json").write_text(json.dumps(result))
        (folder / "config.yaml").write_text(yaml.safe_dump(values_of(cfg, TRAIN, TEST)))
        with Events(folder / "tensorboard") as events:
            for step in range(1, 4):
                events.add_scalar("train/loss.avg", 1 / step, step)
            events.add_scalar("test/accuracy", accuracy)
        return folder

    return make


def rows_of(*folders: Path) -> list[Row]:
    return folder_rows(folders, declared())[0]


def test_a_row_has_each_seed_once(run: Make, launch: Cli) -> None:
    """A copy of a run is no further seed, and neither is an earlier run of the same seed."""
    first, other = run("base", BASE), run("base_seed_1", BETTER, seed=1)
    aside, copy = run("base.previous-1", BETTER), run("copy", BASE)
    for folder, checkpoint in ((first, "a"), (other, "b"), (aside, "c"), (copy, "a")):
        result = json.loads((folder / "metrics.json").read_text())
        result["evaluation"]["checkpoint"] = checkpoint
        (folder / "metrics.json").write_text(json.dumps(result))
    rows = rows_of(first, other, aside, copy, first.absolute())
    assert [row.folders for row in rows] == [(first, other), (aside,)]
    done = launch("compare", first, copy)
    assert done.stderr == f"left out 1 of 2: {copy} (the same as {first})\n" and "±" not in done.stdout.splitlines()[2]


# --- the tests against a hand computation ----------------------------------------------------------------------------


def test_mcnemar_is_the_exact_binomial_test() -> None:
    """10 wins, 3 losses: p = 2 · P(at most 3 of 13 coin flips) = 2 · 378/8192."""
    ours = np.array([True] * 10 + [False] * 3 + [True] * 5 + [False] * 2)
    other = np.array([False] * 10 + [True] * 3 + [True] * 5 + [False] * 2)
    found = mcnemar(ours, other)
    assert (found.wins, found.losses) == (10, 3)
    assert found.p == pytest.approx(2 * (1 + 13 + 78 + 286) / 2**13)
    assert mcnemar(other, ours).p == found.p
    assert mcnemar(ours, ours).p == 1


def test_the_interval_is_that_of_the_exact_bootstrap_distribution() -> None:
    """Of 20 images 6 are won and 14 equal: a sample has k wins with probability C(20, k) 0.3^k 0.7^(20 − k)."""
    found = bootstrap(np.array([1.0] * 6 + [0.0] * 14))
    below = np.cumsum([comb(20, k) * 0.3**k * 0.7 ** (20 - k) for k in range(21)])
    low, high = (int(np.searchsorted(below, share)) for share in (0.025, 0.975))
    assert (low, high) == (2, 10)
    assert (found.difference, found.low, found.high) == pytest.approx((30, 100 * low / 20, 100 * high / 20))
    assert found.low > 0 or found.high < 0


def test_the_interval_is_that_of_scipy() -> None:
    """Several seeds give more values than −1, 0 and 1; drawn counts are drawn images."""
    values = np.random.default_rng(1).choice([-1, -1 / 3, 0, 1 / 3, 2 / 3], size=400)
    found = bootstrap(values)
    theirs = scipy_bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=0).confidence_interval
    assert (found.low, found.high) == pytest.approx((100 * theirs.low, 100 * theirs.high), abs=0.4)
    assert bootstrap(values) == found, "the samples have a seed"
    assert bootstrap(np.zeros(5)).high == 0 and bootstrap(np.zeros(5)).low == 0


def test_classes_count_equally_in_a_group() -> None:
    labels, scores = np.array([0, 0, 0, 2]), np.array([1.0, 0.0, 0.0, 1.0])
    means = class_means(scores, labels, 3)
    assert means[[0, 2]] == pytest.approx([1 / 3, 1]) and np.isnan(means[1])
    assert np.mean(scores * class_weights(labels)) == pytest.approx((1 / 3 + 1) / 2)
    assert class_weights(np.array([3, 3, 1, 1])).tolist() == [1, 1, 1, 1]


def test_two_runs_are_compared_image_by_image(run: Make) -> None:
    paired = compare_with_first(rows_of(run("base", BASE), run("better", BETTER, lr=0.3)))
    assert len(paired) == 1 and paired[0].row == "better" and paired[0].differences is not None
    differences = {metric: interval.difference for metric, interval in paired[0].differences.items()}
    assert differences == pytest.approx({"accuracy": 20, "many_acc": -25, "med_acc": 50, "few_acc": 50})
    chances = np.array([1.0])
    for _ in range(10):  # the sum of ten images that are each lost, equal or won with chances 1/10, 6/10, 3/10
        chances = np.convolve(chances, [0.1, 0.6, 0.3])
    exact = [10 * (int(np.searchsorted(np.cumsum(chances), share)) - 10) for share in (0.025, 0.975)]
    interval = paired[0].differences["accuracy"]
    assert [interval.low, interval.high] == pytest.approx(exact) and exact == [-20, 60]
    assert paired[0].by_class is not None and paired[0].by_class.tolist() == [-25, 50, 50]
    assert paired[0].classes == (2, 1, 0)
    test = paired[0].mcnemar
    assert test is not None and (test.wins, test.losses) == (3, 1) and test.p == pytest.approx(2 * (1 + 4) / 2**4)


def test_seeds_are_averaged_for_each_image(run: Make) -> None:
    seeds = [run("base", BASE), run("base_seed_1", BETTER, seed=1)]
    paired = compare_with_first(rows_of(*seeds, run("other", BETTER, lr=0.3)))
    assert paired[0].differences is not None
    assert paired[0].differences["accuracy"].difference == pytest.approx(10), "80 against the mean of 60 and 80"
    assert paired[0].mcnemar is None, "McNemar's test compares two runs"


def test_classes_that_several_runs_answer_equally_well_are_equal(run: Make) -> None:
    """Means of ⅓ and ⅔ that are added up in another order differ by 1e-17."""
    wrong, right = BASE[:1] + [1] + BASE[2:], BASE
    rows = [run(f"a_seed_{seed}", right if seed else wrong, seed=seed) for seed in range(3)]
    others = [run(f"b_seed_{seed}", wrong if seed == 2 else right, seed=seed, lr=0.3) for seed in range(3)]
    paired = compare_with_first(rows_of(*rows, *others))
    assert paired[0].classes == (0, 0, 3)


def test_evaluations_of_different_runs_are_different_rows(run: Make) -> None:
    """`test_only True model_dir X` writes into the folder of another run, whose config says nothing about X."""
    home, *origins = run("home", BASE), run("a", BASE, lr=0.3), run("b", BASE, lr=0.4), run("b_1", BASE, lr=0.4, seed=1)
    evaluated = [home / "tests" / f"of_{origin.name}" for origin in origins]
    for folder, origin in zip(evaluated, origins, strict=True):
        folder.mkdir(parents=True)
        result = json.loads((origin / "metrics.json").read_text())
        result["evaluation"]["of"] = str(origin)
        (folder / "metrics.json").write_text(json.dumps(result))
    assert [len(row.results) for row in rows_of(*evaluated)] == [1, 2], "the runs b differ in their seed"
    for origin in origins:
        shutil.rmtree(origin)
    assert [len(row.results) for row in rows_of(*evaluated)] == [1, 1, 1], "nothing says how they were trained"


def test_seeds_of_runs_with_an_earlier_stage_are_one_row(run: Make) -> None:
    """The config of a run holds a hash of the config before it, in which the seed is another one, too."""

    def chain(name: str, **options: object) -> Path:
        first = run(f"{name}_stage1", BASE, lr=options.pop("first_lr", 0.1), seed=options["seed"])
        last = run(name, BASE, **{"after": "tiny_clip", **options})
        for folder, facts in ((first, {"sha256": name}), (last, {"after": str(first), "after_id": name})):
            (folder / "checkpoint").mkdir()
            (folder / "checkpoint" / FACTS).write_text(json.dumps(facts))
        return last

    chains = [chain("a", seed=0), chain("b", seed=1)]
    assert [len(row.results) for row in rows_of(*chains)] == [2]
    chains += [chain("c", seed=2, first_lr=0.2)]
    assert [len(row.results) for row in rows_of(*chains)] == [2, 1], "another first stage"
    Path("output/b_stage1/checkpoint", FACTS).write_text(json.dumps({"sha256": "trained again"}))
    assert [len(row.results) for row in rows_of(*chains)] == [1, 1, 1]


def test_a_seed_counts_once_in_a_row(run: Make) -> None:
    folders = [run("base", BASE), run("base_seed_1", BETTER, seed=1), run("again", BASE)]
    assert [(row.name, len(row.results)) for row in rows_of(*folders)] == [("base", 2), ("again", 1)]


def test_rows_of_one_name_get_their_paths(run: Make, launch: Cli) -> None:
    folders = [run("one/base", BASE), run("two/base", BETTER, lr=0.3)]
    assert [row.name for row in rows_of(*folders)] == ["output/one/base", "output/two/base"]
    done = launch("compare", *folders, "--format text")
    assert "2 output/two/base, classes with the largest differences" in done.stdout


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": "beef"}, "other test images (fingerprint beef, not f00d)"),
        ({"left_out": 1}, "9 and 10 of the test images were evaluated"),
        ({"images": ""}, "does not tell which images"),
    ],
)
def test_other_test_images_are_refused(run: Make, changes: dict[str, object], reason: str) -> None:
    rows = rows_of(run("base", BASE), run("other", BETTER, lr=0.3, **changes), run("third", BETTER, lr=0.4))
    refused, tested = compare_with_first(rows)
    assert refused.differences is None and reason in refused.reason
    assert tested.differences is not None, "other rows are tested nevertheless"


def test_damaged_and_missing_logits_are_a_reason(run: Make, launch: Cli) -> None:
    folders = [run("base", BASE), run("gone", BASE, lr=0.3), run("broken", BASE, lr=0.4)]
    (folders[1] / "logits.safetensors").unlink()
    (folders[2] / "logits.safetensors").write_bytes(b"no tensors")
    done = launch("compare", *folders)
    assert done.returncode == 0 and "gone is not tested: output/gone/logits.safetensors is missing" in done.stdout
    assert "broken is not tested: output/broken/logits.safetensors is damaged" in done.stdout


# --- the command -----------------------------------------------------------------------------------------------------


def test_both_commands_print_the_same(run: Make, launch: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(run("base", BASE)), str(run("better", BETTER, lr=0.3))]
    printed = launch("compare", *folders, "--metrics accuracy").stdout
    assert "| better | +20.0 [-20.0, +60.0] | -25.0" in printed and "| 3 | 1 | 0.625 | 2 / 1 / 0 |" in printed
    assert "better, classes with the largest differences: class 1 +50.0, class 2 +50.0, class 0 -25.0." in printed
    assert collect.main([*folders, "--metrics", "accuracy"]) == 0
    assert capsys.readouterr().out == printed
    assert "Δ" not in launch("compare", *folders, "--no-tests").stdout


def test_what_is_no_result_is_named_with_its_reason(run: Make, launch: Cli) -> None:
    folder, unfinished = run("base", BASE), run("stopped", BASE, lr=0.3)
    (unfinished / "metrics.json").unlink()
    Path("output/tables").mkdir()
    done = launch("compare", folder, unfinished, "output/tables")
    assert done.returncode == 0 and "| base |" in done.stdout
    assert done.stderr == "left out 2 of 3: output/stopped (not finished), output/tables (no run)\n"
    done = launch("compare", unfinished)
    assert done.returncode == 2 and done.stderr.startswith(
        "error: no metrics.json of a run in output/stopped (not finished)"
    )


def test_rows_are_sorted_and_the_best_are_kept(run: Make, launch: Cli) -> None:
    folders = [run("base", BASE), run("better", BETTER, lr=0.3), run("wrong", [1] * 10, lr=0.4)]
    rows = rows_of(*folders)
    assert [row.name for row in ranked(rows, "accuracy")] == ["better", "base", "wrong"]
    assert [row.name for row in ranked(rows, "ece")] == ["better", "base", "wrong"], "less is better"
    assert [row.name for row in ranked(rows, "few_acc")] == ["base", "better", "wrong"], "no run has measured it"
    text = launch("compare", *folders, "--format csv --best 2").stdout
    table = list(csv.DictReader(io.StringIO(text)))
    assert [row["row"] for row in table] == ["better", "base"]
    assert (table[1]["wins"], table[1]["losses"], table[1]["classes_won"]) == ("1", "3", "1")
    assert float(table[1]["accuracy_difference"]) == pytest.approx(-20)


def test_a_file_has_the_format_of_its_ending(run: Make, launch: Cli) -> None:
    folders = [run("base", BASE), run("a_<b>", BETTER, lr=0.3)]
    done = launch("compare", *folders, "-o table.tex")
    assert (done.returncode, done.stdout) == (0, "") and r"$\Delta$ all" in Path("table.tex").read_text("utf-8")
    assert launch("compare", *folders, "-o page.html").returncode == 0
    page = Path("page.html").read_text("utf-8")
    assert "a_&lt;b&gt;" in page and "a_<b>" not in page
    assert 'class="best">80.0</td>' in page and "+20.0 [-20.0, +60.0]" in page
    assert page.count("<svg") == 1 and "train/loss.avg" in page and "test/accuracy" not in page
    assert not re.search(r"<script|<link|src=|url\(http|@import", page), "one file, without a request"


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ("output/none", "output/none is no folder"),
        ("output/base --sort speed", "unknown metric 'speed'"),
        ("output/base --best 0", "--best 0"),
        ("output/base -o table.doc", "table.doc"),
        ("", "RUN"),
    ],
)
def test_wrong_words_are_one_line(run: Make, launch: Cli, words: str, culprit: str) -> None:
    run("base", BASE)
    done = launch("compare", *words.split())
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and culprit in done.stderr


# --- what a reader would misunderstand -------------------------------------------------------------------------------


def with_result(folder: Path, **changes: object) -> Path:
    """The folder, after its result has got these entries; `evaluation` and `test` are added to."""
    result = json.loads((folder / "metrics.json").read_text())
    for key, value in changes.items():
        result[key] = {**result[key], **value} if isinstance(value, dict) and key in result else value
    (folder / "metrics.json").write_text(json.dumps(result))
    return folder


def test_nll_has_digits_that_tell_runs_apart(run: Make) -> None:
    folders = [with_result(run(f"a_seed_{seed}", BASE, seed=seed), test={"nll": 0.31 + seed / 100}) for seed in (0, 1)]
    (row,) = rows_of(*folders)
    assert row.ours("nll") == "0.315 ± 0.007" and row.ours("accuracy") == "60.0 ± 0.0"


def test_a_mean_of_fewer_runs_says_so(run: Make) -> None:
    folders = [run(f"a_seed_{seed}", BASE, seed=seed) for seed in range(3)]
    with_result(folders[1], test={"many_acc": None})
    assert rows_of(*folders)[0].ours("many_acc") == "1.0 ± 0.0 (2 of 3)"


def test_the_best_is_chosen_among_rows_of_the_same_images() -> None:
    def row(data: str, accuracy: float, **about: object) -> Row:
        return Row(data, "row", 1, [{"test": {"accuracy": accuracy, "ece": accuracy}, "evaluation": about}])

    rows = [row("cifar10", 90), row("cifar100", 50), row("cifar10", 92), row("cifar100", 40)]
    assert best(rows, "accuracy") == [1, 2] and best(rows, "ece") == [0, 3], "one of each data set; less ECE is better"
    trained_on = row("cifar10", 99, test_train=True)
    assert best([*rows[::2], trained_on, row("cifar10", 99, max_test_images=9)], "accuracy") == [1]
    assert best([rows[0], trained_on], "accuracy") == []


def test_a_note_names_its_rows(run: Make, launch: Cli) -> None:
    folders = [run("base", BASE), with_result(run("other", BETTER, lr=0.3), notes=["some images"])]
    with_result(folders[1], evaluation={"test_train": True}, stopped_early=True, prec_used="bf16")
    text = launch("compare", *folders, "--no-tests").stdout
    assert (
        "some images (1 of 2 runs: other)" in text and "the training images (test_train) (1 of 2 runs: other)" in text
    )
    assert "(max_steps or patience)" in text and "precision None, bf16" in text
    table = list(csv.DictReader(io.StringIO(launch("compare", *folders, "--format csv").stdout)))
    assert [("some images" in row["notes"], row["precision"]) for row in table] == [(False, "None"), (True, "bf16")]


def test_rows_with_other_groups_or_other_images_are_named(run: Make, launch: Cli) -> None:
    folders = [run("base", BASE), run("same", BASE, lr=0.2), run("other", BETTER, lr=0.3), run("moved", BASE, lr=0.4)]
    with_result(folders[2], class_counts=[30, 3, 2])
    with_result(folders[3], evaluation={"images": {"test": "beef"}})
    text = launch("compare", *folders, "--no-tests").stdout
    assert "- many, medium and few are not the classes that they are in base: other\n" in text
    assert "- other test images than those of base: moved\n" in text


def test_sorting_by_what_no_run_has_measured_is_refused(run: Make, launch: Cli) -> None:
    entry = {"n": 3, "predictors": {"plain": {"accuracy": 1.0}}}
    folders = [
        run("base", BASE),
        with_result(run("other", BETTER, lr=0.3), schema=2, distributions={"backward50": entry}),
    ]
    done = launch("compare", *folders, "--sort backwrd50.accuracy --best 1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "--sort backwrd50.accuracy" in done.stderr and "backward50" in done.stderr
    assert launch("compare", *folders, "--sort backward50.accuracy").returncode == 0


def test_names_of_classes_come_from_any_run(run: Make, launch: Cli) -> None:
    """The first row may be zero-shot CLIP, which has stored no names."""
    folders = [run("base", BASE), run("other", BETTER, lr=0.3)]
    (folders[1] / "checkpoint").mkdir()
    (folders[1] / "checkpoint" / FACTS).write_text(json.dumps({"class_names": ["ape", "bee", "cat"]}))
    assert "largest differences: bee +50.0, cat +50.0, ape -25.0." in launch("compare", *folders).stdout


def test_latex_of_a_name_is_text_of_any_engine() -> None:
    rows = [Row("fake_lt", "α = 0.1 > β_|λ| × C:\\x~", 1, []), Row("fake_lt", "two\nlines é", 1, [])]
    table = as_latex(Table(rows, ["accuracy"]))
    assert (
        r"$\alpha$ = 0.1 $>$ $\beta$\_\textbar{}$\lambda$\textbar{} $\times$ C:\textbackslash{}x\textasciitilde{}"
        in table
    )
    assert "two lines é &" in table


def test_names_with_dollars_are_no_formulas_in_the_curves(run: Make, launch: Cli) -> None:
    folders = [run("cost_$\\foo$", BASE), run("other", BETTER, lr=0.3)]
    done = launch("compare", *folders, "-o page.html")
    assert (done.returncode, done.stderr) == (0, "") and "$\\foo$" in Path("page.html").read_text("utf-8")


def test_more_rows_than_colours_differ_in_their_lines(run: Make) -> None:
    picture = overlaid(rows_of(*(run(f"run{number}", BASE, lr=0.1 + number / 100) for number in range(11))))
    assert "stroke-dasharray" in picture
    assert "stroke-dasharray" not in overlaid(rows_of(Path("output/run0"), Path("output/run1")))
