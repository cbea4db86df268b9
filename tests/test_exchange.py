"""Exchange with other tools: LIFT's checkpoints both ways, merged weights, peft's adapters, ONNX."""

import functools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import peft
import pytest
import timm
import torch
from conftest import Cli, HasRun
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import load_file
from small import LIFT_TUNERS, SIDE, Sizes, filled, fixture_net, head_with, put_tuners, small_net
from tiers import slow_except
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs import names
from tailtune.configs.errors import UserError
from tailtune.models import ClassificationModel, build_model
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.heads.classifiers import HEADS, CosineClassifier
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.tuners.peft_wrapper import add_peft
from tailtune.trainers.export import EXPORTS, ExportedModel, export, onnx_format
from tailtune.trainers.export.exported_model import FORMULAS, linear_head
from tailtune.trainers.export.library_network import network
from tailtune.trainers.export.loading_code import APPLY_WITHIN
from tailtune.trainers.foreign_checkpoints import lift
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import Method
from tailtune.trainers.methods.base import Objective

CLASSES = 5
SIZES = Sizes(bottleneck=3, prompts=2, mask_ratio=0.1, mask_seed=4)
OF_VIT = [name for name in LIFT_TUNERS if name != "bn_tuning"]
OF_RESNET = ["full_tuning", "bias_tuning", "bn_tuning", "ssf_attn"]
NOT_AFFINE = ("vpt_shallow", "vpt_deep", "adapter", "adaptformer")
MERGED = [name for name in OF_VIT if name not in NOT_AFFINE]


def clip_vit() -> ViTEncoder:
    return ViTEncoder(fixture_net())


def timm_vit() -> ViTEncoder:
    """As the ViTs of ImageNet: no norm before the blocks, exact GELU."""
    torch.manual_seed(3)
    return ViTEncoder(small_net(pre_norm=False, act_layer="gelu"))


def resnet() -> WholeNetworkEncoder:
    torch.manual_seed(3)
    net = ModifiedResNet((1, 1, 1, 1), output_dim=24, heads=4, image_size=64, width=8)
    return WholeNetworkEncoder(net, 24)


def subject(
    host: Any, tuners: Sequence[str], head: str = "CosineClassifier", partial: Any = None, sizes: Sizes = SIZES
) -> ExportedModel:
    """A host with tuners and a head, as built; whatever trains is still at its start."""
    put_tuners(host, tuners, sizes, partial)
    torch.manual_seed(0)
    model = ClassificationModel(
        host, head_with(head, host.feature_dim, CLASSES, 20.0), ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    )
    method = Method(model, Objective(torch.arange(CLASSES) + 1, LOSSES["CE"])).eval()
    side = SIDE if isinstance(host, ViTEncoder) else 64
    return ExportedModel(method, tuners, [f"c{k}" for k in range(CLASSES)], side, arch="RN50-quickgelu")


@torch.no_grad()
def trained(made: ExportedModel) -> ExportedModel:
    """Everything that trains moved away from where it started."""
    for index, each in enumerate(each for each in made.method.parameters() if each.requires_grad):
        each.add_(filled(each.shape, 11 + index, amplitude=0.1))
    for norm in made.encoder.trained_batch_norms:
        norm.running_mean.add_(0.1), norm.running_var.mul_(1.2), norm.num_batches_tracked.add_(7)
    made.method.model.set_precision()
    return made


@torch.no_grad()
def logits(made: ExportedModel) -> Tensor:
    return made.method.predict(made.images(3))


@torch.no_grad()
def features(made: ExportedModel) -> Tensor:
    return made.method.model.features(made.images(3))


def normalised(made: ExportedModel) -> Tensor:
    model = made.method.model
    return (made.images(3).float() / 255 - model.mean) / model.std


def plain(about: dict[str, Any]) -> VisionTransformer:
    """The network that facts.json describes, made with its library alone by the code that stands there."""
    names = {"timm": timm, "open_clip": open_clip, "torch": torch, "functools": functools}
    exec(about["code"], names)
    return names["net"].eval()


