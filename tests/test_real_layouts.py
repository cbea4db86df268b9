"""ImageNet-LT, Places-LT and iNaturalist 2018 as they lie on a disk: small trees in every layout that people have.

The shipped data configs are used as they are. Only what follows from the lists being cut down is set: the number of
classes, and names and counts of the classes that are left.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Cli
from PIL import Image
from tiers import slow_except

from tailtune.datasets.build_data import build_data

COUNTS = {"train": (5, 3, 2), "val": (1, 1, 1), "test": (2, 2, 2)}
"""Images of each class in each list."""
WNIDS = ("n01440764", "n01443537", "n01484850")
SCENES = ("airfield", "apartment_building-outdoor", "bazaar-indoor")
SPECIES = ("Plantae/0", "Animalia/1", "Fungi/2")
CATEGORIES = [
    {"id": label, "name": name, "genus": name.split()[0], "kingdom": SPECIES[label].split("/")[0]}
    for label, name in enumerate(("Zea mays", "Mus musculus", "Amanita muscaria"))
]
FEWER = "num_classes 3 class_counts none"
TRAIN = "-m tiny_clip_peft pretrained none max_steps 2 batch_size 4 num_workers 0"

Spelling = Callable[[str, int, int], str]
"""Name of the list, label and number of an image → its path."""


def imagenet(split: str, label: int, number: int) -> str:
    wnid = WNIDS[label]
    return f"val/{wnid}/ILSVRC2012_val_{number:08}.JPEG" if split == "test" else f"train/{wnid}/{wnid}_{number}.JPEG"


def imagenet_flat(split: str, label: int, number: int) -> str:
    return f"val/ILSVRC2012_val_{number:08}.JPEG" if split == "test" else imagenet(split, label, number)


def places(split: str, label: int, number: int) -> str:
    """The first version of the lists, and the release with class folders. Scenes of two words are one folder."""
    folder = f"{'val' if split == 'test' else 'train'}/{SCENES[label]}"
    return f"{folder}/Places365_val_{number:08}.jpg" if split == "test" else f"{folder}/{number:08}.jpg"


def places_archive(size: str) -> Spelling:
    """The second version of the lists, and the archives of small or of large images."""

    def path(split: str, label: int, number: int) -> str:
        scene = SCENES[label]
        folder = f"data_{size}/{scene[0]}/{scene.replace('-', '/')}"
        return f"val_{size}/Places365_val_{number:08}.jpg" if split == "test" else f"{folder}/{number:08}.jpg"

    return path


def inat(split: str, label: int, number: int) -> str:
    return f"train_val2018/{SPECIES[label]}/{number:032x}.jpg"


@dataclass(frozen=True)
class Case:
    """A data config, the spelling of its lists, and the layout of the images."""

    data: str
    listed: Spelling
    lies: Spelling
    options: str
    class_names: tuple[str, ...]
    order: tuple[int, ...] = (0, 1, 2)
    """New label of each label of the lists."""


SMALL, LARGE = places_archive("256"), places_archive("large")
CASES: Mapping[str, Case] = {
    "ImageNet, val/ with class folders": Case("imagenet_lt", imagenet, imagenet, "classnames folders", WNIDS),
    "ImageNet, val/ is one folder": Case("imagenet_lt", imagenet, imagenet_flat, "classnames folders", WNIDS),
    "Places, class folders": Case("places_lt", places, places, "", SCENES),
    "Places, small images": Case("places_lt", places, SMALL, "", SCENES),
    "Places, large images": Case("places_lt", places, LARGE, "", SCENES),
    "Places, lists of small images, class folders": Case("places_lt", SMALL, places, "", SCENES),
    "Places, lists of small images, small images": Case("places_lt", SMALL, SMALL, "", SCENES),
    "Places, lists of small images, large images": Case("places_lt", SMALL, LARGE, "", SCENES),
    "iNaturalist": Case(
        "inat2018", inat, inat, "", ("Amanita muscaria", "Mus musculus", "Zea mays"), order=(2, 1, 0)
    ),
}  # fmt: skip


def names_of_lists(data: str) -> dict[str, str]:
    """List in `COUNTS` → name of the published file."""
    if data == "inat2018":
        return {"train": "iNaturalist18_train.txt", "test": "iNaturalist18_val.txt"}
    prefix = {"imagenet_lt": "ImageNet_LT", "places_lt": "Places_LT"}[data]
    return {split: f"{prefix}_{split}.txt" for split in COUNTS}


def make(root: Path, lists: Path, case: Case) -> dict[str, list[int]]:
    """Write images and lists. Returns list → the shades of its images, by which each one is recognised."""
    lists.mkdir(exist_ok=True)
    number, shades = 0, {}
    for split, name in names_of_lists(case.data).items():
        lines, shades[split] = [], []
        for label, count in enumerate(COUNTS[split]):
            for _ in range(count):
                number += 1
                path = root / case.lies(split, label, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("L", (40, 36), 10 * number).save(path)
                lines.append(f"{case.listed(split, label, number)} {label}\n")
                shades[split].append(10 * number)
        (lists / name).write_text("".join(lines))
    if case.data == "inat2018":
        (lists / "categories.json").write_text(json.dumps(CATEGORIES))
    return shades


ONE_OF_EACH_KIND = ("ImageNet, val/ is one folder", "Places, lists of small images, class folders", "iNaturalist")


@pytest.mark.parametrize("name", slow_except(ONE_OF_EACH_KIND, CASES))
def test_a_layout_is_verified_trained_on_and_evaluated(tmp_path: Path, launch: Cli, name: str) -> None:
    case = CASES[name]
    make(tmp_path / "images", tmp_path / "lists", case)
    options = f"{case.data} {FEWER} {case.options} root images lists lists"

    done = launch("data verify", options, "--decode --report report.json")
    found = json.loads(Path("report.json").read_text())
    assert done.stderr == "" and found["class_names"] == [*case.class_names] and found["release"] == []
    for split in ("train", "test"):
        by_new_label = [COUNTS[split][label] for label in case.order]
        assert found["splits"][split]["counts"] == by_new_label
        assert (found["splits"][split]["missing"], found["splits"][split]["unreadable"]) == ([], {})
    assert all("is not the published list" in problem for problem in found["problems"]), "they are cut down"

    done = launch("-d", options, TRAIN, "output_dir run")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(Path("output/run/metrics.json").read_text())
    assert metrics["class_counts"] == [COUNTS["train"][label] for label in case.order]
    assert "has other class counts" not in done.stderr and metrics["test"]["bad_images"] == 0

    done = launch("-d", options, TRAIN, "output_dir run test_only True test_train True")
    assert done.returncode == 0, done.stderr
    (evaluation,) = Path("output/run/tests").glob("*/metrics.json")
    assert json.loads(evaluation.read_text())["test"]["bad_images"] == 0


@pytest.mark.parametrize("name", CASES)
def test_each_path_leads_to_its_image(tmp_path: Path, config: Callable, name: str) -> None:
    case = CASES[name]
    shades = make(tmp_path / "images", tmp_path / "lists", case)
    words = f"{FEWER} {case.options} root {tmp_path / 'images'} lists {tmp_path / 'lists'}".split()
    bundle = build_data(config(case.data, "tiny_clip_peft", "pretrained", "none", *words))
    for split, view in (("train", bundle.train), ("test", bundle.test)):
        labels = [case.order[label] for label, count in enumerate(COUNTS[split]) for _ in range(count)]
        assert view.labels.tolist() == labels
        found = [view.source.load(position).getpixel((5, 5))[0] for position in range(len(view))]
        assert all(abs(shade - wanted) <= 2 for shade, wanted in zip(found, shades[split], strict=True)), found


def test_whole_lists_need_nothing_but_the_folder(tmp_path: Path, launch: Cli) -> None:
    """All 365 scenes: then neither the number of classes nor their counts are set."""
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for label in range(365):
        for split, folder, archive, name in (
            ("train", "train", f"data_256/s/scene_{label}/indoor", "00000001.jpg"),
            ("test", "val", "val_256", f"Places365_val_{label:08}.jpg"),
        ):
            path = tmp_path / "images" / folder / f"scene_{label}-indoor" / name
            path.parent.mkdir(parents=True)
            Image.new("L", (20, 18), label // 2).save(path)
            lines[split].append(f"{archive}/{name} {label}\n")
    for split in lines:
        (tmp_path / "images" / f"Places_LT_{split}.txt").write_text("".join(lines[split]))
    done = launch("-d places_lt root images", TRAIN, "max_test_images 8 output_dir run")
    assert done.returncode == 0, done.stderr
    assert json.loads(Path("output/run/metrics.json").read_text())["class_counts"] == [1] * 365


def test_parts_of_places_may_have_different_layouts(tmp_path: Path, launch: Cli) -> None:
    """Training images as an archive, validation images with class folders; and one image that is in neither."""

    def lies(split: str, label: int, number: int) -> str:
        return (places if split == "test" else SMALL)(split, label, number)

    for listed in (places, SMALL):
        root = tmp_path / f"root{listed is SMALL}"
        make(root, root, Case("places_lt", listed, lies, "", SCENES))
        next(root.glob("val/*/*")).unlink()
        launch("data verify places_lt", FEWER, "root", root, "--report report.json")
        splits = json.loads(Path("report.json").read_text())["splits"]
        assert splits["train"]["missing"] == [] and len(splits["test"]["missing"]) == 1
