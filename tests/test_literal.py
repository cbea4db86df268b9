"""What facts.json of an export says is true as written: whoever follows it, and nothing else, gets the run's logits."""

import json
import os
import resource
import stat
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import peft
import pytest
import timm
import torch
from conftest import ROOT, Cli
from open_clip.pretrained import _PRETRAINED, _pcfg
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from small import SIDE, fixture_net
from test_exchange import literal, logits, normalised, subject, trained
from test_weights import QUICK
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.datasets.build_data import build_data
from tailtune.datasets.images.transforms import AUGMENTS, INTERPOLATIONS, eval_side, eval_transform
from tailtune.models import ClassificationModel, find_backbone
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone
from tailtune.models.backbones.timm_backbone import TimmBackbone
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.heads.classifiers import HEADS
from tailtune.models.tuners.peft_wrapper import add_peft
from tailtune.trainers.config_checks import check, outline
from tailtune.trainers.export import EXPORTS, ExportedModel, export
from tailtune.trainers.export.loading_code import how_to_prepare, preprocessing
from tailtune.trainers.export.run_command import command_of
from tailtune.trainers.methods import Method

Config = Callable[..., CfgNode]
RUN = Path("output/run")
STATS = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def facts_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "facts.json").read_text())


def by_fields(steps: dict[str, Any], image: Image.Image) -> np.ndarray:
    """An image prepared by the fields of `preprocessing` with Pillow and NumPy alone, [3, R, R]."""
    assert steps["layout"] == "NCHW" and steps["antialias"]  # as Pillow resizes always
    if steps["exif_orientation"]:
        image = ImageOps.exif_transpose(image)
    image = image.convert(steps["color"])
    short, side = steps["resize_shorter_side"], steps["center_crop"]
    width, height = (int(short * each / min(image.size)) for each in image.size)
    image = image.resize((width, height), Image.Resampling[steps["interpolation"].upper()])
    left, top = (round((each - side) / 2) for each in (width, height))
    pixels = np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)
    if steps["mean"] is not None:
        low, high = steps["value_range"]
        scaled = low + (high - low) * pixels.astype("float32") / 255
        mean, std = (np.array(steps[name], "float32")[:, None, None] for name in ("mean", "std"))
        pixels = (scaled - mean) / std
    return pixels.astype(steps["dtype"])


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (32, 32), (300, 37)])
def test_images_are_prepared_as_in_an_evaluation(augment: str, interpolation: str, size: tuple[int, int]) -> None:
    """By the fields and by the code, for networks that normalise and those that do not."""
    made = subject(ViTEncoder(fixture_net()), [])
    object.__setattr__(made, "resize", eval_side(made.resolution, augment))
    object.__setattr__(made, "interpolation", interpolation)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    wanted = eval_transform(made.resolution, interpolation, augment)(image)
    for within in (True, False):
        steps = preprocessing(made, inside=within)
        names: dict[str, Any] = {}
        exec(how_to_prepare(steps), names)
        expected = wanted if within else made.method.model.normalised(wanted[None])[0]
        assert torch.equal(torch.as_tensor(names["prepare"](image)), expected)
        assert torch.allclose(torch.from_numpy(by_fields(steps, image)).double(), expected.double(), atol=1e-6)


# --- the demo --------------------------------------------------------------------------------------------------------

DEMO = "-d digits_lt -m tiny_clip lora True max_steps 30 num_workers 0 output_dir run max_test_images 300"


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.slow
@pytest.mark.usefixtures("umask")
def test_the_demo_in_every_format(launch: Cli, config: Config, tmp_path: Path) -> None:
    """One short training; all formats classify as the run did, and their files have the mode that the umask gives."""
    for name in EXPORTS:
        done = launch(DEMO, "export", name)
        assert done.returncode == 0, done.stderr
    test = build_data(config(*DEMO.replace("-d ", "").replace("-m ", "").split())).test
    stored = load_file(RUN / "logits.safetensors")
    wanted = (stored["logits"].float() + stored["row_max"].unsqueeze(-1))[:, 0]
    photos = [test.source.load(int(test.indices[index])) for index in stored["index"].tolist()]
    accuracy = (wanted.argmax(1) == stored["labels"]).float().mean()
    assert accuracy > 0.5, "a network that has learnt something"
    for name in ("merged", "onnx", "peft"):
        folder = RUN / "export" / name
        (prepare, predict), steps = literal(folder), facts_of(folder)["preprocessing"]
        for prepared in (
            torch.stack([torch.as_tensor(prepare(photo)) for photo in photos]),
            torch.from_numpy(np.stack([by_fields(steps, photo) for photo in photos])),
        ):
            predicted = torch.as_tensor(predict(prepared))
            assert (predicted - wanted).abs().max() < 0.05, name  # which is what half precision in the file leaves
            assert abs((predicted.argmax(1) == stored["labels"]).float().mean() - accuracy) < 0.01
    files = [each for each in RUN.rglob("*") if each.is_file() and each.name != ".lock"]
    assert len(files) > 15 and {stat.S_IMODE(each.stat().st_mode) for each in files} == {0o640}
    page = (ROOT / "docs" / "exports.md").read_text(encoding="utf-8")
    for name in EXPORTS:
        facts = facts_of(RUN / "export" / name)
        assert all(f"`{field}`" in page for field in (*facts, *facts["preprocessing"])), "every field is explained"
    about = facts_of(RUN / "export" / "peft")
    assert about["base"] == "base.safetensors" in about["files"]
    assert peft.PeftConfig.from_pretrained(str(RUN / "export/peft")).base_model_name_or_path == "base.safetensors"

    command = facts_of(RUN / "export" / "lift")["command"]
    words = [word.replace("FOLDER", str(tmp_path / RUN / "export" / "lift")) for word in command]
    done = launch(*words, "output_dir other")
    assert done.returncode == 0, done.stderr
    (result,) = Path("output/other/tests").iterdir()
    again = load_file(result / "logits.safetensors")
    assert all(torch.equal(again[name], stored[name]) for name in stored)


