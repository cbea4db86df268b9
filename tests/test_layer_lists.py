"""Where tuners act (`<tuner>_layers`), and the rules of LIFT+ for sizes and first weights (`tuner_rules lift_plus`)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small import SIDE, Sizes, fill_tuners, filled, fixture_net, small_net
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.configs.layer_list import as_layers
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.tuners.table import TUNERS, add_tuners
from tailtune.models.tuners.tuner_modules import Adapter, Lora, Prompts, TensorMasks
from tailtune.models.tuners.tuner_options import Case
from tailtune.models.tuners.tuner_sizes import aft_ratio
from tailtune.trainers.config_checks import check
from tailtune.trainers.dry_run import dry_run

Config = Callable[..., CfgNode]

READ = {
    "3": 3,
    "0": 0,
    "[1, 2]": [1, 2],
    "(1, 2)": [1, 2],
    "[]": [],
    " [ -1 ] ": [-1],
    "range(3)": [0, 1, 2],
    "range(0, 12, 4)": [0, 4, 8],
    "range(11, 8, -1)": [11, 10, 9],
    "list(range(2))": [0, 1],
    "[0] + [11]": [0, 11],
    "range(2) + [11]": [0, 1, 11],
}


@pytest.mark.parametrize("text", READ)
def test_a_list_of_layers_is_read(text: str) -> None:
    assert as_layers(text) == READ[text]


@pytest.mark.parametrize("value", [4, [0, 3], (1, 2), range(3)])
def test_a_value_of_yaml_is_taken(value: Any) -> None:
    assert as_layers(value) == (value if isinstance(value, int) else list(value))


REFUSED = ["first", "-1", "True", "[True]", "[1.5]", "[1", "1, a", "range()", "range(1, 2, 0)", "range(10**9)"]
REFUSED += [
    "range(1000000000)",
    "[0] * 9",
    "[i for i in range(3)]",
    "__import__('os').getpid()",
    "print(1)",
    "range(n=3)",
]
REFUSED += [
    "[" * 300 + "]" * 300,
    "1+" * 400 + "1",
    "list(list(range(2000)))",
    "[[1], [2]]",
    "''",
    "'12'",
    "{1, 2}",
    "",
]


@pytest.mark.parametrize("text", [*REFUSED, None, 1.5, True, {"a": 1}, [0, "1"]])
def test_anything_else_is_refused_and_never_run(text: Any) -> None:
    with pytest.raises(ValueError, match="^a number of last layers such as 3, a list"):
        as_layers(text)


@pytest.mark.parametrize("text", ["[1, 1]", "range(3) + [0]"])
def test_a_layer_is_named_once(text: str) -> None:
    with pytest.raises(ValueError, match="^a list in which each layer is once$"):
        as_layers(text)


def test_bad_layers_end_in_one_line(config: Config) -> None:
    words = ("fake_lt", "tiny_clip", "pretrained", "none", "lora", True, "lora_layers")
    with pytest.raises(UserError, match="lora_layers must be a number of last layers such as 3, .* not 'exit\\(\\)'"):
        config(*words, "exit()")
    for layers in ("[6]", "[-7]", "7"):
        with pytest.raises(UserError, match="this backbone has only 6 blocks, 0 to 5"):
            check(config(*words, layers))
    with pytest.raises(UserError, match=r"layers \[5, -1\]: a block is there twice"):
        check(config(*words, "[5,-1]"))


# --- features of LIFT+ -----------------------------------------------------------------------------------------------

PLUS: dict[str, tuple[list[str], list[int] | None, list[float], float, float]] = {
    "none": ([], None, [0.253950, -0.000131, -1.072292, -0.559912], -1.599674, 7.934539),
    "adaptformer": (["adaptformer"], None, [0.340872, -0.017933, -1.072215, -0.494278], -1.555807, 7.950828),
    "adapter": (["adapter"], None, [0.413009, 0.008426, -1.079778, -0.487666], -1.518407, 7.963099),
    "lora": (["lora"], None, [0.261205, -0.001602, -1.072638, -0.567212], -1.596487, 7.934761),
    "ssf": (["ssf_attn", "ssf_mlp"], None, [0.120385, 0.259164, -0.982393, -0.502843], -1.580434, 7.943328),
    "pt": (["vpt_deep"], [0, 1], [0.218047, -0.070038, -1.079345, -0.543645], -1.612972, 7.933716),
    "pt of block 0": (["vpt_deep"], [0], [0.192904, -0.082733, -1.067052, -0.642066], -1.625784, 7.933632),
    "pt of block 1": (["vpt_deep"], [1], [0.280261, -0.093208, -1.118165, -0.501609], -1.598803, 7.933045),
    "four": (
        ["vpt_deep", "lora", "ssf_attn", "ssf_mlp", "adaptformer"],
        None,
        [0.191118, 0.160034, -1.000447, -0.420824],
        -1.542455,
        7.962101,
    ),
}
"""Tuners, layers of the prompts, and feature[0:4], sum and L2 of the original (successors.md §6.2, 5 to 12)."""


def tuned(names: Sequence[str], layers: list[int] | int | None) -> ViTEncoder:
    host, sizes = ViTEncoder(fixture_net()), Sizes(4, 3)
    add_tuners(host, {name: replace(sizes.of(name), layers=layers) for name in names})
    fill_tuners(host)
    host.set_precision()
    return host


@pytest.mark.parametrize("case", PLUS)
def test_features_are_those_of_lift_plus(case: str) -> None:
    names, layers, first, total, norm = PLUS[case]
    with torch.no_grad():
        feature = tuned(names, layers)(filled((1, 3, SIDE, SIDE), 0, 1.0))[0]
    assert torch.allclose(feature[:4], torch.tensor(first), atol=1e-4)
    assert float(feature.sum()) == pytest.approx(total, abs=2e-4)
    assert float(feature.norm()) == pytest.approx(norm, abs=1e-4)


@pytest.mark.parametrize("name", [name for name, tuner in TUNERS.items() if name != "bn_tuning"])
@pytest.mark.parametrize(
    ("layers", "blocks"), [(1, [1]), ([0], [0]), ([-1], [1]), ([1, 0], [1, 0]), (0, []), (None, [0])]
)
def test_a_tuner_acts_on_its_own_layers(name: str, layers: Any, blocks: list[int]) -> None:
    """Whatever `partial`, here [0,1), says for the others."""
    host, sizes = ViTEncoder(small_net()), Sizes(4, 3)
    other = "lora_mlp" if name != "lora_mlp" else "adapter"
    options = {name: replace(sizes.of(name), layers=layers), other: sizes.of(other)}
    add_tuners(host, options, partial=[0, 1])
    wanted = blocks[:1] if TUNERS[name].first_only else blocks
    trains = {n for n, parameter in host.named_parameters() if parameter.requires_grad}
    if TUNERS[name].insert:
        assert {int(n.split(".")[2]) for n in trains if n.startswith(f"tuners.{name}.")} == set(wanted)
    else:
        assert {int(n.split(".")[2]) for n in trains if n.startswith("net.")} == set(wanted)
    assert {n.split(".")[2] for n in trains if n.startswith(f"tuners.{other}.")} == {"0"}
    assert list(host.tuned_blocks[name]) == wanted


def test_stages_of_a_residual_network_are_layers(config: Config) -> None:
    words = ("fake_lt", "tiny_clip", "pretrained", "none", "backbone", "timm:test_resnet", "init_head", "none")
    whole = check(config(*words, "full_tuning", True)).counts()["tuner"]
    stages = [
        check(config(*words, "full_tuning", True, "full_tuning_layers", f"[{k}]")).counts()["tuner"] for k in range(4)
    ]
    last = check(config(*words, "full_tuning", True, "full_tuning_layers", 2)).counts()["tuner"]
    assert last == stages[2] + stages[3] and 0 < sum(stages) < whole, "the stem belongs to no stage"


# --- sizes -----------------------------------------------------------------------------------------------------------

B16 = ("backbone", "CLIP-ViT-B/16", "pretrained", "none", "tuner_rules", "lift_plus")
COUNTS = {
    "adaptformer": (101_436, 175_212, 617_868, 4_749_324),
    "adapter": (101_424, 175_200, 617_856, 4_749_312),
    "lora": (73_728, 147_456, 589_824, 4_718_592),
    "vpt_deep": (73_728, 147_456, 589_824, 4_718_592),
    "ssf_attn ssf_mlp": (165_888,) * 4,
    "bias_tuning": (101_376,) * 4,
    "full_tuning": (85_054_464,) * 4,
}
LARGE = {
    "adaptformer": (172_104, 270_456, 860_568, 6_368_280),
    "lora": (98_304, 196_608, 786_432, 6_291_456),
    "vpt_deep": (98_304, 196_608, 786_432, 6_291_456),
    "ssf_attn ssf_mlp": (442_368,) * 4,
    "bias_tuning": (270_336,) * 4,
    "full_tuning": (302_309_376,) * 4,
}
"""Tuner → learned parameters of the original for 100, 365, 1000 and 8142 classes (successors.md §2.6)."""
DATA = ("cifar100_ir100", "places_lt", "imagenet_lt", "inat2018")


@pytest.mark.parametrize("data", range(4))
@pytest.mark.parametrize("tuners", COUNTS)
def test_parameters_of_vit_b16(tuners: str, data: int, config: Config) -> None:
    on = [word for name in tuners.split() for word in (name, True)]
    assert check(config(DATA[data], "clip_vit_b16", *B16, *on)).counts()["tuner"] == COUNTS[tuners][data]


@pytest.mark.parametrize("data", range(4))
@pytest.mark.parametrize("tuners", LARGE)
def test_parameters_of_vit_l14(tuners: str, data: int, config: Config) -> None:
    on = [word for name in tuners.split() for word in (name, True)]
    cfg = config(DATA[data], "clip_vit_l14", "pretrained", "none", "tuner_rules", "lift_plus", *on)
    assert check(cfg).counts()["tuner"] == LARGE[tuners][data]


@pytest.mark.parametrize("classes", [100, 365, 1000, 8142])
@pytest.mark.parametrize("selected", [1, 3, 12])
def test_sizes_depend_on_the_selected_layers(classes: int, selected: int) -> None:
    """2^⌊log2(C / 2ℓ)⌋ for adapters, of C / 4ℓ for LoRA and of C / ℓ for prompts."""
    case = Case(classes, 12, selected, 768, "lift_plus")
    share = classes / selected
    for name, size, wanted in (
        ("adapter", "dim", share / 2),
        ("lora", "dim", share / 4),
        ("vpt_deep", "length", share),
    ):
        found = getattr(TUNERS[name].options.filled(case), size)
        assert found <= max(1, wanted) < 2 * found, name
    assert (
        TUNERS["lora"].options.filled(replace(case, rules="lift")).dim == {100: 4, 365: 8, 1000: 32, 8142: 256}[classes]
    )


def test_three_layers_have_the_sizes_of_the_original(config: Config) -> None:
    words = ("imagenet_lt", "clip_vit_b16", *B16, "adaptformer", True, "vpt_deep", True)
    words += ("adaptformer_layers", "range(3)", "vpt_deep_layers", 3)
    _, derived = dry_run(config(*words))
    assert (derived["adapter_dim"], derived["vpt_len"]) == (128, 256)


def test_no_layer_has_no_parameter(config: Config) -> None:
    words = ("imagenet_lt", "clip_vit_b16", *B16)
    for name in ("adaptformer", "lora", "vpt_deep", "vpt_shallow", "mask", "full_tuning"):
        assert check(config(*words, name, True, f"{name}_layers", 0)).counts()["tuner"] == 0


def test_a_size_that_is_given_stays() -> None:
    case = Case(1000, 12, 3, 768, "lift_plus")
    assert replace(TUNERS["lora"].options, dim=7).filled(case).dim == 7  # type: ignore[attr-defined,call-arg]
    assert replace(TUNERS["vpt_deep"].options, length=7).filled(case).length == 7  # type: ignore[attr-defined,call-arg]


# --- first weights ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_first_weights_are_those_of_lift_plus() -> None:
    torch.manual_seed(0)
    down, plain = Adapter(768, 64, uniform=True).down_proj.weight, Adapter(768, 64).down_proj.weight
    assert float(down.abs().max()) == pytest.approx(0.036084, abs=1e-5) and float(plain.abs().max()) > 0.06
    assert (
        float(down.std()) == pytest.approx(float(plain.std()), rel=0.02) == pytest.approx((3 * 768) ** -0.5, rel=0.02)
    )
    prompts = Prompts(64, 768, None).prompt
    assert float(prompts.std()) == pytest.approx(0.02, rel=0.02) and float(prompts.abs().max()) > 0.06
    assert float(Prompts(64, 768, 16).prompt.abs().max()) == pytest.approx(0.0625, abs=1e-4)
    assert float(Lora(768, 768, 32).lora_A.abs().max()) == pytest.approx(0.176777, abs=1e-4)


@pytest.mark.parametrize("rules", ["lift", "lift_plus"])
def test_the_rules_choose_the_first_weights(rules: str) -> None:
    case, plus = Case(100, 12, 12, 768, rules), rules == "lift_plus"
    inits = [TUNERS[name].options.filled(case).init for name in ("adapter", "adaptformer", "vpt_deep")]  # type: ignore[attr-defined]
    assert inits == (["uniform", "uniform", "normal"] if plus else ["normal", "normal", "uniform"])


# --- a random subset of each tensor (`aft`) --------------------------------------------------------------------------


def test_features_of_aft_are_those_of_lift_plus() -> None:
    host = ViTEncoder(fixture_net())
    add_tuners(host, {"aft": replace(TUNERS["aft"].options, ratio=0.01)})  # type: ignore[call-arg]
    with torch.no_grad():
        for masks in host.tuners["aft"].values():
            for number, (name, mask) in enumerate(masks.items()):
                count = int((mask.positions < host.layers(0)[name].weight.numel()).sum())
                for part, seed in ((slice(count), 120), (slice(count, None), 121)):
                    values = mask.values[part]
                    values += filled(values.shape, seed + 2 * number) if len(values) else 0
        host.set_precision()
        feature = host(filled((1, 3, SIDE, SIDE), 0, 1.0))[0]
    assert sum(each.numel() for each in host.tuners.parameters()) == 982
    assert torch.allclose(feature[:4], torch.tensor([0.284605, -0.014498, -1.082083, -0.536255]), atol=1e-4)
    assert float(feature.sum()) == pytest.approx(-1.563523, abs=2e-4)
    assert float(feature.norm()) == pytest.approx(7.937796, abs=1e-4)


def positions(layer: torch.nn.Linear, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Positions in the weight, and in the bias."""
    found, size = TensorMasks(layer, share, seed).positions.tolist(), layer.weight.numel()
    return [each for each in found if each < size], [each - size for each in found if each >= size]


