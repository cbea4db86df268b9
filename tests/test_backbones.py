"""Every backbone: its size, its features against its library's, what may train in it, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs import load_configs
from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.models import BACKBONES, build_model, find_backbone
from tailtune.models.backbones.encoder import trained_batch_norms
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone, tokenize
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.heads.head_init import encode_texts
from tailtune.trainers.config_checks import check
from tailtune.trainers.distributed import share_statistics
from tailtune.trainers.dry_run import dry_run
from tailtune.trainers.methods import build_method
from tailtune.trainers.micro_batch_probe import largest_micro_batch
from tailtune.trainers.option_schema import declared
from tailtune.trainers.processes.interrupts import Agreement, Interrupted
from tailtune.trainers.run import run
from tailtune.trainers.storage.checkpoint import fingerprint, load_checkpoint, save_checkpoint, trained_state

Config = Callable[..., CfgNode]
CONVNET = "timm:test_resnet.r160_in1k"
NAMES = [f"class {k}" for k in range(10)]

# --- sizes (LIFT specification §13.1) ---------------------------------------------------------------------

VISUAL = {
    "CLIP-RN50": (38_316_896, 1024, 0),
    "CLIP-RN101": (56_259_936, 512, 0),
    "CLIP-ViT-B/16": (86_192_640, 768, 768 * 512),
    "CLIP-ViT-L/14": (303_966_208, 1024, 1024 * 768),
    "CLIP-ViT-L/14@336px": (304_293_888, 1024, 1024 * 768),
    "IN21K-ViT-B/16": (87_184_524 - 617_868 - 768_000, 768, 0),
    "IN21K-ViT-L/16": (305_186_200 - 860_568 - 1_024_000, 1024, 0),
}
"""Backbone → (visual parameters, width of the feature, those of the projection, which only zero-shot uses)."""


@pytest.mark.parametrize("name", VISUAL)
def test_sizes(name: str, config: Config) -> None:
    total, width, projection = VISUAL[name]
    model = check(config("imagenet_lt", "clip_vit_b16", "init_head", "none", "backbone", name))
    assert model.counts()["total"] == total - projection + 1000 * width
    assert model.counts()["tuner"] == 0 and model.encoder.feature_dim == width
    if name.startswith("CLIP"):
        zero_shot = check(config("imagenet_lt", "zsclip_vit_b16", "backbone", name))
        assert sum(each.numel() for each in zero_shot.encoder.parameters()) == total


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("CLIP-RN50", 102_007_137),
        ("CLIP-RN101", 119_688_033),
        ("CLIP-ViT-B/16", 149_620_737),
        ("CLIP-ViT-L/14", 427_616_513),
        ("CLIP-ViT-L/14@336px", 427_944_193),
    ],
)
def test_sizes_with_the_text_tower(name: str, total: int) -> None:
    """What LIFT prints before it adds tuner and head; here the text encoder goes once the head is made."""
    spec = BACKBONES[name]
    assert isinstance(spec, OpenClipBackbone)
    with torch.device("meta"):
        clip = open_clip.CLIP(**open_clip.get_model_config(spec.arch))
    assert sum(each.numel() for each in clip.parameters()) == total


@pytest.mark.parametrize(
    ("data", "backbone", "words", "tuner", "head"),
    [
        ("imagenet_lt", "CLIP-RN50", "ssf_attn True", 2_048, 1_024_000),
        ("imagenet_lt", "CLIP-RN50", "bias_tuning True", 33_792, 1_024_000),
        ("places_lt", "CLIP-RN50", "ssf_attn True bias_tuning True", 35_840, 373_760),
        ("imagenet_lt", "CLIP-RN50", "bn_tuning True", 53_248, 1_024_000),
        ("imagenet_lt", "CLIP-RN50", "full_tuning True", 38_316_896, 1_024_000),
        ("imagenet_lt", "CLIP-RN50", "full_tuning True partial 0", 0, 1_024_000),
        ("imagenet_lt", "CLIP-RN101", "ssf_attn True", 1_024, 512_000),
        ("imagenet_lt", "CLIP-RN101", "bias_tuning True", 59_392, 512_000),
        ("places_lt", "CLIP-RN101", "ssf_attn True bias_tuning True", 60_416, 186_880),
        ("imagenet_lt", "CLIP-RN101", "bn_tuning True", 105_472, 512_000),
        ("imagenet_lt", "CLIP-RN101", "full_tuning True", 56_259_936, 512_000),
        ("places_lt", "CLIP-ViT-L/14", "adaptformer True", 270_456, 373_760),
        ("imagenet_lt", "CLIP-ViT-L/14", "adaptformer True", 860_568, 1_024_000),
        ("inat2018", "CLIP-ViT-L/14@336px", "adaptformer True", 6_368_280, 8_337_408),
        ("cifar100_ir100", "IN21K-ViT-B/16@384px", "adaptformer True", 101_436, 76_800),
        ("imagenet_lt", "IN21K-ViT-B/16", "bias_tuning True", 101_376, 768_000),
        ("imagenet_lt", "IN21K-ViT-B/16", "full_tuning True", 85_054_464, 768_000),
        ("cifar100_ir100", "IN21K-ViT-L/16", "adaptformer True", 172_104, 102_400),
        ("imagenet_lt", "IN21K-ViT-L/16", "bias_tuning True", 270_336, 1_024_000),
        ("imagenet_lt", "IN21K-ViT-L/16", "full_tuning True", 302_309_376, 1_024_000),
    ],
)
def test_what_trains(config: Config, data: str, backbone: str, words: str, tuner: int, head: int) -> None:
    cfg = config(data, "clip_vit_b16", "init_head", "none", "backbone", backbone, *words.split())
    counts = check(cfg).counts()
    assert (counts["tuner"], counts["head"], counts["trainable"]) == (tuner, head, tuner + head)


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("CLIP-RN50", (224, "bilinear", 24)),
        ("CLIP-ViT-B/32", (224, "bilinear", 48)),
        ("CLIP-ViT-L/14", (224, "bilinear", 21)),
        ("CLIP-ViT-L/14@336px", (336, "bilinear", 21)),
        ("IN21K-ViT-B/16@384px", (384, "bilinear", 24)),
        ("timm:vit_base_patch16_384.augreg_in21k_ft_in1k", (384, "bicubic", 24)),
        ("timm:test_convnext.r160_in1k", (160, "bicubic", 24)),
        ("open_clip:RN50x4-quickgelu", (288, "bicubic", 24)),
        ("open_clip:ViT-SO400M-14-SigLIP-384", (384, "bicubic", 21)),
        ("open_clip:MobileCLIP-S1", (256, "bilinear", 24)),
        ("open_clip:ViTamin-S", (224, "bicubic", 24)),
    ],
)
def test_images_that_a_backbone_takes(name: str, inputs: tuple[int, str, int]) -> None:
    """LIFT resizes bilinearly for its backbones; others bring what they were trained with."""
    found = find_backbone(name).inputs("none" if name.startswith("open_clip") else "default")
    assert (found.resolution, found.interpolation, found.expand) == inputs


def test_statistics_of_a_backbone() -> None:
    def stats(name: str, pretrained: str | None = "default") -> Any:
        spec = find_backbone(name)
        with torch.device("meta"):
            return spec.build(pretrained, spec.inputs(pretrained).resolution, 0, False).pixel_stats

    assert stats("CLIP-RN50") == stats("CLIP-ViT-B/32") == stats("open_clip:ViT-B-32", "laion2b_s34b_b79k")
    assert stats("IN21K-ViT-B/16") == ((0.5,) * 3,) * 2 == stats("open_clip:ViT-B-16-SigLIP2")
    assert stats("timm:test_efficientnet")[0] == (0.485, 0.456, 0.406)
    assert stats("open_clip:MobileCLIP-S1") == ((0.0,) * 3, (1.0,) * 3), "of the tag"
    assert stats("open_clip:MobileCLIP-S1", None) == ((0.0,) * 3, (1.0,) * 3), "of the architecture's first tag"


# --- features are the library's ------------------------------------------------------------------------------------

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
# `map` is SigLIP: a timm ViT that ends in attention pooling. A name with siglip in it has a tokenizer of its own.
TOWERS: dict[str, dict[str, Any]] = {
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 64}},
    "map": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "custom_text": True,
        "init_logit_bias": -10,
        "embed_dim": 64,
    },
    "convnext": {
        "vision_cfg": {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
    },
    "clipa": {
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
        | {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    },
}
HOSTS = {
    "resnet": WholeNetworkEncoder,
    "map": ViTEncoder,
    "convnext": WholeNetworkEncoder,
    "clipa": WholeNetworkEncoder,
}


def small(kind: str, folder: Path) -> tuple[OpenClipBackbone, Any, str]:
    """A small CLIP, open_clip's model of it with weights at random, and the file of these."""
    config = {"embed_dim": 24, "text_cfg": TEXT, **TOWERS[kind]}
    file = folder / f"tailtune-test-{kind}.json"
    file.write_text(json.dumps(config))
    spec = OpenClipBackbone(file.stem, config=file)
    own_text = config.pop("custom_text", False)
    with seeded(3):
        clip = (open_clip.CustomTextCLIP if own_text else open_clip.CLIP)(**config).eval().requires_grad_(False)
        for each in clip.state_dict().values():
            if each.is_floating_point() and each.ndim:
                each.add_(0.05 * torch.randn_like(each).abs())
    save_file({name: each.contiguous() for name, each in clip.state_dict().items()}, folder / "w.safetensors")
    return spec, clip, str(folder / "w.safetensors")


