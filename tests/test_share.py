"""Sharing a model: the folder of `export hub`, its upload, and who can load it. Nothing here uses the network."""

import dataclasses
import json
import os
import shutil
from itertools import product
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import Cli, HasRun
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.repocard_data import model_index_to_eval_results
from PIL import Image
from safetensors.torch import load_file
from test_exchange import RUN, subject, timm_vit, trained
from test_export_infer import convnet, photograph, printed, with_facts
from test_processes import one_line

import tailtune
from tailtune.configs.errors import UserError
from tailtune.trainers.export import SharedRun, export
from tailtune.trainers.export.hub_format import crop_share, without_places
from tailtune.trainers.export.hub_upload import push

SHORT = "-d fake_lt -m tiny_clip pretrained none max_steps 1 max_test_images 20 num_workers 0 output_dir run"
WORDS = f"{SHORT} val_per_class 1 export hub"
HUB = RUN / "export" / "hub"
ABOUT = {"data": "mine", "model": "vit", "backbone": "timm:x", "pretrained": None, "classifier": "LinearClassifier"}
METRICS = {
    "seed": 0,
    "commit": None,
    "hardware": "CPU",
    "packages": {"torch": "2"},
    "test": {"accuracy": 71.239, "few_acc": 50.0, "med_acc": None},
    "evaluation": {"many_above": 50, "few_below": 20},
}


def test_the_temperature_is_that_of_one_view(launch: Cli, has_run: HasRun) -> None:
    """An export sees one view of an image, whatever the run was evaluated with."""

    def exported(words: str) -> float | None:
        assert launch(SHORT, "val_per_class 2 test_only True export merged", words).returncode == 0
        (path,) = Path("output").glob("**/export/merged/facts.json")
        temperature: float | None = json.loads(path.read_text())["temperature"]
        return temperature

    has_run(SHORT, "val_per_class 2")
    plain = exported("")
    shutil.rmtree("output")
    has_run(SHORT, "val_per_class 2 tte True tte_mode tencrop")
    assert exported("tte True") is None and plain is not None
    assert exported("tte False") == pytest.approx(plain, rel=1e-6) == exported("tte True")


def test_the_temperature_is_that_of_the_crop(launch: Cli, has_run: HasRun) -> None:
    has_run(SHORT, "val_per_class 2")
    facts = RUN / "export" / "merged" / "facts.json"
    found = []
    for words in ("", "crop_margin 12", "crop_margin 12 max_test_images 10"):
        assert launch("export run merged", words).returncode == 0
        found.append(json.loads(facts.read_text())["temperature"])
    plain, narrow, again = found
    assert plain != narrow == again


def loaded_logits(where: str | Path, photo: Path) -> torch.Tensor:
    model = tailtune.load(where, "cpu")
    return model.predict_logits(model.preprocess(Image.open(photo))[None])[0]


# --- the folder ------------------------------------------------------------------------------------------------------


