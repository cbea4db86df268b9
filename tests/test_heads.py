"""Heads and their initialisation: LIFT's fixture (lift.md §13.4), and CLIP's own logits for zero-shot."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from yacs.config import CfgNode

from configs.seeding import seeded
from datasets import build_data
from datasets.bundle import eval_loader
from models import BACKBONES, Classifier, build_model
from models.clip import Clip
from models.head_init import HeadContext, class_mean
from models.heads import HEADS
from models.prompts import PROMPTS, fill

Config = Callable[..., CfgNode]

FIXTURE = {
    "CosineClassifier": [[8.320596, -15.386240, -23.276220], [24.377256, 8.067975, -6.152549]],
    "LinearClassifier": [[0.699425, -2.187427, -3.063168], [1.989191, 1.113450, -0.785993]],
}
NAMES = ("tench", "great white shark", "missile", "sunglasses")


def images(count: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)


def context(names: tuple[str, ...], batches: list[tuple[Tensor, Tensor]] | None = None) -> HeadContext:
    return HeadContext(names, torch.device("cpu"), lambda: batches or [], lambda tensor: tensor)


def original(seed: int = 0) -> open_clip.CLIP:
    """The CLIP that `pretrained none` makes for the tiny backbone, as open_clip computes it."""
    spec = BACKBONES["TinyCLIP"]
    assert isinstance(spec, Clip)
    with seeded(seed, "backbone"):
        return open_clip.CLIP(**spec._config()).eval()


def tokens(sentences: list[str]) -> Tensor:
    return open_clip.get_tokenizer("tailtune-tiny")(sentences)


# --- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURE)
def test_logits_are_those_of_the_original(name: str) -> None:
    """x[i, d] = sin(i + 1 + 0.5d), w[c, d] = cos(c + 1 + 0.3d), no bias, scale 25."""
    head = HEADS[name](6, 3, 25.0)
    with torch.no_grad():
        head.get_parameter("weight").copy_(torch.cos(torch.arange(1.0, 4).view(-1, 1) + 0.3 * torch.arange(6)))
        logits = head(torch.sin(torch.arange(1.0, 3).view(-1, 1) + 0.5 * torch.arange(6)))
    assert torch.allclose(logits, torch.tensor(FIXTURE[name]), atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_half_precision_features_are_fp32(name: str) -> None:
    head = HEADS[name](8, 3, 25.0)
    assert head(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_cosine_head_ignores_lengths() -> None:
    head, features = HEADS["CosineClassifier"](8, 3, 25.0), torch.randn(2, 8)
    before = head(features)
    with torch.no_grad():
        head.get_parameter("weight").mul_(7.0)
    assert torch.allclose(head(3 * features), before, atol=1e-5)
    assert before.abs().max() <= 25.0


def test_random_weights_of_the_cosine_head_are_unit_rows() -> None:
    norms = HEADS["CosineClassifier"](64, 10, 25.0).get_parameter("weight").norm(dim=-1)
    assert torch.allclose(norms, torch.ones(10))


# --- class means ---------------------------------------------------------------------------------------------------


def features_of(model: Classifier, cfg: CfgNode, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in eval_loader(build_data(cfg).plain, size, 0):
        yield model.features(batch["image"]), batch["label"]


@torch.no_grad()
def test_class_means_are_means_of_the_raw_features(config: Config) -> None:
    """Whatever the batch size: Σ features / n, then unit length; the head's rows are those."""
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "init_head", "class_mean")
    names = build_data(cfg).info.class_names
    model = build_model(cfg, names)
    batches = list(features_of(model, cfg, 64))
    features, labels = torch.cat([each for each, _ in batches]), torch.cat([each for _, each in batches])
    wanted = torch.stack([F.normalize(features[labels == c].double().mean(0), dim=0) for c in range(len(names))])
    for size in (1, 7, 64, 1000):
        found = class_mean(context(names, list(zip(features.split(size), labels.split(size), strict=True))), None, "")
        assert torch.allclose(found.double(), wanted, atol=1e-6)
    model.init_head(context(names, batches))
    assert torch.allclose(model.head.get_parameter("weight").double(), wanted, atol=1e-6)
    assert model.init is None  # and with it the text tower


def test_a_class_without_images_has_a_finite_row() -> None:
    features, labels = torch.randn(6, 5), torch.tensor([0, 0, 1, 3, 3, 3])
    rows = class_mean(context(("a", "b", "c", "d"), [(features, labels)]), None, "")
    assert torch.allclose(rows.norm(dim=-1), torch.ones(4))
    assert torch.allclose(rows[2], F.normalize(features.mean(0), dim=0), atol=1e-6)


