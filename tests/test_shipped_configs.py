"""The shipped configs: both generations of LIFT under their own names, iNaturalist by taxonomic rank."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from yacs.config import CfgNode

from tailtune.configs import load_configs, names, values_of
from tailtune.configs.key import TRAIN
from tailtune.datasets.build_data import build_info
from tailtune.models import BACKBONES
from tailtune.trainers.dry_run import dry_run
from tailtune.trainers.option_schema import declared
from tailtune.trainers.run import run

Config = Callable[..., CfgNode]
CLIPS = ("rn50", "rn101", "vit_b16", "vit_l14", "vit_l14@336px")
LIFT = [f"{kind}_{name}" for kind in ("clip", "zsclip") for name in CLIPS]
LIFT += ["in21k_vit_b16", "in21k_vit_b16@384px", "in21k_vit_l16"]
TUNED = {
    "clip_vit_b16_peft": "adaptformer",
    "in21k_vit_b16_peft": "adaptformer",
    "clip_rn50_peft": "bias_tuning",
    "clip_rn101_peft": "bias_tuning",
    "clip_vit_b16_ft": "full_tuning",
}
"""Configs of the first generation (PEL) that train more than a head, and what they train."""
SETTINGS = {"prec": "amp", "batch_size": 128, "lr": 0.01, "weight_decay": 5e-4, "momentum": 0.9, "seed": 0}
SETTINGS |= {"loss_type": "LA", "classifier": "CosineClassifier", "scale": 25, "deterministic": True, "partial": None}
RANKS = {"k": 6, "p": 25, "c": 57, "o": 272, "f": 1118, "g": 4401, "s": 8142}


@pytest.mark.parametrize("name", [*LIFT, *TUNED])
def test_values_are_those_of_lift(name: str, config: Config) -> None:
    cfg = config("places_lt", name)
    assert {key: cfg[key] for key in SETTINGS} == SETTINGS and cfg.num_epochs == 10
    assert cfg.zero_shot == name.startswith("zsclip")
    assert cfg.init_head == (None if cfg.zero_shot else "class_mean" if name.startswith("in21k") else "text_feat")
    flags = {key for key, value in values_of(cfg, TRAIN).items() if value is True and "." not in key}
    assert flags - {"deterministic", "zero_shot"} == ({TUNED[name]} if name in TUNED else set())
    assert cfg.tte == name.endswith("_peft") and cfg.tte_mode == "fivecrop"
    assert cfg.resolution == {"6px": 336, "4px": 384}.get(name[-3:], 224)
    assert cfg.expand == (21 if "l14" in name else 24) and cfg.interpolation == "bilinear"


OTHER_RECIPES = ("focal_sam", "gnm", "soup", "soups", "soup_start", "lift_plus", "coop", "maple", "tip")
"""Endings of the names of configs whose authors trained for other numbers of epochs."""
OF_LIFT = [name for name in names("model") if name.startswith(("clip", "zsclip", "in21k"))]


@pytest.mark.parametrize("name", [name for name in OF_LIFT if not name.endswith(OTHER_RECIPES)])
def test_twenty_epochs_for_inaturalist(name: str) -> None:
    """As the authors of LIFT trained it, whatever the rank; a number on the command line is still the user's."""
    epochs = [
        load_configs(data, name, [], declared())[-1].num_epochs for data in ("inat2018", "inat2018_f", "imagenet_lt")
    ]
    trains = not load_configs("inat2018", name, [], declared())[-1].zero_shot
    assert epochs == ([20, 20, 10] if trains else [10, 10, 10])
    assert load_configs("inat2018", name, ["num_epochs", "5"], declared())[-1].num_epochs == 5


def test_shipped_backbones_are_those_of_the_table() -> None:
    shipped = {load_configs("fake_lt", name, [], declared())[-1].backbone for name in names("model")}
    assert shipped - BACKBONES.keys() == {"timm:mobilenetv2_100"}


@pytest.mark.parametrize("rank", RANKS)
def test_inaturalist_by_rank(rank: str, config: Config) -> None:
    """Every training image counts once, and there is a group or none of every kind."""
    info = build_info(config(f"inat2018_{rank}", "zsclip_vit_b16"))
    assert info.num_classes == RANKS[rank] and int(info.class_counts.sum()) == 437_513
    assert sum(len(each) for each in info.groups.values()) == RANKS[rank]
    if rank == "s":
        assert torch.equal(info.class_counts, build_info(config("inat2018", "zsclip_vit_b16")).class_counts)


@pytest.fixture
def coarse(tmp_path: Path) -> Path:
    """Three species of two kingdoms, 25 images each: by kingdom no class is few-shot, and none many-shot."""
    species = [{"id": k, "name": f"species {k}", "kingdom": "Animalia" if k else "Plantae"} for k in range(3)]
    (tmp_path / "categories.json").write_text(json.dumps(species))
    lines = []
    for k in range(3):
        for i in range(25):
            lines.append(f"{k}_{i}.png {k}\n")
            Image.new("RGB", (32, 32), (80 * k, 10 * i, 0)).save(tmp_path / f"{k}_{i}.png")
    (tmp_path / "train.txt").write_text("".join(lines))
    (tmp_path / "test.txt").write_text("".join(lines[::10]))
    yaml = f"dataset: ImageList\nroot: {tmp_path}\ntrain_list: train.txt\ntest_list: test.txt\nlabel_field: kingdom\n"
    (tmp_path / "coarse.yaml").write_text(yaml)
    return tmp_path / "coarse.yaml"


def test_a_rank_without_some_shot_groups(coarse: Path, config: Config, tmp_path: Path) -> None:
    """Its dry run, its training and its evaluation show n/a where LIFT prints nan."""
    words = ("pretrained", "none", "num_epochs", 1, "output_dir", str(tmp_path / "run"))
    cfg = config(str(coarse), "tiny_clip", *words)
    assert {name: len(each) for name, each in build_info(cfg).groups.items()} == {"many": 0, "med": 2, "few": 0}
    assert dry_run(cfg)[0]["params"]["head"] == 2 * 128
    test = json.loads((run(cfg) / "metrics.json").read_text())["test"]
    assert test["many_acc"] is test["few_acc"] is None and test["med_acc"] == test["mean_acc"]
    assert (tmp_path / "run" / "log.txt").read_text().count("n/a") >= 2