def noise(side: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def close(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).abs().max() <= 1e-5 * wanted.abs().max())


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_features_are_open_clips(kind: str, tmp_path: Path) -> None:
    """Of towers that end in the embedding: the same with and without zero-shot, and no projection for the text."""
    spec, clip, path = small(kind, tmp_path)
    side = spec.inputs().resolution
    wanted = clip.encode_image(noise(side))
    for project in (False, True):
        built = spec.build(path, side, 0, project)
        built.encoder.set_precision()
        assert type(built.encoder) is HOSTS[kind] and not built.random_base
        assert close(built.encoder(noise(side)), wanted)
        assert built.text_encoder is not None and built.text_encoder.projection is None
    assert built.embed_dim == built.encoder.feature_dim == wanted.shape[1]
    with torch.device("meta"):
        outline = spec.build(path, side, 0, False)
    shapes = {name: each.shape for name, each in built.encoder.state_dict().items()}
    assert {name: each.shape for name, each in outline.encoder.state_dict().items()} == shapes


@pytest.mark.parametrize("kind", ["resnet", "map"])
@torch.no_grad()
def test_zero_shot(kind: str, tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """logit_scale · cos in the shared space; SigLIP's bias is one number for all classes and is left out."""
    spec, clip, path = small(kind, tmp_path)
    monkeypatch.setitem(BACKBONES, "Small", spec)
    words = ("backbone", "Small", "pretrained", path, "resolution", "none", "zero_shot", True)
    cfg = config("fake_lt", "tiny_clip", *words)
    model = build_model(cfg, NAMES)
    model.init_head(SimpleNamespace(device=torch.device("cpu"), seed=0, encode_texts=encode_texts))  # type: ignore[arg-type]
    tokens = open_clip.get_tokenizer("ViT-B-16")([f"a photo of a {name}." for name in NAMES])[:, :16]
    wanted, _ = clip.get_logits(noise(cfg.resolution), tokens)
    wanted = wanted if clip.logit_bias is None else wanted - clip.logit_bias
    assert close(model(noise(cfg.resolution))[:, 0], wanted)


@torch.no_grad()
def test_positions_of_a_whole_tower_are_resampled(tmp_path: Path) -> None:
    spec, _, path = small("clipa", tmp_path)
    assert spec.build(path, 48, 0, False).encoder(noise(48)).isfinite().all()
    trunk, _, path = small("map", tmp_path)
    assert trunk.build(path, 96, 0, False).encoder(noise(96)).isfinite().all()


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_convnext2", "test_nfnet", "test_vit_relpos"]
)
@torch.no_grad()
def test_features_are_timms(name: str, tmp_path: Path) -> None:
    """What the classifier is given; a local file in timm's layout is read strictly, its classifier left out."""
    with seeded(1):
        net = timm.create_model(name).eval()
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    side = find_backbone(f"timm:{name}").inputs().resolution
    built = find_backbone(f"timm:{name}").build(str(tmp_path / "w.safetensors"), side, 0, False)
    assert isinstance(built.encoder, WholeNetworkEncoder) and built.text_encoder is None and built.embed_dim is None
    assert close(built.encoder(noise(side)), net.forward_head(net.forward_features(noise(side)), pre_logits=True))
    state = {name: each for name, each in net.state_dict().items() if "bias" not in name}
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"less\.safetensors' is not of .* missing"):
        find_backbone(f"timm:{name}").build(str(tmp_path / "less.safetensors"), side, 0, False)