def literal(folder: Path) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`prepare` and `predict` by what facts.json says and nothing else: its code, run in the folder itself."""
    facts, names, before = json.loads((folder / "facts.json").read_text()), dict[str, Any](), Path.cwd()
    os.chdir(folder)
    try:
        exec(facts["how_to_prepare"], names)
        exec(facts["how_to_load"], names)
    finally:
        os.chdir(before)
    return names["prepare"], names["predict"]


# --- LIFT ----------------------------------------------------------------------------------------------------------

EACH = [(host, name) for host, names in ((clip_vit, OF_VIT), (timm_vit, OF_VIT), (resnet, OF_RESNET)) for name in names]
TOGETHER = [
    (clip_vit, "lora lora_mlp ssf_attn ssf_mlp ssf_ln mask bias_tuning adaptformer"),
    (resnet, "bias_tuning ssf_attn"),
]
BY_DEFAULT = [(host, names, "CosineClassifier") for host, names in (*EACH, *TOGETHER)]
BY_DEFAULT += [(host, names, "LinearClassifier") for host, names in TOGETHER]


@pytest.mark.parametrize(
    ("host", "names", "head"),
    slow_except(BY_DEFAULT, [*BY_DEFAULT, *((host, names, "LinearClassifier") for host, names in EACH)]),
    ids=lambda each: getattr(each, "__name__", each),
)
def test_a_round_trip_through_lift_gives_equal_logits(
    host: Callable[[], Any], names: str, head: str, tmp_path: Path
) -> None:
    tuners = names.split()
    ours = trained(subject(host(), tuners, head))
    export(ours, "lift", tmp_path / "lift")
    again = subject(host(), tuners, head)
    assert not torch.equal(logits(again), logits(ours))
    report = lift.load(ForeignCheckpoint(tmp_path / "lift" / "checkpoint.pth.tar"), again.method.model, tuners)
    assert torch.equal(logits(again), logits(ours))
    assert "none is left out" in report


def test_blocks_of_openai_clip_have_these_names_in_this_order() -> None:
    """Modules of a block as OpenAI's code registers them; PyTorch then gives the order of `bias_tuned`."""
    mlp = OrderedDict(c_fc=nn.Linear(8, 32), gelu=nn.GELU(), c_proj=nn.Linear(32, 8))
    parts = {
        "attn": nn.MultiheadAttention(8, 2),
        "ln_1": nn.LayerNorm(8),
        "mlp": nn.Sequential(mlp),
        "ln_2": nn.LayerNorm(8),
    }
    block = nn.Sequential(OrderedDict(parts))
    ours = dict(small_net(embed_dim=8).blocks[0].named_parameters())
    shapes = {name: ours[own].shape for name, own in lift.CLIP_TO_TIMM.items()}
    assert list(shapes.items()) == [(name, each.shape) for name, each in block.named_parameters()]


def test_the_layout_of_a_clip_vit() -> None:
    made = subject(clip_vit(), ["full_tuning", "bias_tuning", "ln_tuning", "ssf_attn", "mask"], partial=1)
    places = {name: place.read() for name, place in lift.layout(made.method.model, made.tuners).items()}
    blocks = made.encoder.net.blocks
    wanted = [blocks[0].attn.qkv.bias, blocks[0].attn.proj.bias, blocks[0].norm1.bias, blocks[0].mlp.fc1.bias]
    for k, bias in enumerate(wanted):
        assert torch.equal(places[f"tuner.bias_tuned.{k}"], bias), "biases of all blocks, whatever partial is"
    assert torch.equal(places["tuner.ln_tuned.3.weight"], blocks[1].norm2.weight)
    assert {name.split(".")[2] for name in places if "block_tuned" in name} == {"1"}, "numbered as in the network"
    assert torch.equal(places["tuner.block_tuned.1.mlp.c_proj.weight"], blocks[1].mlp.fc2.weight)
    sites = made.encoder.tuners["ssf_attn"]["1"]
    scales = torch.cat([sites[site].scale for site in "qkv"])
    assert torch.equal(places["tuner.ssf_attn_list.1.attn_in.scale"], scales)
    counts = [len(places[f"tuner.masked_linear_list.1.attn_in.optimized_{part}"]) for part in ("weight", "bias")]
    assert sum(counts) == int(192 * 65 * 0.1)
    assert places["head.weight"].shape == (CLASSES, 64)


