"""ResNets: sizes and costs of experts.md §1.6, the original's numbers (§10), trunk and branches, weights from files."""

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.models import BACKBONES, ClassificationModel, build_model
from tailtune.models.backbones.backbone_types import ExpertSplit
from tailtune.models.backbones.resnet import PaddingShortcut, ResNetDesign, make_resnet
from tailtune.models.backbones.resnet_backbone import ResNetBackbone
from tailtune.models.backbones.resnet_encoder import ResNetEncoder
from tailtune.models.backbones.timm_backbone import TimmBackbone
from tailtune.models.heads.classifiers import CosineClassifier
from tailtune.models.heads.expert_heads import heads_of
from tailtune.trainers.config_checks import check
from tailtune.trainers.dry_run import dry_run, forward_flops
from tailtune.trainers.export import export
from tailtune.trainers.methods import build_method
from tailtune.trainers.precision import PRECISIONS, cast_trainable
from tailtune.trainers.runs.load_run import subject_of
from tailtune.trainers.storage.checkpoint import trained_state

Config = Callable[..., CfgNode]
TINY, TINY_CIFAR = ResNetDesign((1, 1, 1, 1), bottleneck=True), ResNetDesign((1, 1, 1), cifar=True)
TRAINS = ("full_tuning", True, "bn_tuning", True)


def make(config: Config, name: str, *words: object, data: str = "imagenet_lt") -> CfgNode:
    """The config of a network that is trained from scratch."""
    scratch = ("backbone", name, "pretrained", "none", "init_head", "none", "resolution", "none", *TRAINS)
    return config(data, "tiny_clip", *scratch, *words)