def test_weights_are_drawn_from_the_seed() -> None:
    def weight(seed: int) -> Tensor:
        return find_backbone(CONVNET).build(None, 160, seed, False).encoder.net.conv1[0].weight

    assert torch.equal(weight(0), weight(0)) and not torch.equal(weight(0), weight(1))


# --- the plain host ------------------------------------------------------------------------------------------------


def plain(config: Config, *words: object) -> Any:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "init_head", "none", "backbone", CONVNET, *words)
    model = build_model(cfg, NAMES)
    info = SimpleNamespace(class_counts=torch.arange(1, 11), num_classes=10)
    return build_method(cfg, model, info)  # type: ignore[arg-type]


def batch(count: int = 6) -> dict[str, Tensor]:
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    return {"image": images, "label": torch.arange(count), "weight": torch.ones(count)}


@pytest.mark.parametrize("compute", [torch.float64, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_precision_is_undone_exactly(compute: torch.dtype) -> None:
    host = find_backbone(CONVNET).build(None, 160, 0, False).encoder
    host.set_precision()
    before, features = {name: each.clone() for name, each in host.state_dict().items()}, host(noise(32))
    host.set_precision(compute)
    other = host(noise(32))
    assert other.dtype == (torch.float64 if compute == torch.float64 else torch.float32)
    assert 0 < (other - features).abs().max() < 0.05 * features.abs().max()
    host.set_precision()
    assert torch.equal(host(noise(32)), features)
    after = host.state_dict()
    assert all(torch.equal(each, after[name]) and each.dtype == after[name].dtype for name, each in before.items())


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ("full_tuning True", {"conv", "bn", "fc", "downsample"}),
        ("bias_tuning True", {"bn", "downsample"}),
        ("bn_tuning True", {"bn", "downsample"}),
        ("ssf_attn True", set()),
    ],
)
@pytest.mark.parametrize("partial", [None, 1])
def test_what_trains_in_a_convnet(words: str, kinds: set[str], partial: int | None, config: Config) -> None:
    """Everything, stem included, or what lies in the stages of `partial`."""
    method = plain(config, *words.split(), "partial", partial)
    trains = {name for name, each in method.model.encoder.net.named_parameters() if each.requires_grad}
    assert bool(trains) == bool(kinds)
    assert all(name.startswith("layer4.") for name in trains) or partial is None
    assert not kinds or any(name.startswith("conv1.") for name in trains) == (partial is None)
    own = [name for name, _ in method.model.encoder.tuners.named_parameters()]
    assert own == (["ssf_attn.scale", "ssf_attn.shift"] if "ssf" in words else [])
    norms = [name for name, each in method.model.encoder.net.named_modules() if isinstance(each, nn.BatchNorm2d)]
    count = len([each for each in norms if partial is None or each.startswith("layer4.")])
    assert len(trained_batch_norms(method)) == (count if "bn_tuning" in words else 0)