def test_a_shared_run_is_loaded_anywhere(launch: Cli, tmp_path: Path) -> None:
    """By TailTune from the folder alone; its infer.py needs no TailTune, because the tuner can be merged."""
    done = launch(WORDS, "lora True")
    assert done.returncode == 0, done.stderr
    photo, before = photograph(tmp_path / "photo.jpg"), HUB.resolve()
    wanted = loaded_logits(RUN, photo)
    elsewhere = tmp_path / "elsewhere" / "model"
    shutil.copytree(before, elsewhere)
    shutil.rmtree("output")
    assert torch.equal(loaded_logits(elsewhere, photo), wanted)
    facts = json.loads((elsewhere / "facts.json").read_text())
    assert sorted([*facts["files"], "facts.json"]) == sorted(
        path.relative_to(elsewhere).as_posix() for path in elsewhere.rglob("*") if path.is_file()
    )
    assert facts["temperature"] > 0 and sum(facts["class_counts"]) > 0, "a validation split was held out"
    done = printed(elsewhere / "infer.py", "--logits", photo, without=["tailtune"])
    assert done.returncode == 0, done.stderr
    assert np.abs(np.array(json.loads(done.stdout)["logits"]) - wanted.numpy()).max() < 1e-3
    for path in elsewhere.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes(), f"{path} names a folder of ours"
    (elsewhere / "checkpoint" / "tensors.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="is damaged"):
        tailtune.load(elsewhere)


def test_a_tuner_that_cannot_be_merged_needs_tailtune(launch: Cli, tmp_path: Path) -> None:
    done = launch(WORDS, "adaptformer True")
    assert done.returncode == 0, done.stderr
    assert not {"model.safetensors", "config.json"} & {path.name for path in HUB.iterdir()}
    photo = photograph(tmp_path / "photo.jpg")
    assert torch.equal(loaded_logits(HUB, photo), loaded_logits(RUN, photo))
    assert "import tailtune" in (HUB / "infer.py").read_text()
    card = huggingface_hub.ModelCard.load(HUB / "README.md")
    assert card.data.library_name == "tailtune" and "timm.create_model" not in card.text


def test_the_card_has_the_results_of_the_run(launch: Cli) -> None:
    assert launch(WORDS, "lora True").returncode == 0
    card = huggingface_hub.ModelCard.load(HUB / "README.md")
    assert card.data.pipeline_tag == "image-classification" and "tailtune" in card.data.tags
    front = huggingface_hub.metadata_load(HUB / "README.md")
    _, results = model_index_to_eval_results(front["model-index"])
    measured = json.loads((RUN / "metrics.json").read_text())["test"]
    found = {each.metric_name: each.metric_value for each in results}
    assert found["Accuracy over all test images"] == round(measured["accuracy"], 2)
    for group, name in (("many", "with many training images"), ("few", "with few training images")):
        assert found[f"Accuracy of the classes {name}"] == round(measured[f"{group}_acc"], 2)
    counts = json.loads((RUN / "metrics.json").read_text())["class_counts"]
    assert f"| class 0 | {counts[0]} |" in card.text and f"{sum(counts):,} training images" in card.text
    assert "python main.py -d fake_lt -m tiny_clip" in card.text and "## Intended use" in card.text


def test_a_class_name_that_is_no_text_is_in_the_card(launch: Cli, tmp_path: Path) -> None:
    for split, name in product(("train", "test"), (b"bee", b"gu\xeape")):
        folder = tmp_path / "insects" / split / os.fsdecode(name)
        folder.mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32), (number, 99, len(name))).save(folder / f"{number}.png")
    words = (
        "-d insects -m tiny_clip classifier LinearClassifier init_head none num_epochs 0 num_workers 0 output_dir run"
    )
    done = launch(words, "export hub")
    assert done.returncode == 0, done.stderr
    assert "| gu\\udceape | 3 |" in (HUB / "README.md").read_text(encoding="utf-8")


def test_paths_of_this_machine_are_not_shared() -> None:
    given = {"root": "/data/imagenet", "lists": ["~/a.txt", "b/c.txt"], "lr": 0.1, "prompt": "a/b"}
    assert without_places(given) == {"root": "imagenet", "lists": ["a.txt", "b/c.txt"], "lr": 0.1, "prompt": "a/b"}