def test_values_of_a_mask_stand_row_by_row() -> None:
    made = trained(subject(clip_vit(), ["mask"]))
    mask = made.encoder.tuners["mask"]["0"]["proj"]
    weight, bias = torch.zeros(64, 64), torch.zeros(64)
    weight, bias = mask((weight, bias), weight)
    chosen = torch.zeros(64 * 65, dtype=torch.bool).scatter(0, mask.positions.long(), True).view(64, 65)
    places = lift.layout(made.method.model, ["mask"])
    stem = "tuner.masked_linear_list.0.attn_out.optimized"
    assert torch.equal(places[f"{stem}_weight"].read(), weight[chosen[:, :-1]])
    assert torch.equal(places[f"{stem}_bias"].read(), bias[chosen[:, -1]])


def test_a_fixed_scale_is_written_as_a_learnt_one(tmp_path: Path) -> None:
    ours = trained(subject(clip_vit(), ["adaptformer"], sizes=Sizes(3, 2, adaptformer_scale=0.3)))
    export(ours, "lift", tmp_path / "lift")
    file = ForeignCheckpoint(tmp_path / "lift" / "checkpoint.pth.tar")
    again = subject(clip_vit(), ["adaptformer"])
    lift.load(file, again.method.model, ["adaptformer"])
    assert torch.equal(logits(again), logits(ours))
    fixed = subject(clip_vit(), ["adaptformer"], sizes=Sizes(3, 2, adaptformer_scale=0.5))
    with pytest.raises(UserError, match=r"unexpected \(tuner.adaptformer_list.0.scale"):
        lift.load(file, fixed.method.model, ["adaptformer"])


def saved(path: Path, content: object) -> ForeignCheckpoint:
    torch.save(content, path)
    return ForeignCheckpoint(path)


def test_a_file_that_does_not_fit_is_named_in_full(tmp_path: Path) -> None:
    made = subject(clip_vit(), ["lora"])
    export(trained(made), "lift", tmp_path / "lift")
    file = ForeignCheckpoint(tmp_path / "lift" / "checkpoint.pth.tar")
    for tuners, text in ((["adapter"], "missing .*unexpected .*its tuner holds lora_list"), ([], "unexpected")):
        other = subject(clip_vit(), tuners)
        before = logits(other)
        with pytest.raises(UserError, match=text):
            lift.load(file, other.method.model, tuners)
        assert torch.equal(logits(other), before), "nothing is copied then"
    with pytest.raises(UserError, match="of another shape"):
        lift.load(file, subject(clip_vit(), ["lora"], sizes=Sizes(2, 2)).method.model, ["lora"])
    with pytest.raises(UserError, match="head.bias"):
        lift.load(file, subject(clip_vit(), ["lora"], "LinearClassifier").method.model, ["lora"])
    with pytest.raises(UserError, match="LIFT has ViTs and CLIP's ResNets only"):
        lift.layout(
            subject(WholeNetworkEncoder(timm.create_model("test_resnet", num_classes=0), 96), []).method.model, []
        )


def test_a_file_may_be_of_several_gpus_and_half_precision(tmp_path: Path) -> None:
    ours = trained(subject(clip_vit(), ["bias_tuning"]))
    export(ours, "lift", tmp_path / "lift")
    parts = torch.load(tmp_path / "lift" / "checkpoint.pth.tar", weights_only=True)
    other = {part: {f"module.{name}": each.half() for name, each in own.items()} for part, own in parts.items()}
    again = subject(clip_vit(), ["bias_tuning"])
    lift.load(saved(tmp_path / "half", other), again.method.model, ["bias_tuning"])
    assert (logits(again) - logits(ours)).abs().max() < 0.1


def test_a_file_that_could_run_code_is_not_opened(tmp_path: Path) -> None:
    made = subject(clip_vit(), [])
    holds = "holds pathlib.*run code"
    for content, text in (({"tuner": Path("x")}, holds), ({"tuner": {}}, "no checkpoint"), ([1], "no checkpoint")):
        with pytest.raises(UserError, match=text):
            lift.load(saved(tmp_path / "file", content), made.method.model, [])
    whole = saved(tmp_path / "whole", {"tuner": {}, "head": {"weight": torch.zeros(99)}}).path.read_bytes()
    for part in (whole[:600], b"", b"text\n"):
        (tmp_path / "file").write_bytes(part)
        with pytest.raises(UserError, match="is damaged.*copy it again"):
            lift.load(ForeignCheckpoint(tmp_path / "file"), made.method.model, [])


