"""Checkpoints of RIDE, SADE and BatchFormer: read under our names, whole, and without running what they may contain."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from PIL import Image
from safetensors.torch import load_file
from test_exchange import clip_vit, logits, subject, trained
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model
from tailtune.trainers.export import export
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.foreign_checkpoints.class_numbering import Numbering
from tailtune.trainers.foreign_checkpoints.load_checkpoint import load_foreign_checkpoint
from tailtune.trainers.foreign_checkpoints.ride import our_name
from tailtune.trainers.methods import Method, build_method

Make = Callable[..., CfgNode]
CIFAR = ("backbone", "ResNet-20", "reduce_dimension", True, "scale", 30)
IMAGES = ("backbone", "ResNet-10", "resolution", 64, "scale", 30)
SCRATCH = ("pretrained", "none", "full_tuning", True, "bn_tuning", True, "adaptformer", False, "init_head", "none")


def method(config: Make, *words: Any, name: str = "classify", experts: int = 3, seed: int = 0) -> Method:
    own = ("resolution", "none", *words) if "resolution" not in words else words
    cfg = config("fake_lt", "tiny_clip_peft", *SCRATCH, *own, "method", name, "num_experts", experts, "seed", seed)
    info = build_info(cfg)
    found = build_method(cfg, build_model(cfg, info.class_names, pixel_stats=(info.mean, info.std)), info).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for module in found.modules():  # nothing is where it started
            if isinstance(module, nn.BatchNorm2d):
                for each in (module.weight, module.bias, module.running_mean, module.running_var):
                    each.add_(0.2 * torch.rand(each.shape, generator=generator))  # type: ignore[union-attr]
                module.num_batches_tracked.add_(3)  # type: ignore[operator]
    return found


def theirs(name: str) -> str | None:
    """The original's name of one of ours, below `backbone.`."""
    for ours, original in (
        (r"model\.encoder\.net\.branches\.(\d+)\.layer(\d)\.(.*)", r"layer\2s.\1.\3"),
        (r"model\.encoder\.net\.(.*)", r"\1"),
        (r"model\.head\.(\d+)\.(.*)", r"linears.\1.\2"),
        (r"model\.head\.(.*)", r"linear.\1"),
        (r"hidden\.(.*)", r"expert_help_pred_hidden_fcs.\1"),
        (r"output\.(.*)", r"expert_help_pred_fc.\1"),
    ):
        if re.fullmatch(ours, name):
            return re.sub(ours, original, name)
    return None


def original(made: Method, prefix: str = "") -> dict[str, Tensor]:
    """A model's state dict as the original would save it."""
    named = {theirs(name): each.clone() for name, each in made.state_dict().items()}
    state = {name: each for name, each in named.items() if name is not None}
    cosine = not any(re.fullmatch(r"linears?\.(\d+\.)?bias", name) for name in state)
    return {
        f"{prefix}backbone.{name}": each.T.contiguous() if cosine and name.startswith("linear") else each
        for name, each in state.items()
    }


def noise(side: int) -> Tensor:
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(9))


CASES: list[tuple[tuple[Any, ...], int, str]] = [
    (CIFAR, 3, "ride"),
    ((*CIFAR, "loss_type", "CE"), 2, "sade"),
    (CIFAR, 1, "classify"),
    ((*CIFAR[:2], "classifier", "LinearClassifier"), 3, "classify"),
    ((*CIFAR[:2], "classifier", "LinearClassifier"), 1, "classify"),
    (IMAGES, 3, "ride"),
    ((*IMAGES, "expert_split", 1), 2, "ride"),
]


