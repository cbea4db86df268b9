"""Metrics: LIFT's fixture (§13.5), a brute-force formulation, and the cases where sums and logs go wrong."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tailtune.trainers.evaluation import metrics
from tailtune.trainers.evaluation import rows as row_module
from tailtune.trainers.evaluation.metrics import calibration, calibration_error, evaluate, evaluate_predictions

GROUPS = {"many": torch.tensor([0, 1]), "med": torch.tensor([2, 3]), "few": torch.tensor([4])}


def fixture() -> tuple[Tensor, Tensor]:
    """Labels and predictions of 100 samples: y = i mod 5; right where 7i mod 10 < 6, else 3i mod 5."""
    i = torch.arange(100)
    return i % 5, torch.where(7 * i % 10 < 6, i % 5, 3 * i % 5)


def test_values_are_those_of_the_original() -> None:
    labels, predictions = fixture()
    found = evaluate(F.one_hot(predictions, 5).float(), labels, GROUPS)
    wanted = {"accuracy": 60, "error_rate": 40, "macro_f1": 60, "mean_acc": 60, "worst_case_acc": 50}
    wanted |= {"hmean_acc": 55.555556, "gmean_acc": 57.434918, "many_acc": 75, "med_acc": 50, "few_acc": 50}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, abs=1e-4), name


def test_calibration_error_is_that_of_the_original() -> None:
    """24.27 %. One confidence is exactly 0.5, which LIFT puts into (0.4, 0.5]; bins [a, b) would give 24.08 %."""
    labels, predictions = fixture()
    i = torch.arange(100, dtype=torch.float64)
    confidence = 0.05 + 0.9 * (13 * i % 100) / 100
    assert calibration_error(confidence, predictions == labels) == pytest.approx(0.2427, abs=1e-6)


def test_calibration_error_of_certain_predictions() -> None:
    """A confidence of 1 lies in the last bin, one of 0 in the first."""
    confidence = torch.tensor([1.0, 1.0, 0.95, 0.95, 0.0])
    correct = torch.tensor([True, True, True, False, False])
    assert calibration_error(confidence, correct) == pytest.approx(abs(3 - 3.9) / 5)
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0.0


def test_the_reliability_diagram_is_that_of_the_original() -> None:
    """H2T specification H6: 15 bins (a, b]."""
    i = torch.arange(200)
    found = calibration((37 * i % 100 + 0.5).double() / 100, i % 3 != 0)
    assert found["bins"] == 15 and found["counts"] == [14, 12, 14] * 5
    assert found["ece"] == pytest.approx(30.1) and found["mce"] == pytest.approx(67.92857)
    assert sum(n * a for n, a in zip(found["counts"], found["accuracy"], strict=True)) == pytest.approx(100 * 133)
    assert found["confidence"] == sorted(found["confidence"])
    certain = calibration(torch.ones(4), torch.tensor([True, True, True, False]))
    assert certain["ece"] == certain["mce"] == 25 and certain["accuracy"] == [None] * 14 + [75]


def brute_force(logits: Tensor, labels: Tensor, groups: dict[str, Tensor]) -> dict[str, float | None]:
    """Sample by sample and class by class, in plain Python."""
    rows, truth = logits.double().tolist(), labels.tolist()
    guess = [row.index(max(row)) for row in rows]
    present = sorted(set(truth))
    recall, f1 = {}, []
    for c in present:
        hits = sum(g == c == y for g, y in zip(guess, truth, strict=True))
        recall[c] = 100 * hits / truth.count(c)
        f1.append(200 * hits / (truth.count(c) + guess.count(c)))
    values = list(recall.values())
    accuracy = 100 * sum(g == y for g, y in zip(guess, truth, strict=True)) / len(truth)
    softmax = [[math.exp(z - max(row)) / sum(math.exp(v - max(row)) for v in row) for z in row] for row in rows]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for p, g, y in zip(softmax, guess, truth, strict=True):
        bins.setdefault(max(0, math.ceil(10 * p[g]) - 1), []).append((p[g], g == y))
    gaps = [abs(sum(right - p for p, right in each)) for each in bins.values()]

    def group(name: str) -> float | None:
        inside = [recall[c] for c in groups[name].tolist() if c in recall]
        return sum(inside) / len(inside) if inside else None

    return {
        "accuracy": accuracy,
        "error_rate": 100 - accuracy,
        "macro_f1": sum(f1) / len(f1),
        "mean_acc": sum(values) / len(values),
        "many_acc": group("many"),
        "med_acc": group("med"),
        "few_acc": group("few"),
        "worst_case_acc": min(values),
        "hmean_acc": 100 / (sum(1 / (max(a, 1e-3) / 100) for a in values) / len(values)),
        "gmean_acc": 100 * math.prod(a / 100 for a in values) ** (1 / len(values)),
        "ece": 100 * sum(gaps) / len(rows),
        "nll": -sum(math.log(p[y]) for p, y in zip(softmax, truth, strict=True)) / len(rows),
    }


@pytest.mark.parametrize("seed", range(3))
def test_random_logits_with_absent_classes(seed: int) -> None:
    """Classes 3 and 6 are not in the test set; class 6 is a group of its own. Predictions may still name them."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.tensor([0, 1, 2, 4, 5])[torch.randint(5, (200,), generator=draw)]
    logits = torch.randn(200, 7, generator=draw) + 2 * F.one_hot(labels, 7)
    groups = {"many": torch.tensor([0, 1, 3]), "med": torch.tensor([2, 4, 5]), "few": torch.tensor([6])}
    found, wanted = evaluate(logits, labels, groups), brute_force(logits, labels, groups)
    assert found.keys() == {*wanted, "per_class_acc", "calibration"}
    assert wanted["few_acc"] is None
    for name, value in wanted.items():
        assert found[name] == (None if value is None else pytest.approx(value, rel=1e-5)), name
    assert [index for index, each in enumerate(found["per_class_acc"]) if each is None] == [3, 6]