def test_the_command_of_a_run_gives_its_config_again(config: Config, tmp_path: Path) -> None:
    """Also with lists, mappings, spaces, a method's options and data of the user's."""
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("dataset: Fake\nnum_classes: 4\n")
    pairs = ("partial", "[1,3]", "lora", True, "lr_factors", "{tuner: 0.1}", "prompt", "a photo of {}, a bird.")
    pairs += ("method", "sade", "num_experts", 3, "sade.inverse_strength", 1.5, "lr", 1e-5, "export", "lift")
    cfg = config(str(yaml), "tiny_clip", *pairs)
    words = command_of(cfg)
    assert words[:4] == ["-d", str(yaml), "-m", "tiny_clip"]
    again = config(words[1], words[3], *words[4:])
    changed = {key for key in cfg if cfg[key] != again[key]}
    assert changed <= {"export", "given", "test_key", "run_name"}


def test_the_command_names_the_model_config_of_the_user(config: Config, tmp_path: Path) -> None:
    """If its file is gone, all of its options that anything reads are in the command."""
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("backbone: TinyCLIP\nlora: true\nlr: 0.3\nmask_ratio: 0.5\n")
    cfg = config("fake_lt", str(yaml), "seed", 2)
    words = command_of(cfg)
    assert words == ["-d", "fake_lt", "-m", str(yaml), "seed", "2"]
    yaml.unlink()
    words = command_of(cfg)
    again = config(words[1], words[3], *words[4:])
    changed = {key for key in cfg if cfg[key] != again[key]}
    assert changed <= {"given", "model", "model_file", "run_name", "test_key", "mask_ratio"}
    check(again)


# --- the base of an adapter ------------------------------------------------------------------------------------------

