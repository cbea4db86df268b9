"""Heads and their initialisation: LIFT's fixture (LIFT specification §13.4), and CLIP's own logits for zero-shot."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any
from unittest import mock

import open_clip
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from small import WITH_WEIGHTS, head_context, head_with
from tiers import slow_except
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import seeded
from tailtune.datasets.build_data import build_data
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.sources.class_descriptors import class_descriptors
from tailtune.models import BACKBONES, build_model
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone
from tailtune.models.backbones.prompts import PROMPTS, fill
from tailtune.models.heads.head_init import HEAD_INITS, NEEDS_TEXT, HeadContext, class_mean, k_shot, linear_probe
from tailtune.trainers.config_checks import check
from tailtune.trainers.head_preparation import prepare_head
from tailtune.trainers.methods import build_method

Config = Callable[..., CfgNode]

FIXTURE = {
    "CosineClassifier": [[8.320596, -15.386240, -23.276220], [24.377256, 8.067975, -6.152549]],
    "L2NormedClassifier": [[0.579441, -1.071488, -1.620941], [1.647951, 0.545411, -0.415925]],
    "LayerNormedClassifier": [[2.044096, 0.351788, -0.894991], [2.319824, 0.543439, -0.847384]],
    "LinearClassifier": [[0.699425, -2.187427, -3.063168], [1.989191, 1.113450, -0.785993]],
}
NAMES = ("tench", "great white shark", "missile", "sunglasses")


def images(count: int) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=draw)


def context(names: tuple[str, ...] = NAMES) -> HeadContext:
    """For what does not look at images."""
    return head_context(torch.empty(0, 1), torch.empty(0, dtype=torch.int64), len(names))


def original(seed: int = 0) -> open_clip.CLIP:
    """The CLIP that `pretrained none` makes for the tiny backbone, as open_clip computes it."""
    spec = BACKBONES["TinyCLIP"]
    assert isinstance(spec, OpenClipBackbone) and spec.config is not None
    with seeded(seed, "backbone"):
        return open_clip.CLIP(**json.loads(spec.config.read_text())).eval()


def tokens(sentences: list[str]) -> Tensor:
    open_clip.add_model_config(BACKBONES["TinyCLIP"].config)
    return open_clip.get_tokenizer("tailtune-tiny")(sentences)


# --- logits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIXTURE)
def test_logits_are_those_of_the_original(name: str) -> None:
    """x[i, d] = sin(i + 1 + 0.5d), w[c, d] = cos(c + 1 + 0.3d), no bias, scale 25."""
    head = head_with(name, 6, 3)
    with torch.no_grad():
        head.get_parameter("weight").copy_(torch.cos(torch.arange(1.0, 4).view(-1, 1) + 0.3 * torch.arange(6)))
        logits = head(torch.sin(torch.arange(1.0, 3).view(-1, 1) + 0.5 * torch.arange(6)))
    assert torch.allclose(logits, torch.tensor(FIXTURE[name]), atol=1e-5)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_logits_of_half_precision_features_are_fp32(name: str) -> None:
    head = head_with(name, 8, 3)
    assert head(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.float32


def test_the_cosine_head_ignores_lengths() -> None:
    head, features = head_with("CosineClassifier", 8, 3), torch.randn(2, 8)
    before = head(features)
    with torch.no_grad():
        head.get_parameter("weight").mul_(7.0)
    assert torch.allclose(head(3 * features), before, atol=1e-5)
    assert before.abs().max() <= 25.0


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_random_weights(name: str) -> None:
    """Unit rows; of the linear head normal ones with variance 2 / D, and no bias."""
    head = head_with(name, 256, 100)
    weight = head.get_parameter("weight")
    if name == "LinearClassifier":
        assert float(weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)
        assert not head.get_parameter("bias").any()
    else:
        assert torch.allclose(weight.norm(dim=-1), torch.ones(100))
        assert [each for each, _ in head.named_parameters()] == ["weight"]


# --- from images ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_class_means_are_means_of_the_raw_features(config: Config) -> None:
    """Whatever the batch size: Σ features / n, then unit length; the head's rows are those."""
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "init_head", "class_mean")
    data = build_data(cfg)
    model = build_model(cfg, data.info.class_names)
    features = torch.cat([model.features(batch["image"]) for batch in eval_loader(data.train_unaugmented, 64, 0)])
    labels = data.train_unaugmented.labels
    wanted = torch.stack([F.normalize(features[labels == c].double().mean(0), dim=0) for c in range(10)])
    for size in (1, 7, 64, 1000):
        assert torch.allclose(class_mean(head_context(features, labels, 10, size)).double(), wanted, atol=1e-6)
    model.init_head(head_context(features, labels, 10))
    assert torch.allclose(model.head.get_parameter("weight").double(), wanted, atol=1e-6)
    assert model.init is None  # and with it the text encoder