def test_what_cannot_be_shared_is_refused(launch: Cli, tmp_path: Path) -> None:
    words = SHORT.replace("pretrained none", f"pretrained {tmp_path}/w.pth")
    (tmp_path / "w.pth").write_bytes(b"")
    one_line(launch(f"{words} export hub"), "export hub", "w.pth", "export merged or onnx")
    one_line(launch(f"{SHORT} export hub export_fp16 True"), "export_fp16", "export onnx")
    assert not RUN.exists()
    with pytest.raises(UserError, match="checkpoint is one of another project"):
        export(dataclasses.replace(trained(subject(timm_vit(), [])), facts=ABOUT), "hub", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- timm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with the files of a run that `tailtune.load` would read."""
    (tmp_path / "home" / "checkpoint").mkdir(parents=True)
    (tmp_path / "home" / "config.yaml").write_text(yaml.safe_dump({"data": "mine"}))
    (tmp_path / "home" / "checkpoint" / "facts.json").write_text("{}")
    (tmp_path / "home" / "checkpoint" / "tensors.safetensors").write_bytes(b"")
    return tmp_path / "home"


@pytest.mark.parametrize(
    "host, tuners", [(timm_vit, ["lora", "ssf_ln"]), (convnet, ["bias_tuning"])], ids=lambda each: str(each)[:20]
)
def test_timm_creates_the_classifier_and_its_transform(
    host: Any, tuners: list[str], home: Path, tmp_path: Path
) -> None:
    """With the classifier inside, the class names, and the resize, crop and normalisation of the evaluation."""
    made = with_facts(trained(subject(host(), tuners, "LinearClassifier")), facts={**ABOUT, "tuners": [], "peft": None})
    made = dataclasses.replace(made, run=SharedRun(home, METRICS))
    export(made, "hub", tmp_path / "hub")
    net = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(net)
    transform = timm.data.create_transform(**data, is_training=False)
    image = Image.open(photograph(tmp_path / "photo.jpg")).convert("RGB")
    names: dict[str, Any] = {}
    exec(json.loads((tmp_path / "hub" / "facts.json").read_text())["how_to_prepare"], names)
    upright = Image.fromarray(np.asarray(image))
    assert (transform(upright) - names["prepare"](upright)).abs().max() < 1e-5
    with torch.no_grad():
        found = net(made.method.model.normalised(made.images(3)))
        assert (found - made.method.predict(made.images(3))).abs().max() < 1e-4
    assert net.pretrained_cfg["label_names"] == list(made.class_names) and net.num_classes == len(made.class_names)


def test_a_head_that_is_not_linear_lies_beside_timms_network(home: Path, tmp_path: Path) -> None:
    made = with_facts(trained(subject(timm_vit(), ["lora"])), facts={**ABOUT, "tuners": ["lora"], "peft": None})
    export(dataclasses.replace(made, run=SharedRun(home, METRICS)), "hub", tmp_path / "hub")
    net = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
    with torch.no_grad():
        features = net(made.method.model.normalised(made.images(3)))
        assert (features - made.method.model.features(made.images(3))).abs().max() < 1e-4
    assert torch.equal(load_file(tmp_path / "hub" / "head.safetensors")["weight"], made.head.weight)
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "returns the features" in text and "71.24" in text and "None" not in text


def test_timm_resizes_to_the_same_side() -> None:
    for side in range(16, 520):
        for resized in (side, side * 8 // 7):
            share = crop_share(side, resized)
            assert int(side / share) == resized and 0 < share <= 1


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be uploaded."""
    calls: list[dict[str, Any]] = []

    def create(self: Any, repo_id: str, **named: Any) -> str:
        calls.append({"created": repo_id, **named})
        return f"https://huggingface.co/{repo_id}"

    def upload(self: Any, **named: Any) -> None:
        folder = Path(named["folder_path"])
        every = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        chosen = huggingface_hub.utils.filter_repo_objects(every, allow_patterns=named["allow_patterns"])
        calls.append({"uploaded": named["repo_id"], "files": sorted(chosen)})

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "a token")
    return calls


def test_an_upload_holds_the_export_and_is_private(launch: Cli, uploads: list[dict[str, Any]]) -> None:
    assert launch(WORDS, "lora True").returncode == 0 and uploads == []
    (HUB / "notes.txt").write_text("of the user")
    done = launch(WORDS, "lora True push_to_hub ann/digits")
    assert done.returncode == 0, done.stderr
    assert "uploaded to https://huggingface.co/ann/digits" in done.stdout and "trained" not in done.stdout
    created, uploaded = uploads
    assert created == {"created": "ann/digits", "private": True, "exist_ok": True}
    assert uploaded["uploaded"] == "ann/digits" and "notes.txt" not in uploaded["files"]
    assert {"README.md", "config.yaml", "checkpoint/tensors.safetensors", "facts.json"} <= set(uploaded["files"])