def noise(side: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def small(experts: int = 1, own: int | None = None, design: ResNetDesign = TINY, seed: int = 0) -> ResNetEncoder:
    """A small network in its host, in eval mode."""
    host = ResNetBackbone("Small", design).build(None, 32, seed, False, split=ExpertSplit(experts, own)).encoder
    host.set_precision()
    assert isinstance(host, ResNetEncoder)
    return host


# --- parameters and cost (experts.md §1.6) -------------------------------------------------------------------------

LINEAR, COSINE, REDUCED, SHARED = (
    ("classifier", "LinearClassifier"),
    ("classifier", "CosineClassifier"),
    ("reduce_dimension", True),
    ("expert_split", 1),
)
SIZES: list[tuple[str, int, int, tuple[object, ...], int, int]] = [
    ("ResNet-32", 100, 1, LINEAR, 470_004, 68_868_352),
    ("ResNet-32", 100, 1, COSINE, 469_904, 68_868_352),
    ("ResNet-32", 100, 1, REDUCED, 277_168, 49_476_288),
    ("ResNet-32", 100, 2, REDUCED, 530_512, 74_917_248),
    ("ResNet-32", 100, 3, REDUCED, 783_856, 100_358_208),
    ("ResNet-32", 100, 4, REDUCED, 1_037_200, 125_799_168),
    ("ResNet-32", 100, 6, REDUCED, 1_543_888, 176_681_088),
    ("ResNet-32", 100, 3, COSINE, 1_362_064, 158_534_400),
    ("ResNet-10", 1000, 1, LINEAR, 5_418_792, 889_229_312),
    ("ResNet-10", 1000, 2, REDUCED, 6_372_416, 958_527_488),
    ("ResNet-10", 1000, 3, REDUCED, 9_401_792, 1_173_263_360),
    ("ResNet-10", 1000, 4, REDUCED, 12_431_168, 1_387_999_232),
    ("ResNet-10", 1000, 6, REDUCED, 18_489_920, 1_817_470_976),
    ("ResNet-50", 1000, 1, LINEAR, 25_557_032, 4_089_184_256),
    ("ResNet-50", 1000, 2, REDUCED, 29_599_808, 4_451_475_456),
    ("ResNet-50", 1000, 3, REDUCED, 43_677_248, 5_770_432_512),
    ("ResNet-50", 1000, 4, REDUCED, 57_754_688, 7_089_389_568),
    ("ResNet-50", 1000, 6, REDUCED, 85_909_568, 9_727_303_680),
    ("ResNet-50", 1000, 3, COSINE, 73_778_240, 8_640_430_080),
    ("ResNeXt-50", 1000, 1, LINEAR, 25_028_904, 4_230_479_872),
    ("ResNeXt-50", 1000, 2, REDUCED, 29_063_488, 4_645_957_632),
    ("ResNeXt-50", 1000, 3, REDUCED, 42_889_024, 6_050_113_536),
    ("ResNeXt-50", 1000, 4, REDUCED, 56_714_560, 7_454_269_440),
    ("ResNeXt-50", 1000, 6, REDUCED, 84_365_632, 10_262_581_248),
    ("ResNeXt-50", 1000, 3, COSINE, 72_258_880, 9_016_147_968),
    ("ResNet-50", 8142, 1, LINEAR, 40_190_990, 4_103_811_072),
    ("ResNet-50", 8142, 2, REDUCED, 51_540_032, 4_473_415_680),
    ("ResNet-50", 8142, 3, REDUCED, 76_587_584, 5_803_342_848),
    ("ResNet-152", 365, 1, LINEAR, 58_891_693, 11_512_326_144),
    ("ResNet-152", 365, 3, COSINE, 171_543_616, 29_162_928_128),
    ("ResNet-152", 365, 3, SHARED, 90_315_840, 13_132_298_240),
]
"""Backbone, classes, experts, options → parameters, multiplications of convolutions and matrices."""


SMALL_OR_REDUCED = [row for row in SIZES if row[0] == "ResNet-32" or row[1:4] == (1000, 3, REDUCED)]
"""Every option on the smallest network, and each larger network once; ResNet-152 has its own dry run below."""


@pytest.mark.parametrize(
    "row",
    [pytest.param(row, marks=[] if row in SMALL_OR_REDUCED else pytest.mark.slow) for row in SIZES],
    ids=lambda row: "-".join(map(str, (*row[:3], row[3][1]))),
)
def test_parameters_and_cost(row: tuple[str, int, int, tuple[object, ...], int, int], config: Config) -> None:
    name, classes, experts, words, parameters, products = row
    cfg = make(config, name, "num_experts", experts, *words)
    with torch.device("meta"):
        model = build_model(cfg, [f"class {k}" for k in range(classes)])
        assert model.num_experts == experts
        assert (model.counts()["total"], forward_flops(model, cfg.resolution)) == (parameters, 2 * products)
    assert model.counts()["trainable"] == parameters, "from scratch everything trains"


@pytest.mark.parametrize(
    ("name", "data", "words", "parameters", "products"),
    [
        pytest.param("ResNeXt-50", "imagenet_lt", REDUCED, 42_889_024, 6_050_113_536, marks=pytest.mark.slow),
        ("ResNet-32", "cifar100_ir100", REDUCED, 783_856, 100_358_208),
        pytest.param("ResNet-50", "inat2018", REDUCED, 76_587_584, 5_803_342_848, marks=pytest.mark.slow),
        pytest.param("ResNet-152", "places_lt", (), 171_543_616, 29_162_928_128, marks=pytest.mark.slow),
        ("ResNet-152", "places_lt", SHARED, 90_315_840, 13_132_298_240),
    ],
)
def test_what_a_dry_run_reports(
    name: str, data: str, words: tuple[object, ...], parameters: int, products: int, config: Config
) -> None:
    found, _ = dry_run(make(config, name, "num_experts", 3, *words, data=data))
    assert found["params"]["total"] == parameters and found["gflops_per_image"] == 2 * products / 1e9


def test_the_command_line_reports_them(launch: Any) -> None:
    words = "backbone ResNet-32 pretrained none init_head none num_experts 3 reduce_dimension True full_tuning True"
    found = launch("-d fake_lt -m tiny_clip --dry-run bn_tuning True", words)
    result = json.loads(found.stdout.splitlines()[-1])
    other = 3 * 48 * (100 - 10)  # classes
    assert result["params"]["total"] == result["params"]["trainable"] == 783_856 - other
    assert result["params"]["head"] == 3 * 48 * 10 and result["gflops_per_image"] == 2 * (100_358_208 - other) / 1e9


@pytest.mark.parametrize(("name", "parameters"), [("20", 269_722), ("44", 658_586), ("56", 853_018)])
def test_other_depths(name: str, parameters: int) -> None:
    """He et al. 2016, table 6 (0.27, 0.66, 0.85 million for ten classes), without weights in shortcuts."""
    with torch.device("meta"):
        host = BACKBONES[f"ResNet-{name}"].build(None, 32, 0, False).encoder
    assert sum(each.numel() for each in host.parameters()) + 64 * 10 + 10 == parameters


# --- the original's numbers (experts.md §10) -----------------------------------------------------------------------


def test_cosine_head() -> None:
    """Fixture 10."""
    row, column = torch.arange(1, 7.0), torch.arange(1, 5.0)
    head = CosineClassifier(6, 4, 30)
    head.weight.data = torch.cos(row + 2 * column.unsqueeze(1))
    wanted = [[-27.400797, 23.384907, 7.744253, -29.703337], [-11.209352, -19.630732, 28.682194, -3.124815]]
    assert torch.allclose(head(torch.stack([row.sin(), row.cos()])), torch.tensor(wanted), rtol=1e-5)


def in_the_originals_order(model: ClassificationModel) -> Iterator[nn.Parameter]:
    """Registered there: stem, layer1, layer2 of every expert, layer3 of every expert, heads."""
    net = model.encoder.net
    for module in (net.conv1, net.bn1, *net.stages):
        yield from module.parameters()
    for head in heads_of(model.head):
        yield head.get_parameter("weight")


@torch.no_grad()
def fill(model: ClassificationModel) -> None:
    """sin(k + 1 + i) for entry k of tensor i, scaled by what the tensor is (fixture 13)."""
    norms = {id(each.weight) for each in model.modules() if isinstance(each, nn.BatchNorm2d)}
    heads = {id(head.get_parameter("weight")) for head in heads_of(model.head)}
    for i, parameter in enumerate(in_the_originals_order(model)):
        shape = parameter.T.shape if id(parameter) in heads else parameter.shape  # there features x classes
        v = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) + 1 + i).view(shape).to(parameter.dtype)
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.1 * v if id(parameter) in norms else 0.1 * v)
        else:
            v = v * 2 / math.sqrt(v[0].numel())
            parameter.copy_(v.T if id(parameter) in heads else v)


