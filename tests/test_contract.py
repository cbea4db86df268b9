"""Contracts over every entry of every table: what enters a table is covered at once."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from pairwise import pairwise
from small import head_context, other_value
from tiers import slow_except
from yacs.config import CfgNode

from tailtune.configs import with_values
from tailtune.configs.option import declarations
from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.images.transforms import AUGMENTS
from tailtune.models import build_model
from tailtune.models.backbones.prompts import PROMPTS
from tailtune.models.heads.classifiers import HEADS
from tailtune.models.heads.head_init import HEAD_INITS
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.text_tuners import TEXT_TUNERS
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import METHODS, Earlier, Method, build_method
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer
from tailtune.trainers.precision import PRECISIONS, cast_trainable
from tailtune.trainers.storage.checkpoint import fingerprint, load_checkpoint, save_checkpoint, trained_state

Config = Callable[..., CfgNode]
NAMES = tuple(f"class {k}" for k in range(10))


def build(cfg: CfgNode) -> Method:
    info = build_info(cfg)
    return build_method(cfg, build_model(cfg, info.class_names), info)


def batch(count: int = 6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    views = {"image": images, "partner": images.flip(0), "other_image": images.flip(3)}
    labels = {"label": torch.arange(count), "partner_label": torch.arange(count).flip(0)}
    return {**views, "other_partner": images.flip(0, 3), **labels, "weight": torch.ones(count)}


CONVNET = ("backbone", "timm:test_efficientnet.r160_in1k", "resolution", 32, "init_head", "none")
ON_CONVNET = ("full_tuning", "bias_tuning", "bn_tuning", "ssf_attn")
"""What a network with batch norms and without blocks of a ViT can host."""


def alone(name: str) -> tuple[object, ...]:
    """A tuner, on a backbone that has what it acts on."""
    return (*(CONVNET if name == "bn_tuning" else ()), name, True)


def of_head(name: str) -> tuple[object, ...]:
    """A head; one without weights of its own needs something that trains beside it, or that nothing trains."""
    more = {"TextClassifier": ("adaptformer", True), "TipAdapter": ("num_epochs", 0)}
    return ("classifier", name, *more.get(name, ()))


SEVERAL: tuple[str, ...] = ("ride_ea", "reslt")
"""Methods that mean nothing with one expert."""
OF_METHOD: dict[str, tuple[object, ...]] = {
    "tau_norm": ("classifier", "LinearClassifier", "num_epochs", 0),
    "glmc": ("pair_sampler", "shuffle"),
    "h2t": ("pair_sampler", "shuffle", "h2t.shift_bn", False),
}
"""What else a method asks for."""


def of_method(name: str, experts: int, loss: str = "CE") -> tuple[object, ...]:
    """A method of so many experts, after an earlier run if it needs one."""
    after = ("after", "tiny_clip") if METHODS[name].continues_from_earlier_run else ()
    return ("method", name, "num_experts", experts, "loss_type", loss, *after, *OF_METHOD.get(name, ()))


def earlier(cfg: CfgNode) -> Earlier:
    """What an earlier run with the same parts hands on, at the start of the run after it; it has trained nothing."""
    found = build(with_values(cfg, method="classify", pair_sampler=None, given=None))
    return Earlier(True, lambda: trained_state(found), lambda: found.eval().requires_grad_(False))


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bitwise; NaN are the logits of experts that were not asked."""
    return torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True)


ALL_AT_ONCE = [name for name in TUNERS if name not in ("bn_tuning", "vpt_shallow")]
"""Tuners that one ViT can have together; `make test-slow` goes through every pair."""


def choices() -> list[tuple[object, ...]]:
    """Every entry once, beside the defaults; tuners also on a network without blocks, and together."""
    tuners = [*map(alone, TUNERS), *((*CONVNET, name, True) for name in ON_CONVNET if name != "bn_tuning")]
    together = (tuple(chain.from_iterable((name, True) for name in ALL_AT_ONCE)),)
    heads = [(*of_head(name),) for name in HEADS]
    texts = [("classifier", "TextClassifier", name, True) for name in TEXT_TUNERS]
    losses = [("loss_type", name) for name in LOSSES]
    methods = [of_method("classify", 1), *(of_method(name, 3) for name in METHODS)]
    return [*tuners, *together, *heads, *texts, *losses, *methods]


def with_one_expert() -> list[tuple[object, ...]]:
    return [of_method(name, 1) for name in METHODS if name not in (*SEVERAL, "classify")]


