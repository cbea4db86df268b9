"""LIFT+: its recipe in the shipped configs, its parameter counts and its learning rates."""

from collections.abc import Callable

import open_clip
import pytest
import torch
from small import Sizes, fill_tuners, filled, fixture_net, head_context, put_tuners
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs import names
from tailtune.models import BACKBONES
from tailtune.models.backbones.clip_text_encoder import ClipTextEncoder
from tailtune.models.backbones.openai_clip import TextModel
from tailtune.models.backbones.prompts import fill
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.heads.classifiers import CosineClassifier
from tailtune.models.heads.head_init import text_feat
from tailtune.trainers.config_checks import check
from tailtune.trainers.losses import LOSSES, Prior, log_prior
from tailtune.trainers.optimizers_and_schedules import Plan, learning_rate

Config = Callable[..., CfgNode]
SHIPPED = [name for name in names("model") if name.endswith("_lift_plus") and not name.startswith("tiny")]
BACKBONES_OF_LIFT_PLUS = [
    *("clip_rn50", "clip_rn101", "clip_vit_b16", "clip_vit_b32", "clip_vit_l14", "clip_vit_l14@336px"),
    *("in21k_vit_b16", "in21k_vit_b16@384px", "in21k_vit_l16", "in21k_vit_l16@384px"),
    *("in1k_rn50", "in1k_rn101", "in1k_rn152"),
]
RECIPE = {"num_epochs": 5, "batch_size": 128, "lr": 0.02, "weight_decay": 5e-4, "momentum": 0.9, "optimizer": "sgd"}
RECIPE |= {"loss_type": "LA", "classifier": "CosineClassifier", "scale": 25, "schedule": "cosine", "warmup_epochs": 0}
RECIPE |= {"augment": "mda", "mda_func": "convex", "interpolation": "bicubic", "tuner_rules": "lift_plus"}
RECIPE |= {"expand": 24, "tte": False, "tte_mode": "fivecrop", "partial": None, "prompt": "default", "decay_rule": None}


def test_every_backbone_of_the_original_has_a_config() -> None:
    assert set(SHIPPED) == {f"{name}_lift_plus" for name in BACKBONES_OF_LIFT_PLUS}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("data", ["places_lt", "inat2018"])
def test_the_recipe_is_that_of_the_original(name: str, data: str, config: Config) -> None:
    cfg = config(data, name)
    assert {key: cfg[key] for key in RECIPE} == RECIPE
    assert cfg.init_head == ("text_feat" if name.startswith("clip") else "100_shot")
    assert cfg.adaptformer == ("vit" in name) and cfg.ssf_attn == ("_rn" in name)
    assert cfg.resolution == {"6px": 336, "4px": 384}.get(name.removesuffix("_lift_plus")[-3:], 224)


COUNTS = {
    ("clip_vit_b16", "cifar100_ir100"): (101_436, 76_800),
    ("clip_vit_b16", "places_lt"): (175_212, 280_320),
    ("clip_vit_b16", "imagenet_lt"): (617_868, 768_000),
    ("clip_vit_b16", "inat2018"): (4_749_324, 6_253_056),
    ("clip_vit_l14", "cifar100_ir100"): (172_104, 102_400),
    ("clip_vit_l14", "places_lt"): (270_456, 373_760),
    ("clip_vit_l14", "imagenet_lt"): (860_568, 1_024_000),
    ("clip_vit_l14", "inat2018"): (6_368_280, 8_337_408),
    ("clip_rn50", "places_lt"): (2_048, 365 * 1024),
    ("clip_rn101", "places_lt"): (1_024, 365 * 512),
    ("in1k_rn50", "places_lt"): (4_096, 365 * 2048),
    ("in1k_rn101", "places_lt"): (4_096, 365 * 2048),
    ("in1k_rn152", "places_lt"): (4_096, 365 * 2048),
}
"""Backbone and data → learned parameters of tuner and head (successors.md §2.6)."""


@pytest.mark.parametrize(("backbone", "data"), COUNTS)
def test_parameters(backbone: str, data: str, config: Config) -> None:
    counts = check(config(data, f"{backbone}_lift_plus", "pretrained", "none")).counts()
    assert (counts["tuner"], counts["head"]) == COUNTS[backbone, data]


RESNETS = {
    "clip_rn50": (23_498_496, 26_496),
    "clip_rn101": (42_490_624, 52_608),
    "in1k_rn50": (23_498_496, 26_496),
    "in1k_rn101": (42_490_624, 52_608),
    "in1k_rn152": (58_134_272, 75_648),
}
"""Parameters of the four stages, and their biases."""


@pytest.mark.parametrize("name", RESNETS)
def test_tuners_of_the_four_stages_of_a_residual_network(name: str, config: Config) -> None:
    words = ("places_lt", f"{name}_lift_plus", "pretrained", "none", "ssf_attn", False)
    full = check(config(*words, "full_tuning", True, "full_tuning_layers", 4)).counts()["tuner"]
    biases = check(config(*words, "bias_tuning", True, "bias_tuning_layers", 4)).counts()["tuner"]
    assert (full, biases) == RESNETS[name]