def test_an_empty_group_has_no_accuracy() -> None:
    labels, predictions = fixture()
    none = torch.tensor([], dtype=torch.int64)
    found = evaluate(F.one_hot(predictions, 5).float(), labels, {**GROUPS, "few": none})
    assert found["few_acc"] is None and found["many_acc"] == pytest.approx(75)


def test_geometric_mean_of_many_classes_does_not_underflow() -> None:
    """0.5^2000 is no float64 (nor is it with iNaturalist's 8142 classes); its 2000th root is one half."""
    count = 2000
    labels = torch.arange(count).repeat_interleave(2)
    predictions = (labels + torch.arange(2 * count) % 2) % count  # the second one of each class is wrong
    found = evaluate_lean(F.one_hot(predictions, count).float(), labels)
    assert 0.5**count == 0.0
    assert found["gmean_acc"] == pytest.approx(50.0) == found["hmean_acc"] == found["worst_case_acc"]


def evaluate_lean(logits: Tensor, labels: Tensor) -> dict[str, object]:
    nothing = torch.tensor([], dtype=torch.int64)
    return evaluate(logits, labels, dict.fromkeys(("many", "med", "few"), nothing))


def test_a_class_without_a_hit() -> None:
    """The geometric mean is zero; the harmonic mean counts the class as 0.001 %, as LIFT."""
    logits = torch.eye(2)[torch.tensor([0, 0, 0, 0])]
    found = evaluate_lean(logits, torch.tensor([0, 0, 1, 1]))
    assert found["gmean_acc"] == found["worst_case_acc"] == 0.0
    assert found["hmean_acc"] == pytest.approx(2 / (1 / 100 + 1 / 1e-3), rel=1e-6)


def test_all_right_and_all_wrong() -> None:
    labels = torch.arange(5).repeat(3)
    right, wrong = (evaluate(50 * F.one_hot(each, 5).float(), labels, GROUPS) for each in (labels, (labels + 1) % 5))
    for name in ("accuracy", "macro_f1", "mean_acc", "many_acc", "few_acc", "worst_case_acc", "hmean_acc", "gmean_acc"):
        assert right[name] == pytest.approx(100), name
        assert wrong[name] == pytest.approx(0, abs=1e-2), name
    assert right["ece"] == pytest.approx(0, abs=1e-4) and wrong["ece"] == pytest.approx(100)
    assert wrong["error_rate"] == 100 and all(math.isfinite(wrong[name]) for name in ("nll", "ece", "macro_f1"))


@pytest.mark.parametrize("at_once", [1, 5, 40, 10**6])
def test_logits_are_read_a_few_rows_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of rows changes no bit, and the metrics of some images are those of their logits alone."""
    logits, labels = 3 * torch.randn(30, 3, 5), torch.arange(30) % 5
    whole = evaluate(logits.nanmean(1), labels, GROUPS)
    monkeypatch.setattr(row_module, "CHUNK_ELEMENTS", at_once)
    widest = []

    def combine(chunk: Tensor) -> Tensor:
        widest.append(chunk.numel())
        return chunk.nanmean(1)

    found = metrics.predictions_of(logits, labels, combine)
    assert max(widest) <= max(at_once, 15) and len(found.classes) == 30
    assert evaluate_predictions(found, GROUPS) == whole
    rows = torch.tensor([4, 0, 7, 7])
    assert evaluate_predictions(found.at(rows), GROUPS) == evaluate(logits[rows].nanmean(1), labels[rows], GROUPS)