@pytest.mark.parametrize("words, experts, name", CASES)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_round_trip_gives_equal_logits(
    words: tuple[Any, ...], experts: int, name: str, prefix: str, config: Make, tmp_path: Path
) -> None:
    """From state dicts as of one GPU and of several, wrapped as the original wraps them or not."""
    ours, other = (method(config, *words, name=name, experts=experts, seed=seed) for seed in (0, 1))
    state = original(ours, prefix)
    torch.save({"state_dict": state, "epoch": 200, "arch": "ResNet32Model"} if prefix else state, tmp_path / "a.pth")
    report = load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "a.pth"), other, ())
    assert f"{len(state)} tensors, heads: {experts}" in report and "left out" not in report
    assert "pixel_mean" in report and ("in the original" not in report)
    side = 64 if "resolution" in words else 32
    with torch.no_grad():
        assert torch.equal(ours.expert_logits(noise(side)), other.expert_logits(noise(side)))


def test_the_originals_names() -> None:
    """Those that its code gives: several experts, one expert, an assignment."""
    assert {
        "conv1.weight": "model.encoder.net.conv1.weight",
        "layer1.0.bn2.running_var": "model.encoder.net.layer1.0.bn2.running_var",
        "layer2s.1.0.conv1.weight": "model.encoder.net.branches.1.layer2.0.conv1.weight",
        "layer4s.2.0.downsample.1.bias": "model.encoder.net.branches.2.layer4.0.downsample.1.bias",
        "linears.2.weight": "model.head.2.weight",
        "linear.bias": "model.head.bias",
        "expert_help_pred_hidden_fcs.0.bias": "hidden.0.bias",
        "expert_help_pred_fc.weight": "output.weight",
    }.items() <= {
        name: our_name(name)
        for name in (
            *("conv1.weight", "layer1.0.bn2.running_var", "layer2s.1.0.conv1.weight", "layer4s.2.0.downsample.1.bias"),
            *("linears.2.weight", "linear.bias", "expert_help_pred_hidden_fcs.0.bias", "expert_help_pred_fc.weight"),
        )
    }.items()


def test_an_expert_assignment(config: Make, tmp_path: Path) -> None:
    """It is part of the model for method ride_ea, and left out, as the report says, for any other."""
    words = (*CIFAR, "after", "resnet32_ride", "ride_ea.top_choices", 5)
    ours, other = (method(config, *words, name="ride_ea", seed=seed) for seed in (0, 1))
    torch.save({"state_dict": original(ours)}, tmp_path / "a.pth")
    report = load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "a.pth"), other, ())
    assert "left out" not in report
    with torch.no_grad():
        assert torch.equal(ours.expert_logits(noise(32)).nan_to_num(7), other.expert_logits(noise(32)).nan_to_num(7))
    plain = method(config, *CIFAR, name="ride", seed=2)
    assert "all experts are asked" in load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "a.pth"), plain, ())
    with torch.no_grad():
        assert torch.equal(plain.expert_logits(noise(32)), ours.model(noise(32)))
    torch.save({"state_dict": original(plain)}, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"6 tensors missing \(hidden.0.bias"):
        load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "b.pth"), other, ())


@pytest.mark.parametrize("name", ["ride", "batchformer"])
def test_the_encoder_across_the_batch_is_left_out(name: str, config: Make, tmp_path: Path) -> None:
    ours, other = method(config, *CIFAR, name="ride"), method(config, *CIFAR, name=name, seed=1)
    mixer = nn.TransformerEncoderLayer(48, 1, 48).state_dict(prefix="backbone.encoder_layers.")
    torch.save({"state_dict": {**original(ours), **mixer}}, tmp_path / "a.pth")
    assert "encoder across the batch, which is for training only" in load_foreign_checkpoint(
        ForeignCheckpoint(tmp_path / "a.pth"), other, ()
    )
    with torch.no_grad():
        assert torch.equal(ours.expert_logits(noise(32)), other.expert_logits(noise(32)))


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, experts, texts",
    [
        (CIFAR, 2, ["unexpected (model.encoder.net.branches.2", "num_experts"]),
        ((*CIFAR[:2], "scale", 30), 3, ["of another shape", "reduce_dimension"]),
        (("backbone", "ResNet-32", *CIFAR[2:]), 3, ["missing (model.encoder.net.branches.0.layer2.3"]),
        ((*CIFAR[:-2], "classifier", "LinearClassifier"), 3, ["3 tensors missing (model.head.0.bias"]),
        (
            (*CIFAR[:-2], "classifier", "L2NormedClassifier"),
            3,
            ["of another kind; give classifier CosineClassifier"],
        ),
    ],
)
def test_what_does_not_fit_is_named(
    words: tuple[Any, ...], experts: int, texts: list[str], config: Make, tmp_path: Path
) -> None:
    torch.save({"state_dict": original(method(config, *CIFAR))}, tmp_path / "a.pth")
    other = method(config, *words, experts=experts)
    before = {name: each.clone() for name, each in other.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "a.pth"), other, ())
    assert all(text in str(caught.value) for text in texts) and "\n" not in str(caught.value), caught.value
    assert all(torch.equal(each, before[name]) for name, each in other.state_dict().items()), "nothing was filled"


