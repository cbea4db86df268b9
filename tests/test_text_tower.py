"""The text tower as a host of tuners: published features of a small CLIP, and what must not change them."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small import fill_tuners, filled
from small_text import CLASSES, fixture_image_encoder, fixture_images, fixture_tower, put_text_tuners, tokenize
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models import build_model
from tailtune.models.backbones.class_texts import ClassTexts, tokenized
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.tuners.table import add_tuners
from tailtune.models.tuners.text_tuners import TextTunerOptions
from tailtune.models.tuners.tuner_modules import ClipLora
from tailtune.models.tuners.tuner_options import ClipLoraOptions


def tuned(names: list[str], partial: Any = None, fast: bool = True) -> TextTower:
    tower = fixture_tower(fast)
    put_text_tuners(tower, names, TextTunerOptions(partial=partial))
    fill_tuners(tower)
    tower.set_precision()
    return tower


def before_projection(tower: TextTower) -> Tensor:
    """The features of the three classes before the projection [3, 48]."""
    tower.projection = torch.nn.Parameter(torch.eye(48), requires_grad=False)
    found = []
    normalize = F.normalize
    F.normalize = lambda x, dim: found.append(x) or normalize(x, dim=dim)
    try:
        tower.class_features()
    finally:
        F.normalize = normalize
    return found[0][tower.rows]


def logits(tower: TextTower) -> Tensor:
    head = TextClassifier(32, 3, None)
    head.attach(tower)
    return head(fixture_image_encoder()(fixture_images()))


def test_the_token_ids_are_those_of_clip() -> None:
    begin, end = [49406, 320, 1125, 539, 320], [269, 49407]
    names = {"tench": [1149, 634], "great white shark": [830, 1579, 7980], "airplane cabin": [16451, 14178]}
    for name, ids in names.items():
        found = tokenize([f"a photo of a {name}."])[0]
        assert found[: 7 + len(ids)].tolist() == [*begin, *ids, *end]


FEATURES = {
    (): ((1.126043, 0.027224, 0.058674, -0.056878), 0.476957, 12.415503),
    ("text_lora",): ((1.127343, 0.027749, 0.058187, -0.060226), 0.490207, 12.417608),
    ("text_adapter",): ((1.314426, 0.010869, 0.116256, -0.031199), 0.777506, 12.412051),
    ("text_adaptformer",): ((1.248836, 0.056465, 0.031140, -0.074081), 0.707502, 12.403155),
    ("text_ssf_attn", "text_ssf_mlp"): ((0.551219, 0.107312, 0.249277, 0.302151), 0.392239, 12.339877),
    ("text_vpt_deep",): ((0.976516, -0.122962, 0.340812, 0.285579), 0.295900, 12.400440),
    ("text_vpt_shallow",): ((0.995823, -0.189454, 0.317290, 0.215632), 0.219633, 12.400598),
}
"""Tuners → first four numbers of the feature of tench, sum and length of all three features."""
LOGITS = {
    (): ((-18.910881, -20.162291, -16.766956), (-20.960575, -22.673466, -18.906744)),
    ("text_lora",): ((-18.873966, -19.974718, -16.772394),),
    ("text_adaptformer",): ((-15.958233, -16.876379, -13.856708),),
    ("text_vpt_deep",): ((-19.744350, -21.780424, -17.743834),),
}


@pytest.mark.parametrize("names", FEATURES)
def test_features_are_those_of_the_original(names: tuple[str, ...]) -> None:
    first, total, length = FEATURES[names]
    found = before_projection(tuned(list(names)))
    assert torch.allclose(found[0, :4], torch.tensor(first), atol=2e-4)
    assert found.sum().item() == pytest.approx(total, abs=2e-3) and found.norm().item() == pytest.approx(
        length, abs=1e-4
    )
    if not names:
        assert found[0].norm().item() == pytest.approx(7.197477, abs=1e-5)


@pytest.mark.parametrize("names", LOGITS)
def test_logits_are_those_of_the_original(names: tuple[str, ...]) -> None:
    found = logits(tuned(list(names)))
    assert torch.allclose(found[: len(LOGITS[names])], torch.tensor(LOGITS[names]), atol=1e-3)


def padded(texts: ClassTexts) -> ClassTexts:
    """The same texts with all 77 tokens of each sentence."""
    return replace(texts, ids=F.pad(texts.ids, (0, 77 - texts.ids.shape[1])))


def test_what_follows_the_end_and_what_all_begin_with_change_nothing() -> None:
    """Cut, batched and with a shared beginning, in fp64, against every token of every sentence in every block."""
    sentences = [["a photo of a tench.", "a tench"], ["a photo of a great white shark."], ["an airplane cabin"]]
    fast, plain = (
        tuned(["text_lora", "text_vpt_deep"]).double(),
        tuned(["text_lora", "text_vpt_deep"], fast=False).double(),
    )
    texts = tokenized(tokenize, sentences)
    fast.set_texts(texts), plain.set_texts(padded(texts))
    assert fast.shared == 1 and len(fast.batches) < 4
    plain.batches = [replace(each, length=77) for each in plain.batches]
    assert torch.allclose(fast.class_features(), plain.class_features(), atol=1e-12)
    one_by_one = []
    for sentence in ("a photo of a tench.", "a tench"):
        plain.set_texts(tokenized(tokenize, [[sentence]]))
        one_by_one.append(plain.class_features())
    assert torch.allclose(fast.class_features()[0], torch.stack(one_by_one).mean(0)[0], atol=1e-12)


def test_the_shared_beginning_is_as_long_as_it_can_be() -> None:
    tower = fixture_tower()
    assert tower.shared == 5  # the start token and "a photo of a"
    tower.set_texts(tokenized(tokenize, [["tench"], ["tench"]]))
    assert tower.shared == 3 and len(tower.ids) == 1 and tower.class_features().shape == (2, 32)


def test_batches_hold_every_sentence_once_and_are_few() -> None:
    names = [" ".join(["tench"] * (1 + index % 12)) for index in range(4000)]
    tokens = tokenize([f"a photo of a {name}{index}." for index, name in enumerate(names)])
    texts = ClassTexts.of(tokens, [1] * len(names))
    rows = sorted(row for batch in texts.batches() for row in range(batch.start, batch.stop))
    assert rows == list(range(len(texts.ids)))
    padded = sum((each.stop - each.start) * each.length for each in texts.batches())
    assert padded < 1.1 * int((texts.ends + 1).sum()) and len(texts.batches()) < 20
    assert all(int(texts.ends[each.stop - 1]) == each.length - 1 for each in texts.batches())


def gradients(tower: TextTower) -> list[Tensor]:
    head = TextClassifier(32, 3, None)
    head.attach(tower)
    features = fixture_image_encoder()(fixture_images()).to(tower.compute_dtype)
    tower.train()
    loss = F.cross_entropy(head(features), torch.tensor([2, 0]))
    trained = [each for each in tower.parameters() if each.requires_grad]
    return list(torch.autograd.grad(loss, trained))


@pytest.mark.parametrize("name", ["text_lora", "text_vpt_deep", "text_full_tuning", "text_mask"])
def test_computing_again_gives_the_same_gradients(name: str) -> None:
    tower = tuned([name])
    kept = gradients(tower)
    tower.memory = 0
    again = gradients(tower)
    assert any(each.abs().sum() > 0 for each in kept)
    assert all(map(torch.equal, kept, again))


def test_micro_batches_of_a_step_share_one_pass_and_add_their_gradients() -> None:
    tower = tuned(["text_lora"]).double()
    head = TextClassifier(32, 3, None)
    head.attach(tower.train())
    features, labels = fixture_image_encoder()(fixture_images()).double(), torch.tensor([2, 0])
    trained = [each for each in tower.parameters() if each.requires_grad]
    whole = torch.autograd.grad(F.cross_entropy(head(features), labels, reduction="sum"), trained)
    passes = []
    counted, tower.class_features = tower.class_features, lambda: passes.append(1) or counted()  # type: ignore[method-assign]
    with head.one_step() as begin:
        for index in range(2):
            begin(index == 1)
            F.cross_entropy(head(features[index : index + 1]), labels[index : index + 1]).backward()
    assert len(passes) == 1
    assert all(torch.allclose(each.grad, wanted, atol=1e-12) for each, wanted in zip(trained, whole, strict=True))


def test_features_are_computed_again_only_when_a_tensor_has_changed() -> None:
    tower = tuned(["text_lora"]).eval()
    head = TextClassifier(32, 3, None)
    head.attach(tower)
    first = head.class_features()
    assert head.class_features() is first
    with torch.no_grad():
        tower.tuners["lora"]["0"]["q"].lora_B.mul_(2)
    assert not torch.equal(head.class_features(), first)
    tower.set_precision(torch.bfloat16)
    assert (head.class_features() - first).abs().max() > 1e-4


def test_at_the_start_tuners_that_add_nothing_are_zero_shot() -> None:
    plain = fixture_tower().class_features()
    for name in ("text_lora", "text_adapter", "text_adaptformer", "text_mask", "text_full_tuning", "text_bias_tuning"):
        tower = fixture_tower()
        put_text_tuners(tower, [name])
        assert torch.allclose(tower.class_features(), plain, atol=1e-6), name


COUNTS = {
    **{"text_lora": 98_304, "text_adapter": 67_632, "text_adaptformer": 67_644, "text_vpt_deep": 12_288},
    **{"text_bias_tuning": 67_584, "text_full_tuning": 37_828_608},
}


@pytest.mark.parametrize("name", COUNTS)
def test_numbers_of_parameters_are_those_of_lift_plus(name: str, config: Any) -> None:
    cfg = config("fake_lt", "clip_vit_b16", "classifier", "TextClassifier", name, True)
    with torch.device("meta"):
        model = build_model(cfg, CLASSES)
    assert model.counts()["trainable"] == COUNTS[name]


def test_clip_lora_in_both_towers_gives_the_logits_of_the_original() -> None:
    tower, encoder = fixture_tower(), fixture_image_encoder()
    options = ClipLoraOptions()
    put_text_tuners(tower, ["text_clip_lora"])
    add_tuners(encoder, {"clip_lora": options})
    for first, host in ((0, tower), (2, encoder)):
        for index, (number, site) in product(range(2), enumerate("qkv")):
            module, seed = host.tuners["clip_lora"][str(index)][site], 150 + 6 * (first + index) + 2 * number
            width = host.width
            with torch.no_grad():
                module.lora_A.copy_(filled((2, width), seed, 0.2).T)
                module.lora_B.copy_(filled((width, 2), seed + 1, 0.2).T)
    head = TextClassifier(32, 3, None)
    head.attach(tower.eval())
    wanted = [[-19.275259, -20.731853, -16.879421], [-21.000938, -23.718613, -18.813889]]
    assert torch.allclose(head(encoder.eval()(fixture_images())), torch.tensor(wanted), atol=2e-3)


def test_updates_of_other_matrices_are_merged_products() -> None:
    """Source: CLIP-LoRA, whose option `params` may be q, k, v and o: a weight is W + (α/√r) B A."""
    host, plain = fixture_image_encoder(), fixture_image_encoder()
    add_tuners(host, {"clip_lora": ClipLoraOptions(rank=2, alpha=3.0, params=["k", "o"])})
    factor = 3 / 2**0.5
    for index in range(2):
        modules, attention = host.tuners["clip_lora"][str(index)], plain.net.blocks[index].attn
        assert set(modules) == {"k", "proj"}
        with torch.no_grad():
            for module in modules.values():
                module.lora_B.normal_(generator=torch.Generator().manual_seed(index))
            attention.qkv.weight[64:128] += factor * (modules["k"].lora_A @ modules["k"].lora_B).T
            attention.proj.weight += factor * (modules["proj"].lora_A @ modules["proj"].lora_B).T
    images = fixture_images()
    assert torch.allclose(host.eval()(images), plain(images), atol=1e-4)
    for params in (["q", "q"], ["x"]):
        with pytest.raises(UserError, match="give each of q, k, v, o at most once"):
            add_tuners(fixture_image_encoder(), {"clip_lora": ClipLoraOptions(params=params)})


def test_the_first_weights_of_clip_lora_are_uniform() -> None:
    """A from U(-1/√in, 1/√in), and B zero (number 34 of tests/README.md)."""
    module = ClipLora(768, 32, 1.0, 0.0)
    assert 0.999 * 768**-0.5 < float(module.lora_A.detach().abs().max()) <= 768**-0.5 and not module.lora_B.any()


def test_dropout_is_repeated_where_activations_are_computed_again() -> None:
    tower = fixture_tower()
    put_text_tuners(tower, ["text_clip_lora"])
    for module in (module for module in tower.tuners.modules() if hasattr(module, "lora_B")):
        torch.nn.init.normal_(module.lora_B)
    found = []
    for memory in (1 << 30, 0):
        tower.memory = memory
        torch.manual_seed(1)
        found.append(gradients(tower))
    torch.manual_seed(2)
    assert all(map(torch.equal, *found)) and not torch.equal(gradients(tower)[0], found[0][0])


def test_clip_lora_has_as_many_parameters_as_the_original(config: Any) -> None:
    pairs = ("classifier", "TextClassifier", "clip_lora", True, "text_clip_lora", True)
    with torch.device("meta"):
        model = build_model(config("fake_lt", "clip_vit_b16", *pairs), CLASSES)
    assert model.counts()["trainable"] == 184_320 and model.batch_coupled
