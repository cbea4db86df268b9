"""Pre-trained weights: open_clip's features in our host, and the files that may and may not be opened."""

import argparse
import json
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import Cli
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.models import build_model
from tailtune.models.backbones.backbone_types import Backbone
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone
from tailtune.models.backbones.pretrained_weights import read_state
from tailtune.models.backbones.table import TINY_CLIP
from tailtune.models.backbones.timm_backbone import TimmBackbone
from tailtune.tests.fuzz.weights import damaged_files
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.storage.checkpoint import check_base, fingerprint

QUICK = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PLAIN = {**QUICK, "quick_gelu": False}
State = dict[str, Tensor]


@pytest.fixture(params=["quick", "plain"])
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> OpenClipBackbone:
    """A small architecture with OpenAI's activation, and one with GELU (that of the embedded backbone)."""
    return make_spec(tmp_path, request.param)


def make_spec(folder: Path, kind: str = "quick") -> OpenClipBackbone:
    file = folder / f"tailtune-test-{kind}.json"
    file.write_text(json.dumps(QUICK if kind == "quick" else PLAIN))
    return OpenClipBackbone(file.stem, config=file)


def original(spec: OpenClipBackbone, seed: int = 7) -> open_clip.CLIP:
    """Random weights, with a spread that makes activations and norms matter."""
    assert spec.config is not None
    with seeded(seed):
        clip = open_clip.CLIP(**json.loads(spec.config.read_text())).eval()
        with torch.no_grad():
            for parameter in clip.parameters():
                if parameter.ndim:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return clip


def written(clip: nn.Module, path: Path) -> str:
    save_file({name: each.contiguous() for name, each in clip.state_dict().items()}, path)
    return str(path)