def fits_loss(method: str, loss: str) -> bool:
    """Methods that adjust the logits themselves do not take every loss."""
    takes = {"sade": not LOSSES[loss].adjusts, "balpoe": not LOSSES[loss].adjusts}
    takes |= {"dirmixe": loss == "CE", "lgla": loss == "CE"}
    return takes.get(method, True)


def words_of(row: Mapping[str, str]) -> tuple[object, ...]:
    """The options of a row of `combinations`; networks with batch norms host what they can."""
    tuners = [row[axis] for axis in ("tuner", "second") if row[axis]]
    partial = ("partial", row["partial"])
    backbone = CONVNET if "bn_tuning" in tuners else ()
    chosen = chain.from_iterable((name, True) for name in dict.fromkeys(tuners))
    return (*backbone, *chosen, "classifier", row["head"], *partial, *of_method(row["method"], 3, row["loss"]))


def fits(row: Mapping[str, str]) -> bool:
    """Whether a row, or the part of it that is filled, can go together."""
    tuners = {row[axis] for axis in ("tuner", "second") if row.get(axis)}
    on_convnet = "bn_tuning" not in tuners or tuners <= set(ON_CONVNET) and row.get("partial", "none") == "none"
    head = OF_METHOD.get(row.get("method", ""), ())
    return (
        on_convnet
        and tuners != {"vpt_shallow", "vpt_deep"}
        and ("method" not in row or "loss" not in row or fits_loss(row["method"], row["loss"]))
        and ("classifier" not in head or row.get("head", "LinearClassifier") == "LinearClassifier")
        and (row.get("method") != "lgla" or row.get("head", "CosineClassifier") == "CosineClassifier")
    )


AXES: dict[str, list[str]] = {
    "tuner": ["", *TUNERS],
    "second": ["", *TUNERS],
    "head": [name for name in HEADS if name not in ("TextClassifier", "TipAdapter")],  # experts share their features
    "loss": [*LOSSES],
    "partial": ["none", "1", "[1,3]"],
    "method": [*METHODS],
}


@pytest.mark.slow
@pytest.mark.parametrize("row", pairwise(AXES, fits), ids=lambda row: "-".join(row.values()))
def test_every_pair_of_entries(row: dict[str, str], config: Config, tmp_path: Path) -> None:
    """Two tuners, a head, a loss, a range of blocks and a method: every pair of entries that goes together."""
    test_an_entry_trains_exactly_what_it_should_and_survives_a_round_trip(words_of(row), config, tmp_path)


@pytest.mark.slow
def test_the_full_size_model_takes_a_step(config: Config) -> None:
    """ViT-B/16, every tuner, random weights: one image forward and backward. RN50 for the tuner of batch norms."""
    for name in TUNERS:
        backbone = ("backbone", "CLIP-RN50") if name == "bn_tuning" else ()
        method = build(config("fake_lt", "clip_vit_b16", "pretrained", "none", *backbone, name, True))
        images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
        outcome = method.train()({"image": images, "label": torch.tensor([3]), "weight": torch.ones(1)})
        outcome.loss_sum.backward()
        assert all(each.grad is not None for each in method.parameters() if each.requires_grad), name


@pytest.mark.parametrize(
    "pairs",
    [*choices(), *(pytest.param(pairs, marks=pytest.mark.slow) for pairs in with_one_expert())],
    ids=lambda pairs: "-".join(map(str, pairs)),
)
def test_an_entry_trains_exactly_what_it_should_and_survives_a_round_trip(
    pairs: tuple[object, ...], config: Config, tmp_path: Path
) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", *pairs)
    method, twin = build(cfg), build(cfg)
    base = fingerprint(method.model)
    assert base == fingerprint(twin.model), "building twice gives the same weights"
    if cfg.after:
        method.after(earlier(cfg))
    before = {name: each.clone() for name, each in method.named_parameters()}
    groups = method.param_groups()
    optimizer = build_optimizer(groups, Plan.of(cfg, 6)) if groups else None
    for _ in range(2 if groups else 0):  # B of a LoRA is zero at first, so A moves from the second step on
        outcome = method.train()(batch())
        (outcome.loss_sum / outcome.weight).backward()
        assert torch.isfinite(outcome.loss_sum) and outcome.logits.shape == (6, 10)
        for name, each in method.named_parameters():
            assert (each.grad is not None) == each.requires_grad, name
        optimizer.step()
        optimizer.zero_grad()
    for name, each in method.named_parameters():
        assert torch.equal(each, before[name]) != each.requires_grad, name

    method.eval(), twin.eval()
    logits = method.expert_logits(batch()["image"])
    assert logits.shape == (6, cfg.num_experts, 10)
    assert same(method.predict(batch()["image"]), logits.nanmean(1))
    facts = {"base": base, "class_names": list(NAMES)}
    save_checkpoint(tmp_path / "checkpoint", method, facts)
    load_checkpoint(tmp_path / "checkpoint", twin, NAMES, base)
    assert same(twin.expert_logits(batch()["image"]), logits), "it is evaluated without the earlier run"
    trains = {name for name, each in method.named_parameters() if each.requires_grad} | method.frozen_trained
    stays = {id(each) for each in method.model.encoder.frozen_buffers()}
    buffers = {name for name, each in method.named_buffers() if id(each) not in stays} & method.state_dict().keys()
    assert trained_state(method).keys() == trains | buffers, "a checkpoint holds what trained and nothing else"