def running(method: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in method.named_buffers() if "running" in name or "batches" in name}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(each, b[name]) for name, each in a.items())


def test_running_statistics_change_in_training_only(config: Config, tmp_path: Path) -> None:
    """They are part of the checkpoint, and only where they train."""
    method, twin = plain(config, "bn_tuning", True), plain(config, "bn_tuning", True)
    assert method.batch_coupled and same(running(method), running(twin))
    method.eval()
    method(batch())
    assert same(running(method), running(twin))
    method.train()
    method(batch())
    assert not any(torch.equal(each, running(twin)[name]) for name, each in running(method).items())

    base = fingerprint(twin.model)
    save_checkpoint(tmp_path / "checkpoint", method, {"base": base, "class_names": NAMES})
    load_checkpoint(tmp_path / "checkpoint", twin, NAMES, base)
    assert same(running(method), running(twin))
    assert torch.equal(method.eval()(batch()).logits, twin.eval()(batch()).logits)
    with pytest.raises(UserError, match="another tuner.*unexpected"):
        load_checkpoint(tmp_path / "checkpoint", plain(config, "bias_tuning", True), NAMES, base)

    frozen = plain(config, "full_tuning", True).train()
    before = running(frozen)
    frozen(batch())
    assert (
        same(running(frozen), before)
        and not frozen.batch_coupled
        and not running(frozen).keys() & trained_state(frozen)
    )


