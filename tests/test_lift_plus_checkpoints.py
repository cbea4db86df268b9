"""Checkpoints of LIFT+: loaded and exported under its names."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import Cli
from small import SIDE, Sizes, filled, fixture_net, small_net
from test_exchange import clip_vit, logits, resnet, saved, subject, timm_vit, trained

from tailtune.configs.errors import UserError
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.tuners.table import add_tuners
from tailtune.models.tuners.tuner_options import AftOptions, TunerOptions
from tailtune.trainers.export import export
from tailtune.trainers.foreign_checkpoints import lift_plus
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.load_checkpoint import load_foreign_checkpoint

OF_VIT = ["full_tuning", "bias_tuning", "vpt_deep", "vpt_shallow", "lora", "adapter", "adaptformer", "aft"]
OF_VIT += ["ssf_attn ssf_mlp", "bias_tuning lora ssf_attn ssf_mlp vpt_deep adapter adaptformer aft", ""]
CASES = [(host, names) for host in (clip_vit, timm_vit) for names in OF_VIT] + [(resnet, "ssf_attn"), (resnet, "")]


def stages(names: Sequence[str]) -> Any:
    """A residual network whose four stages alone are tuned."""
    made = subject(resnet(), [])
    add_tuners(made.encoder, {name: TunerOptions(layers=4) for name in names})
    object.__setattr__(made, "tuners", list(names))
    return made


@pytest.mark.parametrize(("host", "names"), CASES, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.parametrize("head", ["CosineClassifier", "LinearClassifier"])
def test_a_round_trip_gives_equal_logits(host: Callable[[], Any], names: str, head: str, tmp_path: Path) -> None:
    tuners = names.split()
    ours = trained(subject(host(), tuners, head))
    export(ours, "lift_plus", tmp_path / "out")
    again = subject(host(), tuners, head)
    assert not torch.equal(logits(again), logits(ours))
    report = load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "out" / "checkpoint.pth.tar"), again.method, tuners)
    assert torch.equal(logits(again), logits(ours)) and "none is left out" in report


@pytest.mark.parametrize("tuner", ["full_tuning", "bias_tuning"])
def test_the_stages_of_a_residual_network(tuner: str, tmp_path: Path) -> None:
    ours = trained(stages([tuner]))
    export(ours, "lift_plus", tmp_path / "out")
    again = stages([tuner])
    load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "out" / "checkpoint.pth.tar"), again.method, [tuner])
    assert torch.equal(logits(again), logits(ours))
    names = torch.load(tmp_path / "out" / "checkpoint.pth.tar", weights_only=True)["tuner"].keys()
    assert {name.split(".")[2].split("_")[0] for name in names if name != "classifier.weight"} == set("0123")
    with pytest.raises(UserError, match="LIFT\\+ tunes the four stages of a residual network alone"):
        export(subject(resnet(), [tuner]), "lift_plus", tmp_path / "other")


BLOCK = "image_encoder.blocks.1."
NAMES = {
    "adaptformer": {"adaptformer.scale": ()}
    | {f"adaptformer.{layer}.{kind}": None for layer in ("norm", "down", "up") for kind in ("weight", "bias")},
    "adapter": {f"mlp.adapter.{layer}.{kind}": None for layer in ("norm", "down", "up") for kind in ("weight", "bias")},
    "lora": {f"attn.lora.{site}.{side}": None for site in "qv" for side in ("down", "up")},
    "ssf_attn ssf_mlp": {
        f"{part}.ssf.{layer}.{kind}": {"attn.in_proj": (192,), "mlp.in_proj": (256,)}.get(f"{part}.{layer}", (64,))
        for part in ("attn", "mlp")
        for layer in ("in_proj", "out_proj")
        for kind in ("scale", "shift")
    },
    "vpt_deep": {"prompt": (2, 64)},
    "bias_tuning": {
        "norm1_bias": (64,),
        "attn_in_proj_bias": (192,),
        "attn_out_proj_bias": (64,),
        "norm2_bias": (64,),
        "mlp_in_proj_bias": (256,),
        "mlp_out_proj_bias": (64,),
    },
    "aft": {
        f"{part}.aft.{layer}.masked_{kind}.{what}": None
        for part in ("attn", "mlp")
        for layer in ("in_proj", "out_proj")
        for kind in ("weight", "bias")
        for what in ("optimized_params", "mask")
    },
}
"""Tuner → names within a block of the original's file, with the shapes that are not obvious (successors.md §2.8)."""


@pytest.mark.parametrize("names", NAMES)
def test_names_and_shapes_are_those_of_the_original(names: str) -> None:
    made = subject(clip_vit(), names.split())
    places = {name: place.read() for name, place in lift_plus.layout(made.method.model, names.split()).items()}
    block = {name.removeprefix(f"tuner.{BLOCK}") for name in places if name.startswith(f"tuner.{BLOCK}")}
    assert block == NAMES[names].keys()
    for name, shape in NAMES[names].items():
        assert shape is None or places[f"tuner.{BLOCK}{name}"].shape == shape, name
    assert places.keys() - {f"tuner.image_encoder.blocks.{k}.{name}" for k in range(2) for name in block} == {
        "tuner.classifier.weight"
    }