def test_an_upload_that_fails_ends_in_one_line(
    launch: Cli, uploads: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: Any, **_: Any) -> None:
        raise ConnectionError("the Hub is away")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", refused)
    one_line(launch(WORDS, "lora True push_to_hub ann/digits"), "push_to_hub ann/digits", "the Hub is away", "complete")
    assert (HUB / "README.md").is_file() and issubclass(HfHubHTTPError, OSError)


@pytest.mark.parametrize(
    "words, says",
    [
        ("export hub push_to_hub digits", "USER/NAME"),
        ("export hub push_to_hub a/b/c", "USER/NAME"),
        ("export hub push_to_hub a/--b", "USER/NAME"),
        ("export onnx push_to_hub ann/digits", "export hub"),
        ("push_to_hub ann/digits", "export hub"),
    ],
)
def test_an_upload_is_checked_before_training(
    words: str, says: str, launch: Cli, uploads: list[dict[str, Any]]
) -> None:
    one_line(launch(f"{SHORT} {words}"), "push_to_hub", says)
    assert not RUN.exists() and uploads == []


@pytest.mark.parametrize("words", ["export onnx push_to_hub ann/digits", "push_to_hub ann/digits", "export_fp16 True"])
def test_options_of_an_export_are_checked_for_a_finished_run_too(
    words: str, launch: Cli, has_run: HasRun, uploads: list[dict[str, Any]]
) -> None:
    has_run(SHORT)
    one_line(launch(f"{SHORT} {words}"), "add `export ")
    assert not (RUN / "export").exists() and uploads == []


def test_a_machine_without_a_network_uploads_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Errors of the client's HTTP library need not be OSErrors."""

    def unreachable(self: Any, *_: Any, **__: Any) -> None:
        raise HfHubHTTPError.__bases__[0]("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)
    (tmp_path / "facts.json").write_text('{"files": []}')
    with pytest.raises(UserError, match="push_to_hub ann/digits: Name or service not known; .* repeat the command"):
        push(tmp_path, "ann/digits")


def test_nobody_is_logged_in(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    one_line(launch(f"{WORDS} push_to_hub ann/digits"), "not logged in", "hf auth login")
    assert not RUN.exists()


def test_a_model_is_loaded_from_the_hub(launch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder stands for the snapshot. A folder with the same name comes first."""
    assert launch(WORDS, "lora True").returncode == 0
    asked = []

    def snapshot(repo_id: str, allow_patterns: list[str]) -> str:
        asked.append(repo_id)
        copy = tmp_path / "cache" / repo_id
        for path in HUB.rglob("*"):
            if list(
                huggingface_hub.utils.filter_repo_objects(
                    [path.relative_to(HUB).as_posix()], allow_patterns=allow_patterns
                )
            ):
                (copy / path.relative_to(HUB)).parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    shutil.copy(path, copy / path.relative_to(HUB))
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    photo = photograph(tmp_path / "photo.jpg")
    assert torch.equal(loaded_logits("ann/digits", photo), loaded_logits(RUN, photo))
    assert asked == ["ann/digits"] and not list((tmp_path / "cache").rglob("model.safetensors"))
    for wrong in ("output/rnu", "./ann/digits", "rnu"):
        with pytest.raises(UserError, match="holds no checkpoint"):
            tailtune.load(wrong)
    assert asked == ["ann/digits"], "a typing error asks for nothing"


def test_a_repository_that_is_none_ends_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def away(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("cannot find\nthe requested files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", away)
    with pytest.raises(UserError, match="no folder ann/digits, .*cannot find the requested files"):
        tailtune.load("ann/digits")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(UserError, match="holds no model of TailTune"):
        tailtune.load("ann/digits")