def test_one_value_a_channel_is_refused_with_the_remedy(config: Config) -> None:
    """The last batch of an epoch may be one image."""
    method = plain(config, "bn_tuning", True).train()
    with pytest.raises(UserError, match="bn_tuning cannot normalise one image"):
        method(batch(1))
    assert method.eval()(batch(1)).loss_sum.isfinite()


def test_a_trial_batch_leaves_no_trace(config: Config) -> None:
    """`micro_batch_size auto` sends blank images through the network in training."""
    method = plain(config, "bn_tuning", True)
    before = running(method)
    accelerator: Any = SimpleNamespace(device=torch.device("cpu"), gather=lambda each: each)
    assert largest_micro_batch(method, accelerator, 4, 32, budget=2**40) == 4
    assert same(running(method), before)


def test_processes_agree_on_statistics(config: Config) -> None:
    method = plain(config, "bn_tuning", True)
    one: Any = SimpleNamespace(num_processes=1)
    two: Any = SimpleNamespace(num_processes=2, reduce=lambda each, how: each + 1 if how == "mean" else None)
    before = running(method)
    share_statistics(one, method)
    assert same(running(method), before)
    share_statistics(two, method)
    for name, each in running(method).items():
        assert torch.equal(each, before[name] + (each.is_floating_point()))