TOWERS: dict[str, tuple[dict[str, Any], str]] = {
    "quick": (QUICK, "qkv"),
    "resnet": (
        {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}},
        "layer1.0.conv1",
    ),
    "trunk": (
        {"embed_dim": 64, "custom_text": True}
        | {"vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "none"}},
        "qkv",
    ),
    "clipa": (
        {"vision_cfg": {**QUICK["vision_cfg"], "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}},
        "c_fc",
    ),
}
"""Kinds of open_clip's image encoders: what differs from `QUICK`, and the layers that an adapter wraps."""


def adapted(host: Encoder, target: str, side: int, **named: Any) -> ExportedModel:
    """A model with a trained LoRA of the peft library."""
    plain = subject(host, [])
    wrapper = add_peft(host, "LoRA", {"r": 2, "target_modules": [target]}, None, side, 0)
    model = ClassificationModel(host, plain.head, STATS, peft=wrapper)
    return trained(ExportedModel(Method(model, plain.method.objective).eval(), [], plain.class_names, side, **named))


def check_literal(made: ExportedModel, folder: Path, base: str) -> None:
    export(made, "peft", folder)
    about = facts_of(folder)
    assert about["base"] == base == peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    assert (base in about["files"]) == (base == "base.safetensors")
    _, predict = literal(folder)
    wanted = logits(made)
    assert (predict(normalised(made)) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    "kind, resolution, named",
    [("quick", 32, True), ("quick", 48, True), ("resnet", 64, True), ("trunk", 160, True)]
    + [("trunk", 96, False), ("clipa", 32, True), ("clipa", 48, False)],
)
def test_an_adapter_of_a_clip_names_its_base_or_brings_it(
    kind: str, resolution: int, named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the library's name and tag where its own code gives the same network; else as a file beside the adapter."""
    changes, target = TOWERS[kind]
    config = {**QUICK, **changes}
    arch = f"tailtune-literal-{kind}"
    (tmp_path / f"{arch}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    with seeded(3):
        clip = open_clip.create_model(arch)
    save_file({name: each.contiguous() for name, each in clip.state_dict().items()}, tmp_path / "w.safetensors")
    published = {**_pcfg(quick_gelu=bool(config["quick_gelu"])), "file": str(tmp_path / "w.safetensors")}
    monkeypatch.setitem(_PRETRAINED, arch, {"mine": published})
    spec = OpenClipBackbone(arch, tag=None)
    host = spec.build("default", resolution, 0, False).encoder
    made = adapted(host, target, resolution, arch=arch, base=spec.published("default"))
    check_literal(made, tmp_path / "peft", f"open_clip:{arch}:mine" if named else "base.safetensors")
    assert spec.published(None) is None and spec.published(str(tmp_path / "w.safetensors")) is None


@pytest.mark.parametrize(
    "name, side, target", [("test_vit", 160, "qkv"), ("test_vit", 96, "qkv"), ("test_resnet", 64, "layer1.0.conv1")]
)
def test_an_adapter_of_a_timm_network_names_its_base_or_brings_it(
    name: str, side: int, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = timm.create_model

    def downloaded(model_name: str, pretrained: bool = False, **named: Any) -> Any:
        """Weights that stand for the published ones."""
        with seeded(7 if pretrained else 8):
            return real(model_name, **named)

    monkeypatch.setattr(timm, "create_model", downloaded)
    spec = TimmBackbone(name)
    monkeypatch.setattr("tailtune.models.backbones.timm_backbone.hub_or_cache", nullcontext)
    for pretrained, base in (("default", f"timm:{name}.r160_in1k"), (None, "base.safetensors")):
        host = spec.build(pretrained, side, 0, False).encoder
        made = adapted(host, target, side, base=spec.published(pretrained))
        check_literal(made, tmp_path / base, base)


@pytest.mark.parametrize(
    "words, published",
    [
        ("backbone CLIP-ViT-B/16 pretrained default", "open_clip:ViT-B-16-quickgelu:openai"),
        ("backbone open_clip:ViT-B-32 pretrained laion2b_s34b_b79k", "open_clip:ViT-B-32:laion2b_s34b_b79k"),
        ("backbone IN21K-ViT-B/16 pretrained default", "timm:vit_base_patch16_224.augreg_in21k_ft_in1k"),
        ("backbone timm:resnet18 pretrained default", "timm:resnet18.a1_in1k"),
        ("backbone ResNet-50 pretrained default", "timm:resnet50.a1_in1k"),
        ("backbone ResNet-50 pretrained none", None),
        ("backbone timm:resnet18 pretrained none", None),
        ("backbone timm:resnet18 pretrained ./w.pth", None),
        ("backbone CLIP-ViT-B/16 pretrained ./w.pt", None),
        ("backbone TinyCLIP pretrained default", None),
    ],
)
def test_what_a_base_is_called(words: str, published: str | None, config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", *words.split())
    found = find_backbone(cfg.backbone).published(cfg.pretrained)
    assert (None if found is None else str(found)) == published


# --- tuners on the feature of a plain network ------------------------------------------------------------------------


@pytest.mark.parametrize("head", [name for name in HEADS if name not in ("TextClassifier", "TipAdapter")])
def test_scales_and_shifts_of_a_feature_stand_before_the_head(head: str, tmp_path: Path) -> None:
    made = trained(
        subject(
            WholeNetworkEncoder(timm.create_model("test_resnet", num_classes=0), 96), ["ssf_attn", "bias_tuning"], head
        )
    )
    export(made, "merged", tmp_path)
    assert {"feature_scale", "feature_shift"} <= load_file(tmp_path / "head.safetensors").keys()
    _, predict = literal(tmp_path)
    wanted = logits(made)
    assert (predict(normalised(made)) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    "words, says",
    [
        ("peft backbone timm:test_resnet init_head class_mean ssf_attn True", "`export merged` or `onnx` has"),
        ("peft vpt_deep True", "`export onnx` has"),
        ("peft adapter True lora True", "`export onnx` has"),
        ("peft ssf_ln True", "`export merged` or `onnx` has"),
        ("merged backbone ResNet-32 resolution none init_head class_mean full_tuning True", "use `export onnx`"),
    ],
)
def test_a_refusal_names_a_format_that_takes_the_model(words: str, says: str, config: Config) -> None:
    """Before anything trains; each format that is named does take it."""
    name, *pairs = words.split()
    pairs = ["pretrained", "none", *pairs]
    with pytest.raises(UserError) as caught:
        outline(config("fake_lt", "tiny_clip", *pairs, "export", name))
    assert says in str(caught.value)
    named = {"merged", "onnx"} if "merged` or" in says else {"onnx"}
    for each in named:
        outline(config("fake_lt", "tiny_clip", *pairs, "export", each))


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, tuner", [("lift", "lora"), ("merged", "lora"), ("peft", "lora"), ("peft", "peft")])
def test_a_disk_that_is_full_ends_in_one_line(name: str, tuner: str, tmp_path: Path) -> None:
    """Nothing is left behind, and the export can be repeated."""
    host = ViTEncoder(fixture_net())
    made = adapted(host, "qkv", SIDE) if tuner == "peft" else trained(subject(host, [tuner]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write") as caught:
            export(made, name, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []
    export(made, name, tmp_path / "out")