def test_masks_are_boolean_and_have_the_shape_of_their_tensor() -> None:
    made = subject(clip_vit(), ["aft"])
    places = lift_plus.layout(made.method.model, ["aft"])
    layer, masks = made.encoder.net.blocks[1].attn.qkv, made.encoder.tuners["aft"]["1"]["qkv"]
    stem = f"tuner.{BLOCK}attn.aft.in_proj.masked_"
    weight, bias = (places[f"{stem}{kind}.mask"].read() for kind in ("weight", "bias"))
    assert weight.dtype == bias.dtype == torch.bool and weight.shape == layer.weight.shape and bias.shape == (192,)
    values = torch.cat([layer.weight[weight], layer.bias[bias]])
    assert torch.equal(values, masks.values), "in ascending order"
    assert torch.equal(places[f"{stem}bias.optimized_params"].read(), layer.bias[bias])


def aft_run(seed: int, ratio: float = 0.05) -> Any:
    made = subject(ViTEncoder(small_net()), [])
    add_tuners(made.encoder, {"aft": AftOptions(ratio=ratio, seed=seed)})
    object.__setattr__(made, "tuners", ["aft"])
    return made


def test_the_masks_of_a_file_have_priority_over_our_draw(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours = trained(aft_run(0))
        export(ours, "lift_plus", tmp_path / "out")
        torch.manual_seed(0)
        again = aft_run(9)
    assert not torch.equal(*(each.encoder.tuners["aft"]["0"]["qkv"].positions for each in (ours, again)))
    file = ForeignCheckpoint(tmp_path / "out" / "checkpoint.pth.tar")
    load_foreign_checkpoint(file, again.method, ["aft"])
    assert torch.equal(*(each.encoder.tuners["aft"]["0"]["qkv"].positions for each in (ours, again)))
    assert torch.equal(logits(again), logits(ours))
    with pytest.raises(UserError, match="attn.aft.in_proj.masked_weight.mask trains .* give the aft_ratio of the file"):
        load_foreign_checkpoint(file, aft_run(0, 0.1).method, ["aft"])


@torch.no_grad()
def test_a_file_of_the_original_gives_the_features_of_the_original(tmp_path: Path) -> None:
    """The specification's AdaptFormer under the original's names, and its features (successors.md §6.2, 6)."""
    shapes = {"norm.weight": (64,), "norm.bias": (64,), "down.weight": (4, 64), "down.bias": (4,)}
    shapes |= {"up.weight": (64, 4), "up.bias": (64,)}
    made = subject(ViTEncoder(fixture_net()), ["adaptformer"], sizes=Sizes(4, 2))
    tuner = {"classifier.weight": torch.eye(len(made.class_names), 64)}
    for block in range(2):
        stem = f"image_encoder.blocks.{block}.adaptformer."
        for number, (name, shape) in enumerate(shapes.items()):
            tuner[stem + name] = filled(shape, 50 + 2 * number + block, 0.1, float(name == "norm.weight"))
        tuner[stem + "scale"] = torch.tensor(0.7 + 0.1 * block)
    load_foreign_checkpoint(saved(tmp_path / "checkpoint.pth.tar", {"tuner": tuner}), made.method, ["adaptformer"])
    feature = made.encoder(filled((1, 3, SIDE, SIDE), 0, 1.0))[0]
    assert torch.allclose(feature[:4], torch.tensor([0.340872, -0.017933, -1.072215, -0.494278]), atol=1e-4)
    assert float(feature.norm()) == pytest.approx(7.950828, abs=1e-4)
    assert torch.equal(made.head.weight, tuner["classifier.weight"])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    export(trained(subject(clip_vit(), ["lora"])), "lift_plus", tmp_path / "out")
    file = ForeignCheckpoint(tmp_path / "out" / "checkpoint.pth.tar")
    other = subject(clip_vit(), ["adapter"])
    before = logits(other)
    with pytest.raises(UserError, match="missing .*unexpected .*its tuner holds lora"):
        load_foreign_checkpoint(file, other.method, ["adapter"])
    assert torch.equal(logits(other), before), "nothing is copied then"
    parts = torch.load(file.path, weights_only=True)
    text = {**parts["tuner"], "text_encoder.ctx": torch.zeros(4, 8)}
    with pytest.raises(UserError, match="unexpected \\(tuner.text_encoder.ctx"):
        load_foreign_checkpoint(
            saved(tmp_path / "text", {"tuner": text}), subject(clip_vit(), ["lora"]).method, ["lora"]
        )


@pytest.mark.parametrize(
    ("host", "names", "why"),
    [
        (clip_vit, "ln_tuning", "LIFT\\+ has no ln_tuning in a transformer"),
        (clip_vit, "mask", "LIFT\\+ has no mask in a transformer"),
        (clip_vit, "ssf_attn", "LIFT\\+ scales and shifts attention and MLP of a block together"),
        (resnet, "bn_tuning", "LIFT\\+ has no bn_tuning on a residual network"),
    ],
)
def test_what_the_original_does_not_have_is_refused(
    host: Callable[[], Any], names: str, why: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=why):
        export(subject(host(), names.split()), "lift_plus", tmp_path / "out")


def test_other_networks_are_refused() -> None:
    made = subject(WholeNetworkEncoder(timm.create_model("test_efficientnet", num_classes=0), 256), [])
    with pytest.raises(UserError, match="LIFT\\+ has ViTs and residual networks only"):
        lift_plus.layout(made.method.model, [])


def test_trained_text_features_are_refused(launch: Cli) -> None:
    command = "-d fake_lt -m tiny_clip_text_peft pretrained none max_steps 1 num_workers 0 output_dir run"
    done = launch(command, "export lift_plus --dry-run")
    assert done.returncode == 2 and "of text features; use export merged" in done.stderr