class ConfigParser:
    """Stands for the object that the original puts beside the state dict."""


def test_a_file_with_a_config_in_it_is_not_opened(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal names the command that makes a file of it that is."""
    ours = method(config, *CIFAR)
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": original(ours), "config": ConfigParser()}, tmp_path / "model_best.pth")
    with pytest.raises(UserError) as caught:
        load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "model_best.pth"), ours, ())
    found = re.search(r'run python -c "(import torch; s = torch\.load.*; torch\.save\(.*\))"$', str(caught.value))
    assert found and "ConfigParser" in str(caught.value) and "run code" in str(caught.value)
    exec(found[1])  # where its classes are known
    assert "heads: 3" in load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "weights.pth"), ours, ())


@pytest.mark.parametrize("content", [{"state_dict": {"a": torch.zeros(1)}}, {"state_dict": 3}, [torch.zeros(1)]])
def test_other_files_are_refused(content: Any, config: Make, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="is no checkpoint that can be read here"):
        load_foreign_checkpoint(ForeignCheckpoint(tmp_path / "a.pth"), method(config, *CIFAR), ())


# --- classes of iNaturalist ------------------------------------------------------------------------------------------

SPECIES = ("Mus", "Apis", "Ursus", "Bufo", "Lynx", "Tyto", "Rosa", "Vipera", "Canis", "Esox")
RANKS = [sorted(SPECIES).index(name) for name in SPECIES]


def categories(folder: Path, names: Sequence[str] = SPECIES) -> Path:
    taxa = {taxon: "x" for taxon in ("genus", "family", "order", "class", "phylum", "kingdom")}
    (folder / "categories.json").write_text(json.dumps([{"id": k, "name": n, **taxa} for k, n in enumerate(names)]))
    return folder


@pytest.mark.parametrize("words, experts", [(CIFAR, 3), ((*CIFAR[:2], "classifier", "LinearClassifier"), 1)])
def test_classes_by_category_id_are_put_into_the_order_of_names(
    words: tuple[Any, ...], experts: int, config: Make, tmp_path: Path
) -> None:
    ours, other = (method(config, *words, experts=experts, seed=seed) for seed in (0, 1))
    torch.save({"state_dict": original(ours)}, tmp_path / "a.pth")
    file = ForeignCheckpoint(tmp_path / "a.pth")
    report = load_foreign_checkpoint(file, other, (), Numbering("name", [categories(tmp_path)]))
    assert "numbered by category id, are put into the order of label_field name" in report
    with torch.no_grad():
        by_id, by_name = ours.expert_logits(noise(32)), other.expert_logits(noise(32))
        assert torch.allclose(by_name[:, :, RANKS], by_id, atol=1e-5) and not torch.allclose(by_name, by_id, atol=0.1)
        report = load_foreign_checkpoint(file, other, (), Numbering("id", [tmp_path]))
        assert torch.equal(other.expert_logits(noise(32)), by_id) and "category id" not in report
    with pytest.raises(UserError, match="label_field kingdom joins species .* give `label_field id`"):
        load_foreign_checkpoint(file, other, (), Numbering("kingdom", [tmp_path]))
    with pytest.raises(UserError, match="label_field name joins species .* give `label_field id`"):
        homonyms = categories(tmp_path, [*SPECIES[:9], "Mus"])
        load_foreign_checkpoint(file, other, (), Numbering("name", [homonyms]))


@pytest.mark.parametrize("head", ["CosineClassifier", "LinearClassifier"])
def test_classes_of_lift_are_ranks_of_names(head: str, tmp_path: Path) -> None:
    ours, other = (subject(clip_vit(), ["lora"], head) for _ in range(2))
    export(trained(ours), "lift", tmp_path / "lift")
    file = ForeignCheckpoint(tmp_path / "lift" / "checkpoint.pth.tar")
    five = categories(tmp_path, SPECIES[:5])
    ranks = [sorted(SPECIES[:5]).index(name) for name in SPECIES[:5]]
    report = load_foreign_checkpoint(file, other.method, ["lora"], Numbering("id", [five]))
    assert "numbered by name, are put into the order of label_field id" in report
    assert torch.allclose(logits(other), logits(ours)[:, ranks], atol=1e-5)
    for field in ("name", "genus"):  # LIFT has data sets of the taxa, too
        report = load_foreign_checkpoint(file, other.method, ["lora"], Numbering(field, [five]))
        assert torch.equal(logits(other), logits(ours)) and "numbered" not in report


def test_both_numberings_of_the_data_give_one_result(config: Make, launch: Cli, tmp_path: Path) -> None:
    """Lists of category ids, `label_field` name as `-d inat2018` has it, and id; a network of RIDE."""
    lines = []
    for k in range(20):
        pixels = (noise(32)[k % 4].permute(1, 2, 0) * 40 + 10 * k).clamp(0, 255).byte().numpy()
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")
        lines.append(f"{k}.png {k % 10}")
    (tmp_path / "list.txt").write_text("\n".join(lines))
    categories(tmp_path)
    body = f"dataset: ImageList\nroot: {tmp_path}\ntrain_list: list.txt\ntest_list: list.txt\nlabel_field: name\n"
    (tmp_path / "species.yaml").write_text(body)
    torch.save({"state_dict": original(method(config, *CIFAR, name="ride"))}, tmp_path / "w.pth")
    words = (
        f"-d species.yaml -m resnet32_ride backbone ResNet-20 num_workers 0 test_only True model_dir {tmp_path}/w.pth"
    )
    found = {}
    for field in ("name", "id"):
        done = launch(words, "output_dir", field, "label_field", field, "augment cifar test_dists none resolution 32")
        assert done.returncode == 0, done.stderr
        (folder,) = Path("output", field, "tests").iterdir()
        tensors = load_file(folder / "logits.safetensors")
        found[field] = (tensors["logits"].float() + tensors["row_max"][..., None], tensors["labels"])
    assert torch.equal(found["name"][1], torch.tensor(RANKS)[found["id"][1]])
    assert torch.allclose(found["name"][0][:, :, RANKS], found["id"][0], atol=1e-2)  # stored in half precision


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_evaluates_a_file(config: Make, launch: Cli, tmp_path: Path) -> None:
    torch.save({"state_dict": original(method(config, *CIFAR, name="ride"))}, tmp_path / "model_best.pth")
    words = "-d fake_lt -m resnet32_ride backbone ResNet-20 num_workers 0 output_dir x test_only True"
    words += f" max_test_images 20 augment lift test_dists none model_dir {tmp_path / 'model_best.pth'}"
    done = launch(words)
    assert done.returncode == 0, done.stderr
    assert "heads: 3" in done.stdout
    (folder,) = Path("output/x/tests").iterdir()
    assert "-file-" in json.loads((folder / "metrics.json").read_text())["evaluation"]["checkpoint"]
    assert "finished before" in launch(words).stdout
    torch.save({"state_dict": {}, "config": ConfigParser()}, tmp_path / "model_best.pth")
    failed = launch(words)
    assert failed.returncode == 2 and "weights.pth" in failed.stderr and failed.stderr.count("\n") == 1