def test_positions_of_aft_are_those_of_the_original() -> None:
    qkv, out, fc1, fc2 = (torch.nn.Linear(*sizes) for sizes in ((64, 192), (64, 64), (64, 256), (256, 64)))
    weights, biases = positions(qkv, 0.01)
    assert len(weights) == 122 and weights[:6] == [196, 227, 262, 350, 587, 723] and biases == [44]
    weights, biases = positions(out, 0.01)
    assert len(weights) == 40 and weights[:4] == [9, 155, 316, 873] and not biases
    weights, biases = positions(fc1, 0.01)
    assert len(weights) == 163 and weights[:6] == [5, 75, 119, 142, 277, 497] and biases == [55, 172]
    again, biases = positions(fc2, 0.01)
    assert again == weights and not biases, "a tensor of the same size"


def test_positions_of_aft_in_a_layer_of_real_size() -> None:
    weights, _ = positions(torch.nn.Linear(768, 2304), 0.01)
    assert len(weights) == 17_694 and weights[:6] == [20, 134, 193, 201, 464, 499] and sum(weights) == 15_700_787_514


def test_blocks_of_aft_share_their_positions_and_a_seed_changes_them() -> None:
    host = ViTEncoder(small_net())
    add_tuners(host, {"aft": replace(TUNERS["aft"].options, ratio=0.1, seed=3)})  # type: ignore[call-arg]
    first, second = (host.tuners["aft"][index]["qkv"].positions for index in "01")
    assert torch.equal(first, second)
    layer = host.net.blocks[0].attn.qkv
    assert not torch.equal(TensorMasks(layer, 0.1, 4).positions, first)