# --- text ----------------------------------------------------------------------------------------------------------


def test_token_ids_are_clips() -> None:
    (sentence,) = fill("tench", PROMPTS["default"])
    assert sentence == "a photo of a tench."
    for name in ("tailtune-tiny", "ViT-B-16-quickgelu"):
        ids = open_clip.get_tokenizer(name)([sentence])[0].tolist()
        assert ids[:10] == [49406, 320, 1125, 539, 320, 1149, 634, 269, 49407, 0] and not any(ids[10:])


def test_prompts() -> None:
    assert fill("great_white-shark", PROMPTS["classname"]) == ["great white-shark"]
    assert len(fill("tench", PROMPTS["ensemble"])) == 80
    assert fill("tench", PROMPTS["ensemble"])[0] == "a bad photo of a tench."


@pytest.mark.parametrize("prompt", PROMPTS)
@torch.no_grad()
def test_text_features_go_back_through_the_projection(config: Config, prompt: str) -> None:
    """w = normalise(P·t), t the mean of the normalised features of a class's sentences."""
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "init_head", "text_feat", "prompt", prompt)
    model, clip = build_model(cfg, NAMES), original()
    model.init_head(context(NAMES))
    rows = model.head.get_parameter("weight")
    assert torch.allclose(rows.norm(dim=-1), torch.ones(4))
    for row, name in zip(rows, NAMES, strict=True):
        text = F.normalize(clip.encode_text(tokens(fill(name, PROMPTS[prompt]))), dim=-1).mean(0)
        assert torch.allclose(row, F.normalize(clip.visual.proj @ text, dim=0), atol=1e-5)


@torch.no_grad()
def test_classes_of_one_name_have_one_row(config: Config) -> None:
    """ImageNet has two classes called missile and two called sunglasses."""
    places = [657, 744, 836, 837]
    names = tuple(open_clip.IMAGENET_CLASSNAMES[place] for place in places)
    assert names == ("missile", "missile", "sunglasses", "sunglasses")
    model = build_model(config("fake_lt", "tiny_clip", "pretrained", "none"), names)
    model.init_head(context(names))
    rows = model.head.get_parameter("weight")
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[2], rows[3])
    assert not torch.allclose(rows[0], rows[2], atol=1e-3)


@pytest.mark.parametrize("seed", [0, 3])
@torch.no_grad()
def test_zero_shot_is_clips_own_classification(config: Config, seed: int) -> None:
    """exp(logit_scale)·cos(image, text) of open_clip, whatever `scale` says."""
    pairs = ("scale", 3, "seed", seed)
    model, clip = build_model(config("fake_lt", "zstiny_clip", "pretrained", "none", *pairs), NAMES), original(seed)
    model.init_head(context(NAMES))
    logits = model(images(16))[:, 0]
    text = clip.encode_text(tokens([f"a photo of a {name}." for name in NAMES]), normalize=True)
    image = clip.encode_image(images(16).float() / 127.5 - 1, normalize=True)
    wanted = clip.logit_scale.exp() * image @ text.T
    assert torch.allclose(logits, wanted, atol=1e-5 * float(wanted.abs().max()))
    assert torch.equal(logits.argmax(-1), wanted.argmax(-1))
    assert not any(each.requires_grad for each in model.parameters())


@torch.no_grad()
def test_the_text_head_scores_as_p_transposed(config: Config) -> None:
    """The numerator of the text-initialised cosine head, f·(P t), is CLIP's (P' f)·t."""
    model, clip = build_model(config("fake_lt", "tiny_clip", "pretrained", "none"), NAMES), original()
    model.init_head(context(NAMES))
    features = model.features(images(8))
    text = clip.encode_text(tokens([f"a photo of a {name}." for name in NAMES]), normalize=True)
    back = text @ clip.visual.proj.T  # [C, D]
    numerator = features @ (model.head.get_parameter("weight") * back.norm(dim=-1, keepdim=True)).T
    assert torch.allclose(numerator, clip.encode_image(images(8).float() / 127.5 - 1) @ text.T, atol=1e-5)


def test_heads_are_drawn_from_the_seed(config: Config) -> None:
    def weight(*pairs: object) -> Tensor:
        head: nn.Module = build_model(config("fake_lt", "tiny_clip", "pretrained", "none", *pairs), NAMES).head
        return head.get_parameter("weight").detach()

    drawn = [weight("seed", 0), weight("seed", 1), weight("seed", 0, "lora", True)]
    assert torch.equal(drawn[0], drawn[2])
    assert all(not torch.equal(a, b) for a, b in pairwise(drawn))