def images(count: int = 4, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def build(
    spec: OpenClipBackbone, pretrained: str | None, resolution: int = 32, project: bool = False, **named: Any
) -> Backbone:
    return spec.build(pretrained, resolution, 0, project, **named)


# --- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@torch.no_grad()
def test_features_are_open_clips(spec: OpenClipBackbone, tmp_path: Path, fast: bool) -> None:
    """features @ projection and the projecting encoder both equal `encode_image`, to 1e-5 in fp32."""
    clip = original(spec)
    path = written(clip, tmp_path / "w.safetensors")
    bare, projecting = (build(spec, path, project=project, fast=fast) for project in (False, True))
    bare.encoder.set_precision()  # folds QuickGELU where `fast` allows it
    projecting.encoder.set_precision()
    wanted = clip.encode_image(images())
    assert bare.text_encoder is not None and bare.text_encoder.projection is not None
    for found in (bare.encoder(images()) @ bare.text_encoder.projection.T, projecting.encoder(images())):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@torch.no_grad()
def test_text_features_are_open_clips_exactly(spec: OpenClipBackbone, tmp_path: Path) -> None:
    clip = original(spec).requires_grad_(False)  # frozen, torch takes another kernel, which rounds differently
    text = build(spec, written(clip, tmp_path / "w.safetensors")).text_encoder
    names = ["tench", "goldfish"]
    tokens = open_clip.get_tokenizer("ViT-B-16")([f"a photo of a {name}." for name in names])[:, :16]
    assert text is not None
    found = text.class_features([[f"a photo of a {name}."] for name in names])
    assert torch.equal(found, clip.encode_text(tokens, normalize=True))
    assert text.logit_scale == float(clip.logit_scale.exp())


def test_every_weight_of_the_image_tower_is_used(spec: OpenClipBackbone, tmp_path: Path) -> None:
    """As many numbers in the host and its projection as in open_clip's tower, and each host tensor differs from an
    untouched one."""
    clip = original(spec)
    built = build(spec, written(clip, tmp_path / "w.safetensors"), project=True)
    assert sum(each.numel() for each in built.encoder.parameters()) == sum(p.numel() for p in clip.visual.parameters())
    fresh = dict(build(spec, None, project=True).encoder.named_parameters())
    for name, each in built.encoder.named_parameters():
        assert not torch.equal(each, fresh[name]), name
    assert not built.random_base and build(spec, None).random_base


def test_quickgelu_is_not_gelu(tmp_path: Path) -> None:
    """The two activations give different features from the same weights, so the comparison above means something."""
    quick, plain = make_spec(tmp_path), make_spec(tmp_path, "plain")
    path = written(original(quick), tmp_path / "w.safetensors")
    with torch.no_grad():
        a, b = (build(each, path).encoder(images()) for each in (quick, plain))
    assert (a - b).abs().max() > 1e-3


# --- files ---------------------------------------------------------------------------------------------------------


def _wrapped(state: State) -> dict[str, Any]:
    return {"epoch": 3, "name": "run", "state_dict": {f"module.{name}": each for name, each in state.items()}}


FORMATS: dict[str, Callable[[State, Path], Any]] = {
    "w.safetensors": save_file,
    "w.pt": torch.save,
    "w.bin": lambda state, path: torch.save({"state_dict": state}, path),
    "w.pth": lambda state, path: torch.save(_wrapped(state), path),
    "module.safetensors": lambda state, path: save_file({f"module.{k}": v for k, v in state.items()}, path),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    spec = make_spec(tmp_path)
    state = {key: each.contiguous() for key, each in original(spec).state_dict().items()}
    FORMATS[name](state, tmp_path / name)
    reference = build(spec, written(original(spec), tmp_path / "reference.safetensors"))
    found = build(spec, str(tmp_path / name))
    wanted = reference.encoder.state_dict()
    assert all(torch.equal(each, wanted[key]) for key, each in found.encoder.state_dict().items())


def test_half_precision_files_are_read_in_fp32(tmp_path: Path) -> None:
    spec = make_spec(tmp_path)
    built = build(spec, written(original(spec).half(), tmp_path / "w.safetensors"))
    assert {each.dtype for each in built.encoder.parameters()} == {torch.float32}
    with torch.no_grad():
        wanted = original(spec).encode_image(images())
        assert built.text_encoder is not None and built.text_encoder.projection is not None
        found = built.encoder(images()) @ built.text_encoder.projection.T
    assert (found - wanted).abs().max() <= 1e-2 * wanted.abs().max()


class Harmful:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('a weights file ran code')",))


def _torchscript(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def _dropped(state: State) -> State:
    return {name: each for name, each in state.items() if "resblocks.2" not in name}


REFUSED: dict[str, tuple[Callable[[State, Path], Any], str]] = {
    "code.pt": (lambda state, path: torch.save({"a": Harmful()}, path), "holds exec.*run code"),
    "script.pt": (lambda state, path: _torchscript(path), "TorchScript archive but none that OpenAI published"),
    "torn.safetensors": (lambda state, path: path.write_bytes(b"\x10\x00\x00\x00"), "cannot be read"),
    "torn.pt": (lambda state, path: path.write_bytes(b"PK\x03\x04torn"), "cannot be read"),
    "empty.pt": (lambda state, path: path.write_bytes(b""), "cannot be read"),
    "list.pt": (lambda state, path: torch.save([1, 2], path), "holds no state dict"),
    "less.safetensors": (lambda state, path: save_file(_dropped(state), path), "missing"),
    "more.safetensors": (lambda state, path: save_file({**state, "extra": torch.zeros(1)}, path), "unexpected"),
    "shape.safetensors": (
        lambda state, path: save_file({**state, "visual.proj": torch.zeros(64, 23)}, path),
        "of another shape",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_refused_files_are_named_in_one_line(tmp_path: Path, name: str) -> None:
    write, message = REFUSED[name]
    spec = make_spec(tmp_path)
    write({key: each.contiguous() for key, each in original(spec).state_dict().items()}, tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        build(spec, str(tmp_path / name))
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt' does not exist"):
        build(make_spec(tmp_path), "nowhere.pt")


def test_an_activation_that_does_not_fit_is_an_error() -> None:
    """open_clip only warns, and computes wrong features."""
    with pytest.raises(UserError, match="QuickGELU"):
        build(OpenClipBackbone("ViT-B-16"), "openai", 224)
    with pytest.raises(
        UserError, match=r"unknown pretrained tag of ViT-B-16-quickgelu 'openia'; did you mean 'openai'"
    ):
        build(OpenClipBackbone("ViT-B-16-quickgelu"), "openia", 224)


# --- resolution ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [16, 48, 64])
def test_positions_are_resampled(tmp_path: Path, resolution: int) -> None:
    spec = make_spec(tmp_path)
    path = written(original(spec), tmp_path / "w.safetensors")
    native, other = build(spec, path).encoder, build(spec, path, resolution).encoder
    side = resolution // 8
    assert other.grid == (side, side) and other.net.pos_embed.shape == (1, side * side + 1, 64)
    assert torch.equal(other.net.pos_embed[:, 0], native.net.pos_embed[:, 0])
    wanted = resample_abs_pos_embed(native.net.pos_embed, [side, side])
    assert torch.allclose(other.net.pos_embed, wanted, atol=1e-6)
    with torch.no_grad():
        assert other(images(2, resolution)).isfinite().all()


# --- damage --------------------------------------------------------------------------------------------------------


def test_weights_beside_other_objects_are_named_with_the_way_to_convert_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many training scripts save them: beside the options of the command line, or as a whole network."""
    monkeypatch.chdir(tmp_path)
    linear = nn.Linear(2, 3)
    options = argparse.Namespace(lr=0.1)
    for content, held in (
        ({"state_dict": linear.state_dict(), "args": options}, "holds argparse.Namespace"),
        ({"model": linear.state_dict(), "args": options}, "holds argparse.Namespace"),
        (linear, r"holds torch\.nn\.modules\.linear\.Linear"),
    ):
        for zipped in (True, False):
            torch.save(content, "old.pth", _use_new_zipfile_serialization=zipped)
            with pytest.raises(UserError, match=held) as caught:
                read_state(Path("old.pth"))
            line = str(caught.value)
            assert "complete" not in line and "\n" not in line
            exec(line.partition('python -c "')[2].removesuffix('"'))  # by whoever trusts the file
            found = read_state(Path("weights.pth"))
            assert found.keys() == linear.state_dict().keys() and torch.equal(found["weight"], linear.weight)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "legacy.pt"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_named(suffix: str, value: float, tmp_path: Path) -> None:
    path = tmp_path / f"w.{suffix}"
    state = {"a.weight": torch.ones(3), "b.weight": torch.tensor([1.0, value, 2.0, value])}
    if suffix == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization="legacy" not in suffix)
    with pytest.raises(UserError, match=rf"'{path}' is damaged: 2 of 4 values of 'b.weight' are not finite"):
        read_state(path)
    if suffix != "safetensors":
        torch.save({"state_dict": {"conv1.weight": state["b.weight"]}}, path)
        with pytest.raises(UserError, match="2 of 4 values of 'backbone.conv1.weight' are not finite"):
            _ = ForeignCheckpoint(path).tensors


def test_published_weights_that_are_damaged_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: object, **__: object) -> nn.Module:
        net = nn.Linear(2, 2)
        net.weight.data[0, 1] = float("nan")
        return net

    def torn(*_: object, **__: object) -> nn.Module:
        raise SafetensorError("incomplete metadata")

    monkeypatch.setattr("tailtune.models.backbones.timm_backbone.hub_or_cache", nullcontext)
    for create, message in ((damaged, "weights of test_vit.*1 of 4 values of 'weight'"), (torn, "cache of timm")):
        monkeypatch.setattr("timm.create_model", create)
        with pytest.raises(UserError, match=message):
            TimmBackbone("test_vit").create(download=True)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_state(tmp_path / "w.pt")["a"], torch.arange(3.0))


def test_a_flipped_number_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"a": torch.full((1000,), 0.5)}, path)
    content = bytearray(path.read_bytes())
    content[content.index(torch.full((2,), 0.5).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checksum of its part '.*/data/0' is wrong"):
        read_state(path)


def test_damaged_files_end_in_one_line_within_seconds_and_little_memory(tmp_path: Path) -> None:
    """Cut, flipped, blank, with sizes that nothing has, compressed, hostile: refused, or read as other weights."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for name, content in damaged_files(seed=11, count=350):
        path = tmp_path / name
        path.write_bytes(content)
        for read in (read_state, lambda path: ForeignCheckpoint(path).tensors):
            start = time.monotonic()
            try:
                found = read(path)
                assert all(each.isfinite().all() for each in found.values() if each.is_floating_point())
            except UserError as error:
                assert str(path) in str(error) and str(error).isprintable()
                refused += 1
            assert time.monotonic() - start < 5, name
        path.unlink()
    assert refused > 500, "of 700"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20, "kilobytes"


def test_the_corpus_is_a_function_of_its_seed() -> None:
    first, again = (list(damaged_files(3, 60)) for _ in range(2))
    same = [a == b for a, b in zip(first, again, strict=True)]  # pytest would print megabytes of a difference
    assert all(same) and len(same) == 60 == len({name for name, _ in first})
    others = list(damaged_files(4, 60))
    assert any(a != b for a, b in zip(first, others, strict=True))


# --- the base model ------------------------------------------------------------------------------------------------


def test_the_fingerprint_names_the_text_tower_where_the_head_is_made_of_it(config: Any, tmp_path: Path) -> None:
    """Another text encoder or projection is another base model; for other heads it is none of their business."""
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("whole", "text", "projection", "image")}
    for name, part in zip(files, (None, "token_embedding.weight", "visual.proj", "visual.ln_post.bias"), strict=True):
        state = load_file(TINY_CLIP / "weights.safetensors")
        if part is not None:
            state[part] = state[part] + 0.5
        save_file(state, files[name])

    def base(name: str, *words: str) -> str:
        cfg = config("fake_lt", "tiny_clip", "pretrained", files[name], *words)
        return fingerprint(build_model(cfg, [f"c{k}" for k in range(10)]))

    text, others = {name: base(name) for name in files}, {name: base(name, "init_head", "class_mean") for name in files}
    encoder, tower = text["whole"].split(".")
    assert others["whole"] == encoder == others["text"] == others["projection"] != others["image"]
    assert text["text"].split(".")[0] == encoder and len({text[name] for name in files}) == 4
    assert base("whole", "zero_shot", "True", "adaptformer", "False") == f"{encoder}.{tower}"
    facts = {"class_names": []}
    for there, here in ((text["whole"], text["whole"]), (encoder, text["text"]), (text["text"], encoder)):
        check_base(tmp_path, {**facts, "base": there}, here)  # an older checkpoint, and a head without text, have none
    for here, message in (("text", "another text encoder"), ("projection", "projection"), ("image", "base model")):
        with pytest.raises(UserError, match=message):
            check_base(tmp_path, {**facts, "base": text["whole"]}, text[here])


def test_an_altered_text_tower_is_refused_where_it_is_used(launch: Cli, tmp_path: Path) -> None:
    state = load_file(TINY_CLIP / "weights.safetensors")
    save_file(state, tmp_path / "w.safetensors")
    words = f"-d fake_lt -m tiny_clip lora True max_steps 1 max_test_images 20 pretrained {tmp_path}/w.safetensors"
    assert launch(words, "output_dir run").returncode == 0
    save_file({**state, "token_embedding.weight": state["token_embedding.weight"] + 0.5}, tmp_path / "w.safetensors")
    for more in ("ensemble wise", "ensemble gla"):
        failed = launch(words, "output_dir run test_only True", more)
        assert failed.returncode == 2 and "another text encoder" in failed.stderr, more
    failed = launch(words, "output_dir other test_only True model_dir run init_head class_mean ensemble gla")
    assert failed.returncode == 2 and "another text encoder" in failed.stderr, "that made the head which it joins"
