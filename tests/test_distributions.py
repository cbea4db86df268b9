"""Test sets of any class frequencies from the logits of one pass: metrics, the closed form, what is left out."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Cli
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tailtune.datasets.build_data import build_data
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.datasets.test_distributions.build import build_distributions
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.trainers.evaluation.distributions import dirichlet_summary, expected_accuracy, plain_results
from tailtune.trainers.evaluation.inference import Logits, infer
from tailtune.trainers.evaluation.metrics import evaluate
from tailtune.trainers.methods.base import combine
from tailtune.trainers.runs.result_table import distribution_lines, read_result, table, upgraded

GROUPS = {"many": torch.tensor([0]), "med": torch.tensor([1]), "few": torch.tensor([2])}
RUN = "-d fake_lt -m tiny_clip pretrained none max_steps 2 batch_size 16 num_workers 0 output_dir run"
ALL = [f"forward{r}" for r in (50, 25, 10, 5, 2)] + ["uniform"] + [f"backward{r}" for r in (2, 5, 10, 25, 50)]


def found(n: int = 30, experts: int = 2) -> Logits:
    draws = torch.Generator().manual_seed(0)
    return Logits(torch.randn(n, experts, 3, generator=draws), torch.arange(n) % 3, torch.arange(n))


def shift(name: str, positions: list[int], labels: torch.Tensor) -> TestDistribution:
    chosen = torch.tensor(positions, dtype=torch.int64)
    return TestDistribution(name, torch.bincount(labels[chosen], minlength=3), chosen, "drawn")


def metrics(folder: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path("output") / folder / "metrics.json").read_text())
    return result


def test_a_subset_is_measured_by_its_logits() -> None:
    logits = found()
    chosen = [29, 3, 0, 9, 1]
    result = plain_results(logits, [shift("some", chosen, logits.labels)], GROUPS)["some"]
    assert result["n"] == 5 and result["origin"] == "drawn"
    assert result["predictors"]["plain"] == evaluate(logits.logits[chosen].mean(1), logits.labels[chosen], GROUPS)


def test_an_empty_group_is_null() -> None:
    logits = found()
    plain = plain_results(logits, [shift("some", [0, 3, 1], logits.labels)], GROUPS)["some"]["predictors"]["plain"]
    assert plain["few_acc"] is None and plain["per_class_acc"][2] is None and plain["many_acc"] is not None


def test_the_closed_form_is_the_mean_over_draws() -> None:
    logits = found(n=300)
    counts = torch.tensor([80, 20, 3])
    draws = torch.Generator().manual_seed(3)
    accuracies = []
    for _ in range(400):
        members = [torch.arange(k, 300, 3) for k in range(3)]
        parts = [each[torch.randperm(100, generator=draws)[:n]] for each, n in zip(members, counts, strict=True)]
        rows = torch.cat(parts)
        accuracies.append(100 * float((combine(logits.logits)[rows].argmax(1) == logits.labels[rows]).double().mean()))
    classes = evaluate(combine(logits.logits), logits.labels, GROUPS)["per_class_acc"]
    expected = expected_accuracy(classes, counts.tolist())
    assert expected == pytest.approx(sum(n * a for n, a in zip(counts.tolist(), classes, strict=True)) / 103)
    assert expected == pytest.approx(sum(accuracies) / 400, abs=0.5)


def test_the_closed_form_needs_the_classes_that_it_counts() -> None:
    assert expected_accuracy([50.0, None, 100.0], [1, 0, 1]) == 75
    assert expected_accuracy([50.0, None, 100.0], [1, 1, 1]) is None
    assert expected_accuracy([None], [0]) is None


def test_images_that_could_not_be_read_and_empty_sets_are_left_out() -> None:
    logits, kept = found(), torch.tensor([each for each in range(30) if each not in (4, 10, 11)])
    some = Logits(logits.logits[kept], logits.labels[kept], kept, 3)
    shifts = [shift("some", [4, 5, 11, 29], logits.labels), shift("none", [], logits.labels)]
    results = plain_results(some, shifts, GROUPS)
    assert results.keys() == {"some"} and results["some"]["n"] == 2
    wanted = evaluate(combine(logits.logits[[5, 29]]), logits.labels[[5, 29]], GROUPS)
    assert results["some"]["predictors"]["plain"] == wanted


def test_the_table_has_a_line_for_each() -> None:
    logits = found()
    results = plain_results(logits, [shift("some", [0, 3, 1], logits.labels)], GROUPS)
    assert distribution_lines({}) == []
    plain = distribution_lines(results)
    assert plain[3].startswith("some") and plain[3].count("n/a") == 1
    predictors = results["some"]["predictors"]
    predictors["other"] = {**predictors["plain"], "gain": 1.25, "weights": [0.251, 0.749], "path": []}
    adapted = distribution_lines(results)
    assert adapted[1].split()[-4:] == ["other", "gain", "w1", "w2"]
    assert adapted[3].startswith(plain[3]) and adapted[3].endswith("  1.25  0.25  0.75")


STORED = Path(__file__).parent / "stored" / "metrics_schema1.json"
"""A result of the version before schema 2: `test_dists uniform,dirichlet adapt sade target_prior estimate`."""


def test_a_result_of_schema_1_is_read_as_one_of_schema_2() -> None:
    old, new = json.loads(STORED.read_text()), read_result(STORED)
    assert old["schema"] == 1 and new["schema"] == 2 and upgraded(new) == new
    assert new["distributions"].keys() == old["distributions"].keys() > {"uniform", "dirichlet-forward1"}
    names = {"plain", "sade", "target_prior"}
    for key, facts in (("distributions", {"n", "origin", "expected_accuracy"}), ("dirichlet", {"draws"})):
        for name, entry in new[key].items():
            assert entry.keys() == facts | {"predictors"} and entry["predictors"].keys() == names
            assert {**entry, **entry["predictors"]} == {**old[key][name], "predictors": entry["predictors"]}
    others = new.keys() - {"schema", "distributions", "dirichlet"}
    assert all(new[key] == old[key] for key in others)
    shown = table(new)
    assert "dirichlet-forward1" in shown and "for estimate" in shown and "mean ± std" in shown
    assert dirichlet_summary(new["distributions"]).keys() == old["dirichlet"].keys()


# --- runs ----------------------------------------------------------------------------------------------------------


def test_a_run_evaluates_all_distributions_in_one_pass(launch: Cli) -> None:
    with mock.patch("tailtune.trainers.evaluation.evaluate.infer", wraps=infer) as passes:
        done = launch(RUN, "test_dists all")
    assert done.returncode == 0, done.stderr
    assert passes.call_count == 1
    result = metrics("run")
    assert list(result["distributions"]) == ALL
    for name, each in result["distributions"].items():
        assert each.keys() == {"n", "origin", "predictors", "expected_accuracy"} and name in done.stdout
        assert each["predictors"].keys() == {"plain"}
        assert each["predictors"]["plain"].keys() == result["test"].keys() - {"bad_images", "experts"}
    uniform = result["distributions"]["uniform"]
    assert uniform["predictors"]["plain"]["accuracy"] == result["test"]["accuracy"] == uniform["expected_accuracy"]
    events = EventAccumulator("output/run/tensorboard").Reload().Tags()["scalars"]
    assert {"test/accuracy", "test/backward50/accuracy", "test/uniform/expected_accuracy"} <= set(events)


def test_a_finished_run_answers_from_its_logits(launch: Cli, config: Any) -> None:
    """Without images; as it would have answered in its own evaluation; other names, another evaluation."""
    assert launch(RUN).returncode == 0
    assert "distributions" not in metrics("run")
    with mock.patch("tailtune.trainers.run.build_data", side_effect=AssertionError("images are not needed")):
        done = launch(RUN, "test_only True test_dists forward10,backward10")
    assert done.returncode == 0, done.stderr
    result = metrics("run/tests/test_dists_forward10-backward10")
    words = RUN.split()[4:] + ["test_dists", "forward10,backward10"]
    cfg = config("fake_lt", "tiny_clip", *words)
    data = build_data(cfg)
    for each in build_distributions(DistributionSettings.of(cfg), data.info, data.test.labels):
        entry = result["distributions"][each.name]
        assert entry["n"] == len(each.positions) == int(each.counts.sum()) and entry["origin"] == each.origin
        classes = [(n, a) for n, a in zip(each.counts.tolist(), result["test"]["per_class_acc"], strict=True)]
        assert entry["expected_accuracy"] == pytest.approx(sum(n * a for n, a in classes) / int(each.counts.sum()))


def test_training_images_have_no_distributions(launch: Cli) -> None:
    assert launch(RUN, "test_train True test_dists all").returncode == 0
    result = metrics("run")
    assert "distributions" not in result and any("test_dists" in note for note in result["notes"])


def test_bad_images_do_not_move_the_others(launch: Cli, tmp_path: Path) -> None:
    """One unreadable test image, in the run's own evaluation and in a later one from its logits."""
    for split, count in (("train", 6), ("test", 5)):
        for label in range(3):
            for number in range(count):
                path = tmp_path / split / f"c{label}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (32, 32), (80 * label, 20 * number, 90)).save(path)
    (tmp_path / "test/c0/0.png").write_bytes(b"no image")
    (tmp_path / "mine.yaml").write_text("dataset: ImageFolder\nroot: .\non_bad_image: skip\n")
    words = RUN.replace("fake_lt", "mine.yaml")
    assert launch(words, "test_dists uniform").returncode == 0
    first = metrics("run")
    assert first["test"]["bad_images"] == 1 and first["distributions"]["uniform"]["n"] == 14
    plain = first["distributions"]["uniform"]["predictors"]["plain"]
    assert plain == {name: first["test"][name] for name in plain}
    assert launch(words, "test_only True test_dists uniform many_above 4").returncode == 0
    (again,) = Path("output/run/tests").iterdir()
    assert metrics(f"run/tests/{again.name}")["distributions"]["uniform"]["n"] == 14