def test_shallow_prompts_of_a_later_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="first block only"):
        export(subject(clip_vit(), ["vpt_shallow"], partial=1), "lift", tmp_path / "lift")


# --- merged --------------------------------------------------------------------------------------------------------

VITS = [(host, name) for host in (clip_vit, timm_vit) for name in (*MERGED, "")]
STACKED = [(clip_vit, " ".join(name for name in MERGED if name != "full_tuning"))]


@pytest.mark.parametrize("host, names", [*VITS, *STACKED], ids=lambda each: getattr(each, "__name__", each))
def test_a_merged_vit_is_a_plain_network_of_timm(host: Callable[[], Any], names: str, tmp_path: Path) -> None:
    made = trained(subject(host(), names.split(), "LinearClassifier"))
    export(made, "merged", tmp_path)
    facts = json.loads((tmp_path / "facts.json").read_text())
    net = plain(facts["network"])
    net.load_state_dict(load_file(tmp_path / "model.safetensors"))
    wanted = logits(made)
    assert facts["files"] == ["infer.py", "model.safetensors"] and wanted.abs().max() > 0.1
    with torch.no_grad():
        assert (net(normalised(made)) - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp_min(1)
        assert (
            net.forward_head(net.forward_features(normalised(made)), pre_logits=True) - features(made)
        ).abs().max() < 1e-5


@pytest.mark.parametrize("name", [name for name in HEADS if name != "TextClassifier"])
def test_heads_beside_and_within(name: str, tmp_path: Path) -> None:
    """The formula in facts.json says how a head is applied; a linear one is part of the network."""
    made = trained(subject(clip_vit(), ["lora"], name))
    export(made, "merged", tmp_path)
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["head"] == {
        "type": name,
        **{**asdict(HEADS[name].Options()), **({"scale": 20.0} if name in ("CosineClassifier", "TipAdapter") else {})},
        "apply": FORMULAS[HEADS[name]] if linear_head(made.head) is None else APPLY_WITHIN,
    }
    _, predict = literal(tmp_path)
    assert (predict(normalised(made)) - logits(made)).abs().max() < 1e-4


@pytest.mark.parametrize("names", [*OF_RESNET, "bias_tuning bn_tuning ssf_attn"])
def test_a_merged_resnet_is_a_tower_of_open_clip(names: str, tmp_path: Path) -> None:
    made = trained(subject(resnet(), names.split()))
    export(made, "merged", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("visual.") for name in state)
    tower = ModifiedResNet((1, 1, 1, 1), output_dim=24, heads=4, image_size=64, width=8).eval()
    tower.load_state_dict({name.removeprefix("visual."): each for name, each in state.items()})
    with torch.no_grad():
        assert (tower(normalised(made)) - features(made)).abs().max() < 1e-5


def test_a_zero_shot_model_keeps_its_projection(tmp_path: Path) -> None:
    host = ViTEncoder(fixture_net(), filled((7, 64), 5))
    made = subject(host, [])
    export(made, "merged", tmp_path)
    _, predict = literal(tmp_path)
    assert (predict(normalised(made)) - logits(made)).abs().max() < 1e-4


# --- peft ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names, partial", [("lora", None), ("lora_mlp", 1), ("lora lora_mlp", None)])
@pytest.mark.parametrize("host", [clip_vit, timm_vit])
def test_stock_peft_loads_the_adapter(host: Callable[[], Any], names: str, partial: Any, tmp_path: Path) -> None:
    made = trained(subject(host(), names.split(), partial=partial))
    export(made, "peft", tmp_path)
    net = host().net
    with torch.no_grad():
        before = net(normalised(made))
        loaded = peft.PeftModel.from_pretrained(net, str(tmp_path)).eval()
        wanted, found = features(made), loaded(normalised(made))
    assert (found - wanted).abs().max() < 1e-5 < (before - wanted).abs().max()
    assert torch.equal(load_file(tmp_path / "head.safetensors")["weight"], made.head.weight)


def adapted(tuners: Sequence[str] = ()) -> ExportedModel:
    host = clip_vit()
    put_tuners(host, tuners, SIZES)
    wrapper = add_peft(host, "LoRA", {"r": 2, "target_modules": ["qkv", "fc2"]}, None, SIDE, 0)
    made = subject(clip_vit(), [])
    model = ClassificationModel(host, made.head, ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), peft=wrapper)
    return trained(ExportedModel(Method(model, made.method.objective).eval(), tuners, made.class_names, SIDE))