def waves() -> Tensor:
    """x[b, c, h, w] = sin(0.1 (h + 1)(c + 1) + 0.05 (w + 1)(b + 1))."""
    b, c, h, w = (torch.arange(1, n + 1.0) for n in (4, 3, 32, 32))
    return torch.sin(0.1 * h.view(-1, 1) * c.view(-1, 1, 1) + 0.05 * w * b.view(-1, 1, 1, 1))


@torch.no_grad()
def test_forward_of_three_experts(config: Config) -> None:
    """Fixture 13."""
    cfg = make(config, "ResNet-32", "num_experts", 3, "reduce_dimension", True, "scale", 30)
    model = build_model(cfg, [f"class {k}" for k in range(100)]).eval()
    fill(model)
    logits = model(waves())
    mean = logits.mean(1)
    assert mean[0, :5].tolist() == pytest.approx([0.46378, -0.46811, -0.98674, -0.58062, 0.34170], abs=1e-3)
    assert logits[0, :, 0].tolist() == pytest.approx([-1.04271, 1.76659, 0.66744], abs=1e-3)
    assert float(mean.abs().sum()) == pytest.approx(294.823, abs=5e-3)
    assert mean.argmax(1).tolist() == [68, 68, 87, 68]


# --- parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(16, 24), (24, 48), (16, 32)])
def test_shortcut_without_weights(before: int, after: int) -> None:
    x = noise(7)[:1, :1].expand(1, before, 7, 7) * torch.arange(1, before + 1).view(-1, 1, 1)
    y = PaddingShortcut(after - before)(x)
    side = (after - before) // 2
    assert y.shape == (1, after, 4, 4) and torch.equal(y[:, side : side + before], x[:, :, ::2, ::2])
    assert not y[:, :side].any() and not y[:, side + before :].any()


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "resnet152"])
def test_names_and_shapes_are_timms(name: str) -> None:
    spec = {"resnet50": "ResNet-50", "resnext50_32x4d": "ResNeXt-50", "resnet152": "ResNet-152"}[name]
    with torch.device("meta"):
        own = BACKBONES[spec].build(None, 224, 0, False).encoder.net.state_dict()
        theirs = timm.create_model(name, num_classes=0).state_dict()
    assert {key: each.shape for key, each in own.items()} == {key: each.shape for key, each in theirs.items()}