def test_a_class_without_images_has_a_finite_row() -> None:
    features, labels = torch.randn(6, 5), torch.tensor([0, 0, 1, 3, 3, 3])
    for name in ("class_mean", "10_shot", "linear_probe"):
        rows = HEAD_INITS[name](head_context(features, labels, 4), None, ())
        assert torch.allclose(rows.norm(dim=-1), torch.ones(4))
        assert torch.allclose(rows[2], F.normalize(features.mean(0), dim=0), atol=1e-6), name


def shots(k: int, labels: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of `k_shot`, and the positions of the images that it looked at."""
    features = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(2))
    whole, seen = head_context(features, labels, int(labels.max()) + 1, 5, seed), list[Tensor]()

    def recorded(positions: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        for each, index in whole.encode_images(positions):
            seen.append(index)
            yield each, index

    return k_shot(replace(whole, encode_images=recorded), shots=k), torch.cat(seen)


def test_k_shot_is_the_class_mean_of_k_images_a_class() -> None:
    counts = [20, 3, 1, 12]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[torch.randperm(36)]
    for k in (1, 10, 100):
        rows, seen = shots(k, labels)
        assert labels[seen].bincount().tolist() == [min(count, k) for count in counts]
        assert len(seen.unique()) == len(seen), "no image twice, and none but these is encoded"
        features = torch.randn(36, 8, generator=torch.Generator().manual_seed(2))
        assert torch.allclose(rows, class_mean(head_context(features[seen], labels[seen], 4)), atol=1e-6)
    first, again, other = (set(shots(10, labels, seed)[1].tolist()) for seed in (0, 0, 1))
    assert first == again != other, "the seed alone decides"
    assert set(shots(1, labels)[1].tolist()) < first


@pytest.mark.parametrize("classes", [2, 5])
def test_a_linear_probe_is_scikit_learns(classes: int, caplog: pytest.LogCaptureFixture) -> None:
    """Directions of its coefficients; two classes, of which it keeps one row, get opposite ones."""
    labels = torch.arange(200).remainder(classes * 2).clamp_max(classes - 1)  # the last class is the largest
    features = torch.randn(classes, 16)[labels] + torch.randn(200, 16)
    with caplog.at_level("INFO", "tailtune"), warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = linear_probe(head_context(features, labels, classes))
    assert "of 100 iterations" in caplog.text
    model = LogisticRegression(solver="lbfgs", C=1.0, class_weight="balanced", max_iter=100)
    found = torch.from_numpy(model.fit(features.double().numpy(), labels.numpy()).coef_)
    found = torch.cat([-found, found]) if classes == 2 else found
    assert torch.allclose(rows.double(), F.normalize(found, dim=-1), atol=1e-4)
    assert ((features @ rows.T).argmax(-1) == labels).float().mean() > 0.8


def test_a_linear_probe_of_some_shots_is_that_of_these_images() -> None:
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([150, 40, 120]))[torch.randperm(310)]
    features = torch.randn(3, 16)[labels] + torch.randn(310, 16)
    chosen = shots(100, labels)[1]
    of_these = linear_probe(head_context(features[chosen], labels[chosen], 3))
    found = HEAD_INITS["100_shot_linear_probe"](head_context(features, labels, 3), None, ())
    assert torch.allclose(found, of_these, atol=1e-6)
    assert not torch.allclose(found, linear_probe(head_context(features, labels, 3)), atol=1e-4)


def test_a_linear_probe_that_has_not_converged_says_so_in_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tailtune.models.heads.head_init.MAX_ITER", 3)
    with caplog.at_level("INFO", "tailtune"), warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = linear_probe(head_context(torch.randn(60, 4), torch.arange(60) % 3, 3))
    assert "after 3 of 3 iterations" in caplog.text and torch.allclose(rows.norm(dim=-1), torch.ones(3))


def prepared(cfg: CfgNode, world: int = 1) -> list[Tensor]:
    """The head's weight after `prepare_head` on each of so many processes; threads stand for them."""
    data, barrier, given = build_data(cfg), Barrier(world, timeout=60), dict[int, Any]()
    methods = [build_method(cfg, build_model(cfg, data.info.class_names), data.info) for _ in range(world)]

    def shared(rank: int, own: Any) -> list[Any]:
        given[rank] = own
        barrier.wait()
        found = [given[each] for each in range(world)]
        barrier.wait()
        return found

    def gather_to_main(accelerator: Any, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        found = shared(accelerator.process_index, tensors)
        return [torch.cat(parts) for parts in zip(*found, strict=True)] if accelerator.is_main_process else None

    def on_main(accelerator: Any, compute: Callable[[], Tensor]) -> Tensor:
        return shared(accelerator.process_index, compute() if accelerator.is_main_process else None)[0]

    def one(rank: int) -> None:
        accelerator: Any = SimpleNamespace(process_index=rank, num_processes=world, is_main_process=rank == 0)
        accelerator.device, accelerator.reduce = torch.device("cpu"), lambda tensor, _: sum(shared(rank, tensor))
        prepare_head(methods[rank], data, accelerator, 16, 0)

    preparation = "tailtune.trainers.head_preparation"
    with (
        mock.patch(f"{preparation}.gather_to_main", gather_to_main),
        mock.patch(f"{preparation}.on_main", on_main),
        ThreadPoolExecutor(world) as pool,
    ):
        list(pool.map(one, range(world)))
    return [method.model.head.get_parameter("weight") for method in methods]


@pytest.fixture
def few_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many would magnify rounding."""
    monkeypatch.setattr("tailtune.models.heads.head_init.MAX_ITER", 3)


@pytest.mark.parametrize("name", sorted(HEAD_INITS.keys() - NEEDS_TEXT))
@pytest.mark.usefixtures("few_iterations")
def test_tuners_have_no_part_in_it(name: str, config: Config) -> None:
    """Prompts change the features from the start; LIFT takes those of the backbone alone."""
    pairs = ("fake_lt", "tiny_clip", "pretrained", "none", "init_head", name)
    (plain,), (tuned,) = prepared(config(*pairs)), prepared(config(*pairs, "vpt_deep", True))
    assert torch.allclose(plain, tuned, atol=1e-6)


@pytest.mark.parametrize("name", slow_except(["class_mean", "linear_probe", "text_feat"], HEAD_INITS))
@pytest.mark.usefixtures("few_iterations")
def test_every_process_has_the_head_that_one_would_have(name: str, config: Config) -> None:
    """An odd number of images on two processes, one of them with padding."""
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "imb_factor", 0.13, "init_head", name)
    assert len(build_data(cfg).train_unaugmented) % 2
    (alone,), (first, second) = prepared(cfg), prepared(cfg, world=2)
    assert torch.equal(first, second) and torch.allclose(first, alone, atol=1e-5)


@pytest.mark.parametrize("name", WITH_WEIGHTS)
@pytest.mark.parametrize("init", HEAD_INITS)
def test_an_init_fills_the_weight_of_any_head_and_nothing_else(name: str, init: str, config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "classifier", name, "init_head", init)
    model = build_model(cfg, NAMES)
    with torch.no_grad():
        for each, parameter in model.head.named_parameters():
            parameter.fill_(3.0 if each == "weight" else 0.5)
    model.init_head(head_context(torch.randn(12, model.encoder.feature_dim), torch.arange(12) % 4, 4))
    assert torch.allclose(model.head.get_parameter("weight").norm(dim=-1), torch.ones(4), atol=1e-5)
    assert all((each == 0.5).all() for name, each in model.head.named_parameters() if name != "weight")


# --- text ----------------------------------------------------------------------------------------------------------


def test_token_ids_are_clips() -> None:
    ((sentence,),) = fill(["tench"], "default")
    assert sentence == "a photo of a tench."
    for name in ("tailtune-tiny", "ViT-B-16-quickgelu"):
        ids = open_clip.get_tokenizer(name)([sentence])[0].tolist()
        assert ids[:10] == [49406, 320, 1125, 539, 320, 1149, 634, 269, 49407, 0] and not any(ids[10:])


def test_prompts() -> None:
    assert fill(["great_white-shark", "tench"], "classname") == [["great white-shark"], ["tench"]]
    (sentences,) = fill(["tench"], "ensemble")
    assert len(set(sentences)) == 80 and sentences[0] == "a bad photo of a tench."
    assert fill(["a_b"], "a blurry photo of a {}.") == [["a blurry photo of a a b."]]
    assert fill(["x"], "{} in {fog} | one {}, {}") == [["x in {fog}", "one x, x"]]


@pytest.mark.parametrize("prompt", ["defalt", "a photo of a dog.", "a {} | a dog", ""])
def test_a_prompt_without_a_place_for_the_name_is_refused(prompt: str) -> None:
    with pytest.raises(UserError, match=r"(unknown|no) prompt.*choices: classname, .*or a sentence with \{\} in"):
        fill(["x"], prompt)


STRINGS = {
    "tench": ["a freshwater fish", "small eyes"],
    "great_white shark": ["teeth", "small eyes", "a grey back", "a fin"],
    "missile": ["a long tube"],
    "sunglasses": ["dark glass", "two lenses", "a frame"],
    "none of them": ["nothing"],
}


SEVERAL = "a photo of {} | art of a {}."


@pytest.mark.parametrize("prompt", slow_except(["default", SEVERAL], [*PROMPTS, SEVERAL]))
@torch.no_grad()
def test_text_features_go_back_through_the_projection(config: Config, prompt: str, tmp_path: Path) -> None:
    """w = normalise(P·t), t the mean of the normalised features of a class's sentences, however many each has."""
    (tmp_path / "strings.json").write_text(json.dumps(STRINGS))
    strings = class_descriptors("strings.json", [tmp_path], NAMES)
    assert list(map(len, strings)) == [2, 4, 1, 3]
    sentences = strings if prompt == "descriptor" else fill(NAMES, prompt)
    pairs = ("init_head", "text_feat", "prompt", prompt, "descriptors", "strings.json")
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", *pairs)
    model, clip = build_model(cfg, NAMES, descriptors=strings), original()
    model.init_head(context())
    rows = model.head.get_parameter("weight")
    assert torch.allclose(rows.norm(dim=-1), torch.ones(4))
    for row, own in zip(rows, sentences, strict=True):
        text = F.normalize(clip.encode_text(tokens(list(own))), dim=-1).mean(0)
        assert torch.allclose(row, F.normalize(clip.visual.proj @ text, dim=0), atol=1e-5)


def test_chunks_of_sentences_make_no_difference(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Tensor:
        model = build_model(config("fake_lt", "tiny_clip", "pretrained", "none", "prompt", "ensemble"), NAMES)
        model.init_head(context())
        return model.head.get_parameter("weight")

    whole = rows()
    monkeypatch.setattr("tailtune.models.backbones.clip_text_encoder.CHUNK", 33)
    assert torch.allclose(rows(), whole, atol=1e-6)


def test_an_error_of_the_text_tower_is_not_hidden(config: Config) -> None:
    model = build_model(config("fake_lt", "tiny_clip", "pretrained", "none"), NAMES)
    with (
        mock.patch("open_clip.CLIP.encode_text", side_effect=RuntimeError("out of memory")),
        pytest.raises(RuntimeError, match="out of memory"),
    ):
        model.init_head(context())


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, "no file .*strings.json.*github.com/shijxcs/LIFT, utils/descriptors_imagenet.json"),
        ("{", "strings.json must be a JSON object"),
        ('["tench"]', "strings.json must be a JSON object"),
        ('{"tench": "a fish"}', "strings.json must be a JSON object"),
        ('{"tench": [], "great white shark": ["x"]}', "strings.json must be a JSON object"),
        ('{"tench": ["x"], "missile": ["x"]}', "no entry for class 'great white shark'"),
    ],
)
def test_descriptors_that_do_not_fit(content: str | None, parts: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "strings.json").write_text(content)
    with pytest.raises(UserError, match=parts):
        class_descriptors("strings.json", [tmp_path / "elsewhere", tmp_path], NAMES)


def test_a_dry_run_asks_for_the_option_and_not_for_the_file(config: Config) -> None:
    pairs = ("fake_lt", "tiny_clip", "prompt", "descriptor")
    check(config(*pairs, "descriptors", "nowhere.json"))
    with pytest.raises(UserError, match="prompt descriptor needs `descriptors`"):
        check(config(*pairs))
    with pytest.raises(UserError, match=r"no file .*nowhere.json"):
        build_data(config(*pairs, "descriptors", "nowhere.json"))
    build_data(config("fake_lt", "tiny_clip", "descriptors", "nowhere.json"))  # another prompt does not read it


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