def test_a_tuner_of_peft_goes_there_and_merges(tmp_path: Path) -> None:
    made = adapted()
    export(made, "peft", tmp_path / "peft")
    export(made, "merged", tmp_path / "merged")
    merged = plain(json.loads((tmp_path / "merged" / "facts.json").read_text())["network"])
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(fixture_net(), str(tmp_path / "peft")).eval()
    with torch.no_grad():
        for net in (loaded, merged):
            assert (net(normalised(made)) - features(made)).abs().max() < 1e-5


def test_a_tuner_of_peft_merges_beside_ours(tmp_path: Path) -> None:
    made = adapted(["lora", "ssf_ln"])
    export(made, "merged", tmp_path / "merged")
    merged = plain(json.loads((tmp_path / "merged" / "facts.json").read_text())["network"])
    merged.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    with torch.no_grad():
        assert (merged(normalised(made)) - features(made)).abs().max() < 1e-5
    with pytest.raises(UserError, match="no place for ssf_ln"):
        export(made, "peft", tmp_path / "peft")


# --- ONNX ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host, names",
    slow_except(  # test_literal.py has a CLIP's ViT, test_experts.py one of ImageNet
        [], [(timm_vit, "vpt_deep adaptformer mask ssf_attn"), (resnet, "ssf_attn")]
    ),
    ids=lambda each: getattr(each, "__name__", each),
)
def test_onnx_agrees_with_the_model(host: Callable[[], Any], names: str, tmp_path: Path) -> None:
    import onnxruntime

    made = trained(subject(host(), names.split()))
    export(made, "onnx", tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], {"image": made.images(5).numpy()})[0])
    with torch.no_grad():
        wanted = made.method.predict(made.images(5))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert 0 <= facts["largest_difference"] < 1e-4 and facts["opset"] == onnx_format.OPSET


class Other(nn.Module):
    """Another function of the images than any model here."""

    def forward(self, image: Tensor) -> Tensor:
        return image.float().mean((2, 3)).repeat(1, 2)[:, :CLASSES] + 1000