@pytest.mark.parametrize("design", [ResNetDesign((1, 1, 1, 1)), ResNetDesign((1, 2, 1, 1), True, 32, 4)])
@torch.no_grad()
def test_features_are_timms(design: ResNetDesign) -> None:
    """The stride is on the 3x3 convolution; the last map is averaged whatever its size."""
    block = timm.models.resnet.Bottleneck if design.bottleneck else timm.models.resnet.BasicBlock
    width = {"cardinality": design.groups, "base_width": design.group_width}
    theirs = timm.models.resnet.ResNet(block, design.blocks, num_classes=0, **width).eval()
    for each in theirs.buffers():
        each.add_(0.1 * torch.rand_like(each)) if each.is_floating_point() else None
    host = small(design=design)
    host.net.load_state_dict(theirs.state_dict())
    for side in (32, 75, 224):
        assert torch.allclose(host(noise(side)), theirs(noise(side)), atol=1e-5)


def test_initial_weights() -> None:
    """CIFAR: variance 2 / fan_in; ImageNet: 2 / (side² · outputs), whatever the groups; norms 1 and 0."""
    for design, of in (
        (ResNetDesign((1, 1, 1), cifar=True), "fan_in"),
        (ResNetDesign((1, 1, 1, 1), True, 32, 4), "fan_out"),
    ):
        net = make_resnet(design, 0, branches=2, branch_stages=2)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                size = module.weight[0].numel() if of == "fan_in" else module.weight[:, 0].numel()
                spread = module.weight.detach().std() * math.sqrt(size / 2)
                assert float(spread) == pytest.approx(1, abs=4 / math.sqrt(module.weight.numel()))
            if isinstance(module, nn.BatchNorm2d):
                values = [(module.weight, 1), (module.bias, 0), (module.running_mean, 0), (module.running_var, 1)]
                assert all(bool((each == value).all()) for each, value in values)
                assert module.num_batches_tracked == 0


def test_weights_are_a_function_of_the_seed_and_of_nothing_else() -> None:
    before = torch.random.get_rng_state()
    one, again, other = (small(3, 2, seed=seed).net.state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(each, again[name]) for name, each in one.items())
    convolutions = [name for name, each in one.items() if each.ndim == 4]
    assert not any(torch.equal(one[name], other[name]) for name in convolutions)
    own = [name for name in convolutions if name.startswith("branches.0.")]
    assert own and not any(torch.equal(one[name], one[name.replace(".0.", ".1.", 1)]) for name in own)


# --- trunk and branches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("design", [TINY, TINY_CIFAR], ids=["imagenet", "cifar"])
@pytest.mark.parametrize("own", [0, 1, 2, 3])
def test_the_cut_changes_nothing(design: ResNetDesign, own: int) -> None:
    """Experts with the weights of the whole network have its features and, summed, its gradients."""
    whole, cut = small(design=design), small(3, own, design)
    state = whole.net.state_dict()
    names = {name: re.sub(r"^branches\.\d\.", "", name) for name in cut.net.state_dict()}
    assert {name.split(".")[2] for name in names if name.startswith("branches.")} == {
        f"layer{index + 1}" for index in range(len(design.blocks) - own, len(design.blocks))
    }
    cut.net.load_state_dict({name: state[source] for name, source in names.items()})
    for host in (whole, cut):
        host.requires_grad_(True)
        host.set_trained_batch_norms([each for each in host.net.modules() if isinstance(each, nn.BatchNorm2d)])
        host.train()
        host.set_precision(torch.float64)
        host.double()
    features = whole(noise(32))
    found = cut(noise(32))
    assert found.shape == ((3, whole.feature_dim) if own == 0 else (3, 3, whole.feature_dim))
    wanted = features if own == 0 else features.unsqueeze(1).expand(-1, 3, -1)
    assert torch.allclose(found, wanted, rtol=1e-12)
    (features.sum() * (1 if own == 0 else 3)).backward(), found.sum().backward()
    weight, other = (dict(host.net.named_parameters())["conv1.weight"].grad for host in (whole, cut))
    assert weight is not None and other is not None and torch.allclose(weight, other, rtol=1e-8)
    assert torch.equal(cut.net.bn1.running_mean, whole.net.bn1.running_mean), "the trunk runs once"


def test_how_stages_are_shared() -> None:
    assert small(3).experts == 3 and small(3).net.shared == ["layer1", "layer2"], "two of their own unless asked"
    assert small(3, 1).net.shared == ["layer1", "layer2", "layer3"]
    assert small(3, 0).experts == small(1, 2).experts == 1
    assert small(1, 2).net.state_dict().keys() == small().net.state_dict().keys(), "one expert has no branch"
    assert not small(3, 4).net.shared