def test_aft_changes_nothing_at_the_start_and_trains_only_its_values() -> None:
    host = ViTEncoder(small_net(qkv_bias=False))
    images = filled((2, 3, SIDE, SIDE), 0, 1.0)
    before = host(images)
    add_tuners(host, {"aft": replace(TUNERS["aft"].options, ratio=0.05, layers=[1])})  # type: ignore[call-arg]
    host.set_precision()
    assert torch.allclose(host(images), before, atol=1e-6)
    host(images).square().sum().backward()
    trained = [name for name, each in host.named_parameters() if each.grad is not None]
    assert trained and all(name.startswith("tuners.aft.1.") for name in trained)


AFT = {
    "all": (76_752, 280_284, 767_940, 6_252_996),
    "attn": (76_776, 280_296, 767_976, 6_253_032),
    "mlp": (76_788, 280_296, 767_964, 6_253_032),
}


@pytest.mark.parametrize("data", range(4))
@pytest.mark.parametrize("loc", AFT)
def test_parameters_of_aft(loc: str, data: int, config: Config) -> None:
    cfg = config(DATA[data], "clip_vit_b16", *B16[:-2], "aft", True, "aft_loc", loc)
    assert check(cfg).counts()["tuner"] == AFT[loc][data]


@pytest.mark.parametrize("tuner", ["mask", "aft"])
def test_a_share_depends_on_the_width_of_the_blocks_alone(tuner: str, config: Config) -> None:
    """Text features that train make the encoder end in a narrower space."""
    words = ("fake_lt", "tiny_clip", "pretrained", "none", "num_classes", 1000, tuner, True)
    shares = [dry_run(config(*words, *text))[1][f"{tuner}_ratio"] for text in ((), ("classifier", "TextClassifier"))]
    assert shares[0] == shares[1] == {"mask": 0.108, "aft": aft_ratio(1000, 6, 128, "all")}[tuner]


def test_a_share_that_trains_nothing_is_refused(config: Config) -> None:
    with pytest.raises(UserError, match="aft_ratio 0.0 is no share of the weights; choose one above 0 and up to 1"):
        check(config("fake_lt", "tiny_clip", "pretrained", "none", "aft", True, "aft_ratio", 0))
    for tuner in ("mask", "aft"):
        with pytest.raises(UserError, match=f"{tuner}_ratio is too small; choose a larger share"):
            check(config("fake_lt", "tiny_clip", "pretrained", "none", tuner, True, f"{tuner}_ratio", 1e-9))


def test_more_classes_than_weights_train_every_weight() -> None:
    assert aft_ratio(100_000, 1, 64, "all") == 1.0