def test_onnx_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.onnx.export

    def wrong(model: nn.Module, images: Any, path: Path, **_: Any) -> None:
        real(Other(), images, path, input_names=["image"], dynamic_axes={"image": [0]}, dynamo=False)

    monkeypatch.setattr("torch.onnx.export", wrong)
    with pytest.raises(UserError, match="logits differ by"):
        export(trained(subject(clip_vit(), [])), "onnx", tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


# --- what is refused, and how plain networks are called ------------------------------------------------------------

REFUSED = [("merged", name, "no place for") for name in NOT_AFFINE]
REFUSED += [("peft", name, "no place for") for name in OF_VIT if name not in ("lora", "lora_mlp")] + [
    ("peft", "", "no adapter")
]


@pytest.mark.parametrize("name, tuner, text", REFUSED)
def test_what_a_format_cannot_hold_is_refused(name: str, tuner: str, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        export(subject(clip_vit(), tuner.split()), name, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_every_head_has_a_formula() -> None:
    assert FORMULAS.keys() == set(HEADS.values()) - {TextClassifier}, (
        "its texts become the weight of a CosineClassifier"
    )


@pytest.mark.parametrize(
    "backbone, resolution, name",
    [
        ("CLIP-ViT-B/16", 224, "vit_base_patch16_clip_quickgelu_224"),
        pytest.param("CLIP-ViT-L/14@336px", 336, "vit_large_patch14_clip_quickgelu_224", marks=pytest.mark.slow),
        ("open_clip:ViT-B-32", 224, "vit_base_patch32_clip_224"),
        ("IN21K-ViT-B/16@384px", 384, "vit_base_patch16_384"),
        ("CLIP-RN50", 224, "RN50-quickgelu"),
        ("timm:resnet18", 160, "resnet18"),
        ("timm:swin_tiny_patch4_window7_224", 448, "swin_tiny_patch4_window7_224"),
    ],
)
def test_the_libraries_own_names(backbone: str, resolution: int, name: str, config: Callable[..., CfgNode]) -> None:
    pairs = ("pretrained", "none", "init_head", "none", "backbone", backbone, "resolution", resolution)
    cfg = config("fake_lt", "tiny_clip", *pairs)
    with torch.device("meta"):
        model = build_model(cfg, ["a", "b"])
        made = ExportedModel(
            Method(model, Objective(torch.ones(2), LOSSES["CE"])), [], ["a", "b"], resolution, arch=name
        )
        about = network(made)
    with torch.device("cpu" if "open_clip" in about["create"] else "meta"):  # which insists on it
        again = plain(about)
    assert about["kwargs"]["model_name"] == name and about["kwargs"].get("img_size", resolution) == resolution
    shapes = ({key: each.shape for key, each in net.state_dict().items()} for net in (again, model.encoder.net))
    assert next(shapes) == next(shapes)


# --- the command ---------------------------------------------------------------------------------------------------

TINY = "-d fake_lt -m tiny_clip pretrained none max_steps 1 max_test_images 20 num_workers 0 output_dir run lora True"
RUN = Path("output/run")


def test_the_command_trains_exports_and_does_neither_twice(launch: Cli) -> None:
    first = launch(TINY, "export lift")
    assert (
        first.returncode == 0
        and "trained 1 steps" in first.stdout
        and "exported to output/run/export/lift" in first.stdout
    )
    second = launch(TINY, "export merged")
    assert second.returncode == 0 and "finished before" in second.stdout and "trained" not in second.stdout
    assert sorted(each.name for each in (RUN / "export").iterdir()) == ["lift", "merged"]
    assert not list(RUN.glob("tests/*"))
    facts = json.loads((RUN / "export" / "merged" / "facts.json").read_text())
    assert facts["class_names"][0] == "class 0" and facts["tuners"] == ["lora"] and facts["of"] == "output/run"
    assert launch(TINY, "resume False").returncode == 0 and not (RUN / "export").exists(), "of another checkpoint"


def test_a_run_is_exported_by_its_name_alone(launch: Cli, has_run: HasRun) -> None:
    refused = launch("export run merged")
    assert refused.returncode == 2 and "export: run holds no checkpoint" in refused.stderr
    has_run(TINY)
    for number, (run, words) in enumerate((("run", "merged"), (RUN, "peft"), (RUN.absolute(), "lift"))):
        done = launch("export", run, words)
        assert done.returncode == 0 and "exported to output/run/export" in done.stdout and "trained" not in done.stdout
        assert len(list((RUN / "export").iterdir())) == number + 1
    assert json.loads((RUN / "export" / "merged" / "facts.json").read_text())["of"] == "output/run"
    assert "did you mean 'onnx'?" in launch("export run onx").stderr
    assert "lr belongs to the training" in launch("export run onnx lr 1").stderr
    (RUN / "metrics.json").unlink()
    assert "output/run is not finished" in launch("export run onnx").stderr


def test_an_export_by_name_evaluates_its_own_options(launch: Cli, has_run: HasRun) -> None:
    """Its result is in a folder of its own, and a result of other options is not taken for it."""
    has_run(TINY)
    assert launch("export run merged crop_margin 8").returncode == 0
    assert launch("export run merged max_test_images 10").returncode == 0
    wanted = {"crop_margin_8": (8, 20), "max_test_images_10": (None, 10)}
    assert {each.name for each in (RUN / "tests").iterdir()} == wanted.keys()
    for name, options in wanted.items():
        about = json.loads((RUN / "tests" / name / "metrics.json").read_text())["evaluation"]
        assert (about["crop_margin"], about["max_test_images"]) == options
    assert "finished before" in launch("export run merged crop_margin 8").stdout
    (RUN / "tests" / "max_test_images_10").rename(RUN / "tests" / "max_test_images_9")
    done = launch(TINY.replace("max_test_images 20", "max_test_images 9"), "test_only True")
    assert done.returncode == 0 and "finished before" not in done.stdout
    assert "tte_mode tencrop does nothing without tte" in launch("export run merged tte_mode tencrop").stderr


def test_a_run_is_exported_without_its_data_config(launch: Cli) -> None:
    """The command in the facts names one that exists, and the options in which it differs."""
    Path("mine.yaml").write_text("dataset: Fake\nnum_classes: 7\nimb_factor: 0.1\n")
    done = launch("-d mine.yaml", TINY.split(maxsplit=2)[2])
    assert done.returncode == 0, done.stderr
    Path("mine.yaml").unlink()
    done = launch("export run lift")
    assert done.returncode == 0, done.stderr
    words = json.loads((RUN / "export" / "lift" / "facts.json").read_text())["command"]
    assert words[0] == "-d" and words[1] in names("data")
    assert (words[words.index("dataset") + 1], words[words.index("num_classes") + 1]) == ("Fake", "7")


@pytest.mark.slow
def test_an_export_by_name_takes_options(launch: Cli, has_run: HasRun) -> None:
    has_run(TINY)
    done = launch("export run onnx export_fp16=True")
    assert done.returncode == 0 and "exported to output/run/export" in done.stdout


def test_a_format_that_does_not_fit_is_refused_before_training(launch: Cli) -> None:
    for more in ("--dry-run", ""):
        found = launch(TINY, "adapter True export merged", more)
        assert found.returncode == 2 and "no place for adapter" in found.stderr
    assert not RUN.exists()


def nll(path: Path) -> float:
    return json.loads((path / "metrics.json").read_text())["test"]["nll"]


def test_a_checkpoint_of_lift_is_evaluated(launch: Cli, has_run: HasRun) -> None:
    """By its folder or its name; the result is that of the run it was exported from, its identity the file's."""
    has_run(TINY, "export lift")
    folder = RUN / "export" / "lift"
    other = TINY.replace("output_dir run", "output_dir other") + " test_only True model_dir"
    for path in (folder, folder / "checkpoint.pth.tar"):
        found = launch(other, path)
        assert found.returncode == 0 and "lora_list (24), of the head 1; none is left out" in found.stdout
    results = list(Path("output/other/tests").iterdir())
    assert len(results) == 2 and all(nll(each) == nll(RUN) for each in results)
    about = json.loads((results[0] / "metrics.json").read_text())["evaluation"]
    assert "-lift-" in about["checkpoint"] and about["of"].endswith("checkpoint.pth.tar")
    assert "finished before" in launch(other, folder).stdout
    assert "exported to output/other/tests" in launch(other, folder, "export merged").stdout
    failed = launch(other.replace("lora", "adapter"), folder)
    assert failed.returncode == 2 and "lora_list" in failed.stderr


def test_a_folder_that_lift_has_trained_into_is_tested_in_place(launch: Cli, has_run: HasRun) -> None:
    """LIFT's output folders have the names that ours have."""
    has_run(TINY, "export lift")
    folder = Path("output/fake_lt_tiny_clip_lora_True_max_steps_1_pretrained_None")
    folder.mkdir()
    (RUN / "export" / "lift" / "checkpoint.pth.tar").rename(folder / "checkpoint.pth.tar")
    command = TINY.replace("output_dir run", "test_only True")
    assert "none is left out" in launch(command).stdout
    assert nll(next(folder.glob("tests/*"))) == nll(RUN)


def test_a_zero_shot_model_is_exported(launch: Cli) -> None:
    command = "-d fake_lt -m zstiny_clip max_test_images 20 num_workers 0 output_dir run"
    assert "head.safetensors" in launch(command, "export merged").stdout
    state = load_file(RUN / "export" / "merged" / "head.safetensors")
    assert state["projection"].shape == (64, 128) and state["weight"].norm(dim=-1).sub(1).abs().max() < 1e-5
    assert "no zero-shot model" in launch(command, "export lift").stderr


def test_the_formats_are_those_of_the_option() -> None:
    from tailtune.trainers.option_schema import declared

    assert set(declared()["export"].choices) == EXPORTS.keys() and CosineClassifier in FORMULAS