def test_what_partial_counts() -> None:
    """Stages; one that every expert has for itself is one."""
    host = small(3, 2)
    assert host.depth == 4
    names = {id(each): name for name, each in host.net.named_parameters()}
    trains = [
        {names[id(each)] for module in host.tunable_modules(k) for each in module.parameters()} for k in (1, 2, 3, 4)
    ]
    stages = [{re.sub(r"\.\d+\.(conv|bn|downsample).*", "", name) for name in each} for each in trains]
    assert stages[0] == {f"branches.{e}.layer4" for e in range(3)}
    assert stages[1] == stages[0] | {f"branches.{e}.layer3" for e in range(3)}
    assert stages[3] - stages[2] == {"layer1"} and stages[2] - stages[1] == {"layer2"}
    everything = {names[id(each)] for module in host.tunable_modules(None) for each in module.parameters()}
    assert everything - trains[3] == {"conv1.weight", "bn1.weight", "bn1.bias"}


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (TRAINS, r".*"),
        ((*TRAINS, "partial", 1), r"(branches\.\d\.)?layer3\..*"),
        (("full_tuning", False, "bn_tuning", True), r".*(bn\d|downsample\.1)\.(weight|bias)"),
        (("full_tuning", False, "bn_tuning", False, "bias_tuning", True), r".*bias"),
    ],
)
def test_what_trains(experts: int, words: tuple[object, ...], wanted: str, config: Config) -> None:
    """A step moves that and nothing else, and no statistics of norms but those of `bn_tuning`."""
    cfg = make(config, "ResNet-20", "num_experts", experts, *words, data="fake_lt")
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, info.class_names), info).train()
    net = method.model.encoder.net
    before = {name: each.clone() for name, each in net.state_dict().items()}
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    outcome = method({"image": images, "label": torch.arange(6), "weight": torch.ones(6)})
    outcome.loss_sum.backward()
    trains = {name for name, each in net.named_parameters() if each.requires_grad}
    assert trains == {name for name in before if re.fullmatch(wanted, name)} & dict(net.named_parameters()).keys()
    assert all((each.grad is not None) == (name in trains) for name, each in net.named_parameters())
    moved = {name for name, each in net.state_dict().items() if not torch.equal(each, before[name])}
    norms = {f"{name}." for name, each in net.named_modules() if isinstance(each, nn.BatchNorm2d)}
    tuned = {name for name in norms if cfg.bn_tuning and (cfg.partial is None or re.fullmatch(wanted, name))}
    assert {f"{name.rsplit('.', 1)[0]}." for name in moved} == tuned
    assert method.batch_coupled == bool(tuned)


@pytest.mark.parametrize("prec", PRECISIONS)
def test_every_precision(prec: str, config: Config) -> None:
    """What trains has its own dtype and is cast where it is used; a checkpoint holds all of it and the statistics."""
    cfg = make(config, "ResNet-20", "num_experts", 2, data="fake_lt")
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, info.class_names), info).train()
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    batch = {"image": images, "label": torch.arange(4), "weight": torch.ones(4)}  # a CPU is slow in fp16
    wanted = method(batch).logits.detach()
    precision = PRECISIONS[prec]
    method.model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    outcome = method(batch)
    outcome.loss_sum.backward()
    gradients = [each.grad for each in method.parameters()]
    assert all(each is not None and each.dtype == precision.trainable and each.isfinite().all() for each in gradients)
    assert (outcome.logits - wanted).abs().max() < (1e-3 if prec in ("fp32", "fp64") else 1)
    held = trained_state(method).keys()
    assert {f"model.encoder.net.{name}" for name in method.model.encoder.net.state_dict()} < held


