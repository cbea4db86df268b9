"""The tables of a report, as plain lists for the page."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tailtune.datasets.long_tail import SHOT_GROUPS
from tailtune.trainers.report.subject import Subject
from tailtune.trainers.report.thumbnails import thumbnail
from tailtune.trainers.runs.result_table import COLUMNS, number

SHORT = {group: COLUMNS[metric] for metric, group in SHOT_GROUPS.items()}
MOST_PAIRS, PICTURES_OF_A_PAIR, MOST_MISTAKES = 12, 4, 24

MEANINGS = {
    "accuracy": "Correct images, of all images.",
    "mean_acc": "Mean of the accuracies of the classes. Each class counts the same, however many test images it has.",
    "many_acc": "Mean accuracy of the many-shot classes: more than {many_above} training images{counted}.",
    "med_acc": "Mean accuracy of the medium-shot classes: {few_below} to {many_above} training images{counted}.",
    "few_acc": "Mean accuracy of the few-shot classes: fewer than {few_below} training images{counted}.",
    "worst_case_acc": "Accuracy of the worst class.",
    "hmean_acc": "Harmonic mean of the class accuracies. Bad classes pull it down strongly.",
    "gmean_acc": "Geometric mean of the class accuracies. It is 0 if one class is never recognised.",
    "macro_f1": "Mean over the classes of F1, which combines accuracy and precision of a class.",
    "error_rate": "Wrong images, of all images.",
    "ece": "Expected calibration error, 10 bins: how far confidence and accuracy are apart.",
    "nll": "Mean negative log-likelihood of the true class, in nats. Lower is better.",
    "bad_images": "Images that could not be read, and are in no number.",
}
"""Metric → its explanation. The metrics that are not counts and not `nll` are in percent."""
HEADINGS = {**COLUMNS, "hmean_acc": "harmonic mean", "gmean_acc": "geometric mean", "error_rate": "error"}
HEADINGS |= {"nll": "NLL", "bad_images": "unreadable"}


def metric_rows(result: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[str], str]]]:
    """The result table.

    Returns:
        Titles of the splits; and for each metric its heading, its value for each split, and its explanation.
    """
    about = result["evaluation"]
    titles = {"train" if about.get("test_train") else "test": "test"} | ({"val": "val"} if "val" in result else {})
    limits = {key: about.get(key, "the limit of") for key in ("many_above", "few_below")} | {
        "counted": _counted(result)
    }
    rows = []
    for name, meaning in MEANINGS.items():
        values = [result[split].get(name) for split in titles.values()]
        texts = [str(value) if isinstance(value, int) else number(value, 4 if name == "nll" else 2) for value in values]
        rows.append((HEADINGS[name], texts, meaning.format(**limits)))
    return list(titles), rows


def _counted(result: Mapping[str, Any]) -> str:
    """What the training images are that make the groups, if they are not those of the training."""
    factor = result["evaluation"].get("group_imb_factor")
    if factor is not None:
        return f" that group_imb_factor {factor:g} would leave"
    return f" before subset_cap {result['subset_cap']}" if "subset_cap" in result else ""


def class_rows(subject: Subject) -> list[list[Any]]:
    """One row for each class: name, group, training images, test images, accuracy and precision in %.

    The accuracy is None without test images, the precision if the class was never predicted.
    """
    count = len(subject.class_names)
    found = subject.predicted
    hits = np.bincount(found.labels[found.classes == found.labels], minlength=count)
    predicted, tested = np.bincount(found.classes, minlength=count), np.bincount(found.labels, minlength=count)
    accuracies, counts = subject.result["test"]["per_class_acc"], subject.result["class_counts"]
    return [
        [
            subject.names[label],
            SHORT.get(subject.group_of[label], ""),
            counts[label],
            int(tested[label]),
            None if accuracies[label] is None else round(accuracies[label], 2),
            round(100 * float(hits[label]) / int(predicted[label]), 2) if predicted[label] else None,
        ]
        for label in range(count)
    ]


def confused_pairs(subject: Subject) -> list[dict[str, Any]]:
    """The pairs of true and predicted class with the most mistakes, with pictures of the most confident ones."""
    labels, guesses, sizes = subject.confusions
    wrong = np.flatnonzero(labels != guesses)
    share = sizes / np.bincount(subject.predicted.labels, minlength=len(subject.class_names))[labels]
    chosen = wrong[np.lexsort((-share[wrong], -sizes[wrong]))][:MOST_PAIRS]
    found, rows = subject.predicted, []
    for pair in chosen:
        images = np.flatnonzero((found.labels == labels[pair]) & (found.classes == guesses[pair]))
        images = images[np.argsort(-found.confidence[images], kind="stable")][:PICTURES_OF_A_PAIR]
        rows.append(
            {
                "true": subject.names[labels[pair]],
                "predicted": subject.names[guesses[pair]],
                "images": int(sizes[pair]),
                "share": number(100 * float(share[pair]), 1),
                "pictures": [_picture(subject, int(row)) for row in images],
            }
        )
    return rows


def confident_mistakes(subject: Subject) -> list[dict[str, Any]]:
    """The wrong predictions with the highest probability, with their pictures."""
    found = subject.predicted
    wrong = np.flatnonzero(found.labels != found.classes)
    chosen = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:MOST_MISTAKES]
    return [_picture(subject, int(row)) for row in chosen]


def _picture(subject: Subject, row: int) -> dict[str, Any]:
    found = subject.predicted
    position = int(found.index[row])
    return {
        "path": subject.images.path(position),
        "true": subject.names[found.labels[row]],
        "predicted": subject.names[found.classes[row]],
        "probability": number(100 * float(found.confidence[row]), 1),
        "data": thumbnail(subject.images, position),
    }


def distribution_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row for each test distribution and predictor, as texts.

    The columns: distribution, images, predictor, accuracy, its gain over the plain prediction, the accuracies of the
    groups, the expected accuracy, KL of the target prior, and the weights of the experts.
    """
    rows = []
    for name, entry in result.get("distributions", {}).items():
        for predictor, values in entry["predictors"].items():
            kind = f" ({values['kind']})" if "kind" in values else ""
            rows.append(
                [
                    name,
                    f"{entry['n']:,}",
                    predictor + kind,
                    number(values["accuracy"]),
                    f"{values['gain']:+.2f}" if "gain" in values else "",
                    *(number(values[group]) for group in SHOT_GROUPS),
                    number(entry["expected_accuracy"]) if predictor == "plain" else "",
                    number(values["kl"], 4) if "kl" in values else "",
                    " ".join(f"{weight:.2f}" for weight in values.get("weights", [])),
                ]
            )
    return rows


def dirichlet_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row for each Dirichlet component and predictor: mean ± deviation of all, many, medium and few."""
    return [
        [component, str(part["draws"]), name]
        + [f"{number(values[key]['mean'])} ± {number(values[key]['std'])}" for key in ("accuracy", *SHOT_GROUPS)]
        for component, part in result.get("dirichlet", {}).items()
        for name, values in part["predictors"].items()
    ]


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How the result was computed: name → value, both as texts."""
    train, about = result.get("train") or {}, result["evaluation"]
    rows = [
        ("commit", result.get("commit")),
        ("hardware", result.get("hardware")),
        ("precision of the training", result.get("prec_used")),
        ("parameters", ", ".join(f"{name} {value:,}" for name, value in result.get("params", {}).items())),
        (
            "training",
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in train.items() if value is not None),
        ),
        ("checkpoint", about.get("checkpoint")),
        ("run", about.get("of")),
        *((f"images of {split}", value) for split, value in (about.get("images") or {}).items()),
        *((f"file {name}", value) for name, value in (about.get("files") or {}).items()),
        ("packages", ", ".join(f"{name} {value}" for name, value in (result.get("packages") or {}).items())),
    ]
    return [(name, str(value)) for name, value in rows if value]