CHANGED: dict[str, object] = {
    "ride.diversity": 0.3,
    "ride.reweight_factor": 0.5,
    "distill.inner": "sade",
    "distill.temperature": 3.0,
    "distill.weight": 0.1,
    "distill.times_experts": True,
    "sade.inverse_strength": 1.0,
    "balpoe.taus": "[0, 1, 3]",
    "balpoe.spacing": "uniform",
    "dirmixe.power": 0.5,
    "dirmixe.variance": 50.0,
    "dirmixe.warm": 1.0,
    "dirmixe.concentration": 100.0,
    "dirmixe.draws": 7,
    "dirmixe.pool": "recycled",
    "ride_ea.top_choices": 3,
    "ride_ea.hidden": 8,
    "ride_ea.pos_weight": 1.0,
    "batchformer.inner": "sade",
    "batchformer.layers": 2,
    "batchformer.heads": 2,
    "batchformer.dropout": 0.1,
    "batchformer.mode": "sum",
    "batchformer.chunks": 2,
    "batchformer.kaiming": True,
    "tau_norm.power": 0.2,
    "mixup.inner": "sade",
    "mixup.alpha": 0.0,
    "h2t.inner": "sade",
    "h2t.ratio": 0.5,
    "h2t.shift_bn": True,
    "h2t.weight_scaling": True,
    "reslt.beta": 0.3,
    "reslt.medium_from": 0.1,
    "reslt.few_from": 0.4,
}
"""Another value of the options of methods; flags and numbers need no line here."""
for name, kind in METHODS.items():
    for declaration in declarations(kind.Options, "", name):
        if declaration.name not in CHANGED:
            CHANGED[declaration.name] = other_value(declaration.key)

OF_OPTION: dict[str, tuple[object, ...]] = {
    "h2t.shift_bn": ("backbone", "ResNet-20", "init_head", "none", "full_tuning", True, "bn_tuning", True),
}
"""What else an option asks for."""


def outcome(config: Config, method_name: str, *pairs: object) -> torch.Tensor:
    """A method's loss, weight, trainable parameters and what it predicts after an earlier run."""
    words = ("pretrained", "none", "drw_epoch", 0, *of_method(method_name, 3), *pairs)
    cfg = config("fake_lt", "tiny_clip", *words)
    method = build(cfg)
    if cfg.after:
        method.after(replace(earlier(cfg), method=lambda: build(config("fake_lt", "tiny_clip", "seed", 1)).eval()))
    method.before_training(10, 1)
    method.on_epoch(9, 10)
    torch.manual_seed(0)
    step = method.train()(batch())
    numbers = torch.stack([step.loss_sum, step.weight, torch.tensor(float(method.counts()["trainable"]))])
    return torch.cat([numbers, method.eval().predict(batch()["image"]).flatten()])


@pytest.fixture(scope="module")
def defaults() -> dict[tuple[object, ...], torch.Tensor]:
    """Outcomes of methods with their default options, which the options of a method share."""
    return {}


@pytest.mark.parametrize("key", CHANGED)
def test_an_option_of_a_method_has_an_effect(
    key: str, config: Config, defaults: dict[tuple[object, ...], torch.Tensor]
) -> None:
    """On its loss, on how much it trains, or on what it predicts after an earlier run."""
    rest = (key.split(".")[0], *OF_OPTION.get(key, ()))
    if rest not in defaults:
        defaults[rest] = outcome(config, *rest)
        assert torch.equal(outcome(config, *rest), defaults[rest]), "the outcome is reproducible"
    assert not torch.equal(outcome(config, *rest, key, CHANGED[key]), defaults[rest])