@torch.no_grad()
def test_a_tuner_of_the_feature_is_each_experts_own(config: Config) -> None:
    words = ("num_experts", 2, "ssf_attn", True, "full_tuning", False, "bn_tuning", False)
    model = build_model(make(config, "ResNet-20", *words, data="fake_lt"), ["a", "b"])
    before = model.features(noise(32))
    model.encoder.tuners["ssf_attn"]["1"].scale.zero_()
    after = model.features(noise(32))
    assert torch.equal(after[:, 0], before[:, 0]) and not torch.equal(after[:, 1], before[:, 1])
    with model.encoder.untuned():
        assert torch.equal(
            model.features(noise(32))[:, 1], model.encoder.net.branches[1](model.encoder.trunk(noise(32)))
        )


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_arithmetic_of_trunk_and_branches(compute: torch.dtype) -> None:
    """Activations are channels-last and stay low between trunk and branch; features come out in fp32 or fp64."""
    host, whole = small(2, 2), small()
    assert host.net.branches[1].layer3[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
    full = host(noise(64))
    host.set_precision(compute), whole.set_precision(compute)
    shared = host.trunk(noise(64))
    assert shared.dtype == compute and shared.is_contiguous(memory_format=torch.channels_last)
    features = host(noise(64))
    assert features.dtype == host.dtype == (torch.float32 if compute == torch.bfloat16 else torch.float64)
    assert 0 < (features - full).abs().max() < 0.05 * full.abs().max()
    state = {re.sub(r"^branches\.0\.", "", name): each for name, each in host.net.state_dict().items()}
    whole.net.load_state_dict({name: each for name, each in state.items() if "branches" not in name})
    assert torch.equal(host.branch(shared, 0), whole(noise(64))), "the cut changes no number in low precision either"


def test_peft_reaches_the_branches(config: Config) -> None:
    words = ("peft", "LoRA", "peft_args", "{r: 2}", "partial", 1, "num_experts", 2, "full_tuning", False)
    model = check(make(config, "ResNet-10", *words, "bn_tuning", False, data="fake_lt"))
    assert model.peft is not None and len(model.peft.targets) == 2 * 3
    assert all(re.match(r"branches\.\d\.layer4\.", name) for name in model.peft.targets)


# --- weights -------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> tuple[dict[str, Tensor], Path]:
    """Weights of a small network as a Caffe conversion has them: pickled, with a classifier, without counters."""
    state = {name: each + 0.1 for name, each in make_resnet(TINY, 7).state_dict().items() if "tracked" not in name}
    path = tmp_path / "small.pth"
    torch.save({**state, "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}, path)
    return state, path


@pytest.mark.parametrize(("experts", "own"), [(1, None), (3, None), (3, 1), (2, 0), (2, 4)])
def test_a_file_goes_into_every_branch(
    experts: int, own: int | None, file: tuple[dict[str, Tensor], Path], tmp_path: Path
) -> None:
    state, path = file
    built = ResNetBackbone("Small", TINY).build(str(path), 224, 0, False, split=ExpertSplit(experts, own))
    assert built.pixel_stats == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) and not built.random_base
    for name, each in built.encoder.net.state_dict().items():
        if name.endswith("num_batches_tracked"):
            assert each == 0
        else:
            assert torch.equal(each, state[re.sub(r"^branches\.\d\.", "", name)])
    counted = {f"{name[:-4]}num_batches_tracked": torch.tensor(9) for name in state if name.endswith("mean")}
    save_file(state | counted, tmp_path / "timm.safetensors")
    again = ResNetBackbone("Small", TINY).build(
        str(tmp_path / "timm.safetensors"), 224, 1, False, split=ExpertSplit(experts, own)
    )
    own_state = built.encoder.net.state_dict()
    assert all(torch.equal(each, own_state[name]) for name, each in again.encoder.net.state_dict().items())


def test_a_file_of_another_network_is_refused(file: tuple[dict[str, Tensor], Path]) -> None:
    state, path = file

    def refused(changed: dict[str, Tensor], design: ResNetDesign = TINY) -> str:
        torch.save(changed, path)
        with pytest.raises(UserError) as caught:
            ResNetBackbone("Small", design).build(str(path), 224, 0, False, split=ExpertSplit(2))
        return str(caught.value)

    less = {name: each for name, each in state.items() if name != "layer4.0.bn3.running_var"}
    assert "not of Small: 2 missing (branches.0.layer4.0.bn3.running_var, branches.1." in refused(less)
    assert "1 unexpected (layer4.0.conv4.weight)" in refused(state | {"layer4.0.conv4.weight": torch.ones(1)})
    assert "unexpected (layer2.1." in refused(make_resnet(ResNetDesign((1, 2, 1, 1), True), 0).state_dict())
    assert "of another shape (layer1.0.conv1.weight" in refused(state, ResNetDesign((1, 1, 1, 1), True, 32, 4))
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        ResNetBackbone("Small", TINY).build(str(path), 224, 0, False)


@torch.no_grad()
def test_timms_weights_go_into_every_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = timm.create_model("resnet50", num_classes=0).eval()
    asked: list[tuple[str, bool]] = []
    monkeypatch.setattr(TimmBackbone, "create", lambda self, download: asked.append((self.name, download)) or theirs)
    built = BACKBONES["ResNet-50"].build("default", 64, 0, False, split=ExpertSplit(2, 1))
    assert asked == [("resnet50.a1_in1k", True)]
    assert torch.allclose(built.encoder(noise(64)), theirs(noise(64)).unsqueeze(1).expand(-1, 2, -1), atol=1e-5)


def test_weights_that_are_named_fit() -> None:
    named = {name: spec.weights for name, spec in BACKBONES.items() if isinstance(spec, ResNetBackbone)}
    assert {name for name, weights in named.items() if weights} == {f"ResNet-{n}" for n in (50, 101, 152)} | {
        "ResNeXt-50"
    }
    for name, weights in named.items():
        if weights:
            with torch.device("meta"):
                spec = BACKBONES[name]
                built = spec.build("default", 224, 0, False)
                theirs = timm.create_model(weights, num_classes=0)
            assert built.pixel_stats == (theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"])
            own = {key: each.shape for key, each in built.encoder.net.state_dict().items()}
            assert own == {key: each.shape for key, each in theirs.state_dict().items()}


def test_statistics_are_the_datas_own_from_scratch(config: Config) -> None:
    with torch.device("meta"):
        assert BACKBONES["ResNet-50"].build(None, 224, 0, False).pixel_stats is None
        assert BACKBONES["ResNet-32"].build("own.pth", 32, 0, False).pixel_stats is None
    model = build_model(
        make(config, "ResNet-32", data="fake_lt"), ["a"], pixel_stats=((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    )
    assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3]) and not model.random_base


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("backbone ResNet-32", ["no pre-trained weights of ResNet-32", "`pretrained none`"]),
        ("backbone ResNet-10 num_experts 3", ["no pre-trained weights of ResNet-10", "/path/to/file"]),
        ("backbone ResNet-50 pretrained openai", ["'openai'", "takes `default`, a local file, or none"]),
        ("backbone ResNet-50 reduce_dimension True", ["reduce_dimension", "pretrained to none"]),
        ("backbone ResNet-50 reduce_dimension True pretrained own.pth", ["reduce_dimension"]),
        ("backbone ResNet-50 zero_shot True", ["zero_shot", "text encoder"]),
        ("backbone ResNet-50 num_experts 2 expert_split 5", ["expert_split 5", "4 stages"]),
        ("backbone ResNet-32 pretrained none num_experts 2 expert_split 4", ["expert_split 4", "3 stages"]),
        ("backbone ResNet-50 full_tuning True partial 5", ["partial 5", "only 4 blocks"]),
        ("backbone ResNet-50 init_head text_feat", ["init_head text_feat", "ResNet-50"]),
        ("backbone ResNet-50 adaptformer True", ["adaptformer", "blocks of a ViT"]),
        ("backbone ResNet-60", ["ResNet-50"]),
    ],
)
def test_refused_without_reading_anything(words: str, parts: list[str], config: Config) -> None:
    with pytest.raises(UserError) as caught:
        check(config("imagenet_lt", "clip_vit_b16", "init_head", "none", *words.split()))
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value), caught.value


# --- for other programs --------------------------------------------------------------------------------------------


def exported(config: Config, folder: Path, name: str, *words: object) -> dict[str, Any]:
    cfg = make(config, name, "resolution", 64, *words, data="fake_lt")
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, info.class_names), info).eval()
    export(subject_of(cfg, method, info.class_names), "merged", folder)
    facts = json.loads((folder / "facts.json").read_text())
    scope: dict[str, Any] = {}
    exec(f"import timm\n{facts['network']['code']}", scope)
    scope["net"].load_state_dict(load_file(folder / "model.safetensors"))
    return {"net": scope["net"].eval(), "encoder": method.model.encoder}


@torch.no_grad()
def test_timm_runs_an_exported_network(config: Config, tmp_path: Path) -> None:
    found = exported(config, tmp_path / "50", "ResNet-50")
    assert torch.allclose(found["net"](noise(64)), found["encoder"](noise(64)), rtol=1e-3, atol=1e-3)
    for name, words in (("ResNet-32", ()), ("ResNet-10", ()), ("ResNet-50", REDUCED)):
        with pytest.raises(UserError, match="no other library has this network.*export onnx"):
            exported(config, tmp_path / "other", name, *words)
