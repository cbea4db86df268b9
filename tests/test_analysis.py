"""The feature-space analysis: its numbers on a small example, its files from a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Cli
from torch import Tensor, nn
from torch.utils.data import default_collate

from tailtune.datasets.build_data import build_data
from tailtune.models import build_model
from tailtune.scripts import analyze_features
from tailtune.trainers.evaluation.feature_analysis import SplitFeatures, heat_map, histograms, split_features, summary

COUNTS = torch.tensor([2, 1, 4])
GROUPS = {"many": torch.tensor([2]), "med": torch.tensor([], dtype=torch.int64), "few": torch.tensor([0, 1])}
RAW = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-2.0, 0.0], [-1.0, 0.0]])
LABELS = torch.tensor([0, 0, 2, 2])


class View(list[dict[str, Any]]):
    is_batched = decodes = True

    def __getitems__(self, keys: list[tuple[int, int]]) -> dict[str, Any]:
        """By (index, epoch), as loaders ask."""
        return default_collate([self[index] for index, _ in keys])

    def finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch


class Encoder(nn.Module):
    """A method whose features are the first two pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.model = self

    def features(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2].float()


@pytest.fixture
def split() -> SplitFeatures:
    view = View(
        {"image": row.view(1, 1, 2), "label": int(label), "index": k, "weight": 1.0}
        for k, (row, label) in enumerate(zip(RAW, LABELS, strict=True))
    )
    view.append({"image": torch.full((1, 1, 2), 9.0), "label": 0, "index": 4, "weight": 0.0})  # unreadable
    return split_features(Encoder(), view, 3, torch.device("cpu"), 2, 0)  # type: ignore[arg-type]


def test_distances_are_to_the_mean_of_the_raw_features(split: SplitFeatures) -> None:
    half = 1 - 0.5**0.5
    assert torch.equal(split.labels, LABELS)
    assert torch.allclose(split.distances, torch.tensor([half, half, 0.0, 0.0]), atol=1e-6)
    assert torch.allclose(split.means[[0, 2]], torch.tensor([[0.5**0.5, 0.5**0.5], [-1.0, 0.0]]))
    assert split.means[1].isnan().all(), "no image"


def test_the_summary_leaves_out_what_is_not_there(split: SplitFeatures) -> None:
    means = summary({"test": split}, GROUPS)["test"]
    assert means["mean_cosine_between_classes"] == pytest.approx(-(0.5**0.5))
    assert means["many"] == {"images": 2, "mean_distance": pytest.approx(0, abs=1e-6)}
    assert means["med"] == {"images": 0, "mean_distance": None}
    assert means["few"] == {"images": 2, "mean_distance": pytest.approx(1 - 0.5**0.5)}


def test_what_the_pictures_show(split: SplitFeatures) -> None:
    splits = {"train": split, "test": split}
    panels = heat_map(splits, COUNTS, ("a", "b", "c"), "title").axes
    assert [panel.get_title() for panel in panels[:2]] == ["train images", "test images"]
    assert [text.get_text() for text in panels[0].get_xticklabels()] == ["c (4)", "a (2)", "b (1)"]
    image = panels[0].get_images()[0]
    assert image.get_clim() == (-1, 1) and image.get_array()[0, 1] == pytest.approx(-(0.5**0.5))
    panels = histograms(splits, GROUPS, "title").axes
    assert [panel.get_title() for panel in panels] == ["head: many-shot (1 classes)", "tail: few-shot (2 classes)"]
    texts = [text.get_text() for text in panels[1].get_legend().get_texts()]
    assert texts == ["train: mean 0.293, 2 images", "test: mean 0.293, 2 images"]


def test_the_command_on_a_run(launch: Cli, capsys: pytest.CaptureFixture[str], config: Any) -> None:
    words = ["-d", "fake_lt", "-m", "tiny_clip", "num_epochs", "0", "num_workers", "0", "tte", "True"]
    assert analyze_features.main(words) == 2 and "nothing is trained" in capsys.readouterr().err
    assert launch(*words).returncode == 0
    assert analyze_features.main(words) == 0
    folder = Path("output/fake_lt_tiny_clip_num_epochs_0/analysis")
    assert sorted(path.name for path in folder.iterdir()) == ["distances.png", "means.json", "similarity.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in folder.glob("*.png"))

    data = build_data(cfg := config("fake_lt", "tiny_clip", "num_epochs", 0))
    model = build_model(cfg, data.info.class_names).eval()
    with torch.no_grad():
        features = model.features(torch.stack([data.test[k]["image"] for k in range(len(data.test))]))
    labels = data.test.labels
    mean = torch.stack([features[labels == c].mean(0) for c in range(10)])
    distances = 1 - F.cosine_similarity(features, mean[labels])
    many = distances[torch.isin(labels, data.info.groups["many"])]
    means = json.loads((folder / "means.json").read_text())
    assert means["test"]["many"] == {"images": len(many), "mean_distance": pytest.approx(float(many.mean()), abs=1e-5)}
    assert launch(*words).returncode == 0, "the run's folder is as good as before"


def test_zero_shot_needs_no_run(launch: Cli) -> None:
    words = ["-d", "fake_lt", "-m", "zstiny_clip", "num_workers", "0", "max_test_images", "30"]
    assert analyze_features.main(words) == 0
    assert Path("output/fake_lt_zstiny_clip/analysis/means.json").exists()
    assert launch(*words).returncode == 0, "a later run takes the folder"


@pytest.mark.parametrize("ensemble", ["wise", "soup ensemble_runs [other]"])
def test_an_ensemble_is_refused(ensemble: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The files would hold the features of the trained weights, and not those of the mean of weights."""
    assert analyze_features.main(["-d", "fake_lt", "-m", "tiny_clip", "ensemble", *ensemble.split()]) == 2
    error = capsys.readouterr().err
    assert "without ensemble" in error and "leave it out" in error and error.count("\n") == 1


def test_help_and_wrong_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        analyze_features.main(["--help"])
    assert "python scripts/analyze_features.py -d digits_lt -m tiny_clip_peft" in capsys.readouterr().out
    assert analyze_features.main(["-d", "fake_lt"]) == 2 and "--model" in capsys.readouterr().err