def test_a_run_with_batch_norms_resumes_bitwise(config: Config, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("bn_tuning", True, "resolution", 32, "num_epochs", 2, "batch_size", 64, "num_workers", 0)
    words = ("pretrained", "none", "init_head", "none", "backbone", CONVNET, "max_test_images", 10, *words)

    def trained(name: str) -> dict[str, Tensor]:
        cfg = load_configs("fake_lt", "tiny_clip", [*map(str, words), "output_dir", name], declared())[-1]
        return load_file(run(cfg) / "checkpoint" / "tensors.safetensors")

    whole = trained("whole")
    with monkeypatch.context() as patch:
        patch.setattr(Agreement, "stops", lambda *_: True)  # after the first step
        with pytest.raises(Interrupted):
            trained("cut")
    assert same(trained("cut"), whole)
    assert sum("running_var" in name for name in whole) == len(trained_batch_norms(plain(config, "bn_tuning", True)))


# --- names and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("backbone CLIP-RN5", ["did you mean 'CLIP-RN50'", "TinyCLIP", "open_clip:NAME", "timm:NAME"]),
        ("backbone mobilenetv2_100", ["did you mean 'timm:mobilenetv2_100'"]),
        ("backbone ViT-B-16-SigLIP2", ["did you mean 'open_clip:ViT-B-16-SigLIP2'"]),
        ("backbone timm:resnet5", ["timm model 'resnet5'", "'resnet50'", "in all"]),
        ("backbone timm:resnet50.a1_in2k", ["tag of timm's resnet50", "'a1_in1k'"]),
        ("backbone open_clip:ViT-B-17", ["open_clip model 'ViT-B-17'", "'ViT-B-16'"]),
        ("backbone open_clip:ViT-B-32", ["lists 22 weights of ViT-B-32", "laion2b_s34b_b79k"]),
        ("backbone open_clip:ViT-B-32 pretrained opemai", ["pretrained tag of ViT-B-32", "'openai'"]),
        ("backbone open_clip:ViT-B-32 pretrained openai", ["with QuickGELU", "open_clip:ViT-B-32-quickgelu"]),
        ("backbone open_clip:ViT-B-16-plus", ["lists 0 weights", "`pretrained /path/to/file`"]),
        ("backbone timm:test_vit pretrained openai", ["takes `default`, a local file, or none"]),
        ("backbone timm:coatnet_0_224", ["timm has no weights of coatnet_0_224"]),
        ("backbone timm:mobilenetv5_300m_enc", ["no feature vector"]),
        ("backbone CLIP-RN50 adapter True", ["adapter", "bias_tuning, ln_tuning, bn_tuning, ssf_attn"]),
        ("backbone CLIP-RN50 vpt_deep True", ["vpt_deep", "blocks of a ViT"]),
        ("backbone CLIP-RN50 ln_tuning True", ["ln_tuning finds nothing"]),
        ("backbone CLIP-RN50 full_tuning True partial 5", ["partial 5", "only 4 blocks"]),
        ("backbone CLIP-RN50 resolution 256", ["resolution 256", "224 only"]),
        ("backbone CLIP-RN50 residual_dtype fp32", ["residual_dtype"]),
        ("backbone CLIP-ViT-B/32 bn_tuning True", ["bn_tuning finds nothing"]),
        ("backbone CLIP-ViT-L/14 resolution 230", ["resolution 230", "multiple of 14"]),
        ("backbone timm:densenet121 full_tuning True partial 1", ["partial 1", "no blocks"]),
        ("backbone timm:levit_128 resolution 230", ["resolution 230", "224 only"]),
        ("backbone timm:test_resnet zero_shot True", ["zero_shot", "text encoder"]),
        ("backbone timm:test_resnet init_head text_feat", ["init_head", "class_mean"]),
    ],
)
def test_refused_without_reading_anything(words: str, parts: list[str], config: Config) -> None:
    with pytest.raises(UserError) as caught:
        check(config("fake_lt", "clip_vit_b16", "init_head", "none", *words.split()))
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("name", ["CLIP-RN50", "timm:densenet121", "open_clip:ViT-B-16-SigLIP2", "open_clip:coca_base"])
def test_dry_run(name: str, config: Config) -> None:
    """Also of a network without parts, whose depth is zero, and of a tower that is described on a hub in part."""
    words = ("init_head", "none", "backbone", name, "pretrained", "none")
    result, derived = dry_run(load_configs("fake_lt", "clip_vit_b16", list(words), declared())[-1])
    assert result["gflops_per_image"] > 0.1 and derived["resolution"] == find_backbone(name).inputs(None).resolution


def test_a_tokenizer_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "/nonexistent")
    with pytest.raises(UserError, match="tokenizer of ViT-B-16-SigLIP2 cannot be loaded"):
        tokenize("ViT-B-16-SigLIP2", ["a photo of a cat."])