WITH_TUNERS = [
    pytest.param(name, prec, marks=[] if prec == "bf16" or name == "adaptformer" else pytest.mark.slow)
    for name, prec in product(TUNERS, PRECISIONS)
]
"""Every tuner in bf16 and one tuner in every precision; `make test-slow` goes through the product."""


@pytest.mark.parametrize(("name", "prec"), WITH_TUNERS)
def test_every_tuner_in_every_precision(name: str, prec: str, config: Config) -> None:
    """Trainable weights keep their dtype, logits stay near fp32's, gradients are finite."""
    method = build(config("fake_lt", "tiny_clip", "pretrained", "none", *alone(name)))
    with torch.no_grad():
        wanted = method.predict(batch()["image"])
    precision = PRECISIONS[prec]
    method.model.set_precision(precision.compute)
    cast_trainable(method, precision.trainable)
    outcome = method(batch())
    outcome.loss_sum.backward()
    gradients = [each.grad for each in method.parameters() if each.requires_grad]
    assert all(each is not None and each.dtype == precision.trainable and each.isfinite().all() for each in gradients)
    assert (outcome.logits - wanted).abs().max() < (1e-3 if prec in ("fp32", "fp64") else 0.6)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_in_half_precision(name: str, config: Config) -> None:
    """With class counts that fp16 does not have: iNaturalist's largest kingdom has 311,001 images."""
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "loss_type", name, "adaptformer", True)
    counts = torch.tensor([311_001, 100_000, 10_000, 1_000, 500, 200, 100, 50, 20, 5])
    info = replace(build_info(cfg), class_counts=counts)
    found = []
    for prec in ("fp32", "fp16"):
        method = build_method(cfg, build_model(cfg, info.class_names), info)
        method.model.set_precision(PRECISIONS[prec].compute)
        cast_trainable(method, PRECISIONS[prec].trainable)
        outcome = method(batch())
        outcome.loss_sum.backward()
        assert all(each.grad.isfinite().all() for each in method.parameters() if each.grad is not None)
        assert outcome.logits.dtype == torch.float32
        found.append(float((outcome.loss_sum / outcome.weight).detach()))
    assert found[1] == pytest.approx(found[0], rel=0.01)


EACH_INIT_AND_PROMPT = [
    *((name, next(iter(PROMPTS))) for name in HEAD_INITS),
    *(("text_feat", each) for each in PROMPTS),
]


@pytest.mark.parametrize(("name", "prompt"), slow_except(EACH_INIT_AND_PROMPT, product(HEAD_INITS, PROMPTS)))
def test_every_head_init_gives_unit_rows(name: str, prompt: str, config: Config) -> None:
    pairs = ("init_head", name, "prompt", prompt, "descriptors", "strings.json")
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", *pairs)
    model = build_model(cfg, NAMES, descriptors=[[f"string {k}"] for k in range(10)])
    model.init_head(head_context(torch.randn(20, model.encoder.feature_dim), torch.arange(20) % 10, 10))
    weight = model.head.get_parameter("weight")
    assert torch.allclose(weight.norm(dim=1), torch.ones(10), atol=1e-5)
    assert model.init is None, "the text encoder is let go"


@pytest.mark.parametrize("name", AUGMENTS)
def test_every_augmentation_gives_the_resolution(name: str, config: Config) -> None:
    data = build_data(config("fake_lt", "tiny_clip", "augment", name, "expand", 6))
    for index in (0, 3, 5):  # 3 and 5 are not square
        image = data.train[(index, 0)]["image"]
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8


@pytest.mark.parametrize("name", METHODS)
def test_what_a_method_overrides_it_says(name: str, config: Config) -> None:
    """A wrapper runs the model itself, and an export writes the heads' own logits, only where the method allows it."""
    method = build(config("fake_lt", "tiny_clip", "pretrained", "none", *of_method(name, 3))).eval()
    for parameter in method.parameters():  # also factors that begin at 1
        torch.nn.init.constant_(parameter, 0.5) if parameter.requires_grad else None
    kind = type(method)
    if kind.forward is not Method.forward or kind.expert_logits is not Method.expert_logits:
        assert not method.can_be_wrapped
    features = method.model.encoder.trunk(torch.zeros(2, 3, 32, 32))
    changes = not torch.equal(method.head_logits(features), method.model.logits(features))
    assert not changes or method.changes_head_logits