def test_the_weights_of_imagenet_are_pinned() -> None:
    published = {name: str(BACKBONES[name].published("default")) for name in BACKBONES if name.startswith("IN1K")}
    assert published == {
        "IN1K-RN50": "timm:resnet50.a1_in1k",
        "IN1K-RN101": "timm:resnet101.a1h_in1k",
        "IN1K-RN152": "timm:resnet152.a1h_in1k",
    }


RATES = {5: [0.02, 0.01809017, 0.01309017, 0.00690983, 0.00190983]}
RATES[15] = [0.02, 0.01978148, 0.01913545, 0.01809017, 0.01669131, 0.015, 0.01309017, 0.01104528, 0.00895472]
RATES[15] += [0.00690983, 0.005, 0.00330869, 0.00190983, 0.00086455, 0.00021852]


@pytest.mark.parametrize("epochs", RATES)
def test_the_learning_rate_of_each_epoch(epochs: int, config: Config) -> None:
    plan = Plan.of(config("imagenet_lt", "clip_vit_b16_lift_plus", "num_epochs", epochs), 128)
    assert [learning_rate(plan, epoch, 1 + epoch) for epoch in range(epochs)] == pytest.approx(RATES[epochs], abs=6e-9)


# --- the head from text, and four steps of training ------------------------------------------------------------------


def text_encoder() -> ClipTextEncoder:
    """The text tower of the specification (successors.md §6): width 48, 3 heads, 2 blocks, QuickGELU."""
    shape = {"context_length": 77, "width": 48, "heads": 3, "layers": 2, "vocab_size": 49_408}
    model = TextModel({"text_cfg": shape, "embed_dim": 32, "quick_gelu": True})
    seeds = {"token_embedding.weight": (101, 0.5), "positional_embedding": (102, 0.25), "text_projection": (105, 0.2)}
    seeds |= {"ln_final.weight": (103, 0.1), "ln_final.bias": (104, 0.1)}
    for index in range(2):
        for place, offset in (("attn.in_proj_", 0), ("attn.out_proj.", 2), ("ln_1.", 4), ("ln_2.", 6)):
            for kind in ("weight", "bias"):
                seeds[f"transformer.resblocks.{index}.{place}{kind}"] = (110 + 30 * index + offset, 0.1)
                offset += 1
        for name, offset in (("c_fc.weight", 8), ("c_proj.weight", 9), ("c_fc.bias", 20), ("c_proj.bias", 21)):
            seeds[f"transformer.resblocks.{index}.mlp.{name}"] = (110 + 30 * index + offset, 0.1)
    state = {"logit_scale": torch.tensor(100.0).log()}
    for name, (seed, amplitude) in seeds.items():
        gamma = name.endswith(("ln_1.weight", "ln_2.weight", "ln_final.weight"))
        state[name] = filled(model.get_parameter(name).shape, seed, amplitude, float(gamma))
    model.load_state_dict(state, assign=True)
    projection = filled((64, 32), 8, 0.2).T
    return ClipTextEncoder(model, open_clip.get_tokenizer("RN50"), projection)


def head_of_texts() -> CosineClassifier:
    sentences = fill(("tench", "great white shark", "airplane_cabin"), "default")
    context = head_context(torch.empty(0, 64), torch.empty(0, dtype=torch.int64), 3)
    head = CosineClassifier(64, 3, 25.0)
    head.weight.data = text_feat(context, text_encoder(), sentences)
    return head


def test_the_head_from_texts_is_that_of_the_original() -> None:
    weight = head_of_texts().weight.detach()
    assert torch.allclose(weight[0, :4], torch.tensor([-0.137410, 0.093709, 0.263104, -0.092699]), atol=1e-5)
    assert float(weight.sum()) == pytest.approx(2.126011, abs=1e-4)


def test_four_steps_of_training_are_those_of_the_original() -> None:
    host, head = ViTEncoder(fixture_net()), head_of_texts()
    put_tuners(host, ["adaptformer"], Sizes(4, 3))
    fill_tuners(host)
    host.set_precision()
    images, labels = filled((4, 3, 16, 16), 0, 1.0), torch.tensor([0, 1, 2, 0])
    counts = torch.tensor([50, 10, 2])
    prior = Prior(log_prior(counts), counts)
    parameters = [each for each in (*host.parameters(), *head.parameters()) if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.02, 0.9, weight_decay=5e-4)
    losses: list[float] = []
    first: Tensor | None = None
    for _ in range(4):
        logits = head(host(images))
        first = logits.detach()[0] if first is None else first
        total, weight = LOSSES["LA"](logits, labels, torch.ones(4), prior)
        losses.append(float((total / weight).detach()))
        optimizer.zero_grad()
        (total / weight).backward()
        optimizer.step()
    assert first is not None
    assert torch.allclose(first, torch.tensor([-3.123252, -3.351782, -2.758477]), atol=1e-4)
    assert losses == pytest.approx([1.383834, 2.441543, 1.207106, 3.253928], abs=1e-4)
    modules = [host.tuners["adaptformer"][index]["mlp"] for index in "01"]
    with torch.no_grad():
        assert float(head.weight.sum()) == pytest.approx(2.308024, abs=2e-4)
        assert [float(module.scale) for module in modules] == pytest.approx([0.700966, 0.799199], abs=1e-5)
        assert float(modules[1].up_proj.weight.sum()) == pytest.approx(-0.483550, abs=1e-4)
