"""Runs whose classifier is made of text features: training, resuming, evaluation, exports, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from small import filled
from small_text import CLASSES, fixture_tower, put_text_tuners
from tiers import slow_except

import tailtune
from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.trainers.config_checks import outline
from tailtune.trainers.dry_run import dry_run
from tailtune.trainers.losses import LOSSES, Prior, log_prior
from tailtune.trainers.methods import build_method
from tailtune.trainers.methods.fixed_texts import with_texts_as_weights

TEXT = "-d fake_lt -m tiny_clip classifier TextClassifier num_epochs 2 batch_size 32 max_test_images 40"
NAMES = tuple(f"class {k}" for k in range(10))


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


@pytest.mark.parametrize("formats", slow_except(["merged peft hub"], ["merged peft hub", "onnx"]))
def test_a_run_trains_is_evaluated_and_exported(formats: str, launch: Cli, tmp_path: Path) -> None:
    words = (TEXT, "text_lora True lora True output_dir run")
    done = launch(*words)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "output" / "run"
    whole = metrics(run)
    assert whole["params"]["head"] == 0 and whole["params"]["trainable"] == whole["params"]["tuner"]
    for more in ("test_only True tte True", "test_only True ensemble wise", "test_only True ensemble gla"):
        again = launch(*words, more)
        assert again.returncode == 0, again.stderr
    for name in formats.split():
        exported = launch(*words, "export", name)
        assert exported.returncode == 0, exported.stderr
        facts = json.loads((run / "export" / name / "facts.json").read_text())
        assert facts["head"]["type"] == "CosineClassifier" and facts["tuners"] == ["lora", "text_lora"]
    refused = launch(*words, "export lift")
    assert refused.returncode == 2 and "no classifier of text features" in refused.stderr
    model, images = tailtune.load(run), torch.randn(3, 3, 32, 32)
    logits = model.predict_logits(images)
    fixed = with_texts_as_weights(model.method)
    assert torch.equal(fixed.predict(images), logits) and model.method.model.text is not None
    assert not any("text" in name for name, _ in fixed.named_parameters())


def test_a_method_around_another_gets_the_fixed_texts_in_both(config: Any) -> None:
    cfg = config("fake_lt", "tiny_clip", "classifier", "TextClassifier", "text_lora", True, "method", "mixup")
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, NAMES), info).eval()
    fixed, images = with_texts_as_weights(method), torch.randn(2, 3, 32, 32)
    assert torch.equal(fixed.predict(images), method.predict(images))
    assert fixed.inner.model is fixed.model and method.inner.model is method.model


EXPERTS = ("num_experts", 3, "expert_split", 2, "adaptformer", True, "text_lora", True)


@pytest.mark.parametrize("method", ["classify", "ride", "sade", "dirmixe", "reslt", "batchformer", "mixup"])
def test_experts_share_the_texts_and_train_in_blocks_of_their_own(method: str, config: Any) -> None:
    words = ("classifier", "TextClassifier", *EXPERTS, "method", method, "loss_type", "CE")
    cfg = config("fake_lt", "tiny_clip", *words)
    built = build_method(cfg, build_model(cfg, NAMES), build_info(cfg)).train()
    batch = {"image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(4)}
    batch["weight"] = torch.ones(4)
    with built.model.one_step() as begin:
        begin(True)
        built(batch).loss_sum.backward()
    assert all((each.grad is not None) == each.requires_grad for each in built.parameters())
    assert built.eval().expert_logits(batch["image"]).shape == (4, 3, 10)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("num_experts", 3, "text_lora", True), "set expert_split to their number"),
        (("init_head", "class_mean", "text_lora", True), "leave out init_head class_mean"),
        (("backbone", "ResNet-20", "init_head", "none"), "needs a text encoder, and ResNet-20 has none"),
        (("backbone", "open_clip:ViT-B-16-SigLIP", "pretrained", "none"), "of OpenAI's kind only"),
        (("classifier", "CosineClassifier", "text_lora", True), "text_lora: only classifier TextClassifier reads"),
        (("text_vpt_shallow", True, "text_vpt_deep", True), "choose one of them"),
        (("text_lora", True, "text_partial", 3), "has only 2 blocks"),
        (("textclassifier.samples", 3, "text_lora", True, "prompt", "ensemble"), "takes one sentence"),
    ],
)
def test_what_does_not_go_together_is_refused(pairs: tuple[object, ...], message: str, config: Any) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_model(config("fake_lt", "tiny_clip", "classifier", "TextClassifier", *pairs), NAMES)


AFTER = "after.classifier TextClassifier after.text_lora True"


@pytest.mark.parametrize("method", ["crt", "h2t pair_sampler shuffle"])
def test_a_stage_with_a_classifier_of_its_own_is_refused(method: str, launch: Cli) -> None:
    done = launch(TEXT, "text_lora True after tiny_clip", AFTER, "method", method)
    assert done.returncode == 2 and "consists of text features; choose another classifier" in done.stderr


def test_a_dry_run_counts_the_texts(config: Any) -> None:
    """The dense layers of a block have 12 D² weights. The last block computes fewer tokens."""
    cfg = config("fake_lt", "tiny_clip", "classifier", "TextClassifier", "text_lora", True)
    tower = outline(cfg).model.text
    block = 2 * 12 * tower.width**2 * tower.tokens
    assert block < 1e9 * dry_run(cfg)[0]["gflops_of_texts"] < tower.depth * block


# --- some of the classes ----------------------------------------------------------------------------------------------


def sampled(samples: int | None, name: str = "text_lora") -> TextClassifier:
    tower = fixture_tower()
    put_text_tuners(tower, [name])
    head = TextClassifier(32, len(CLASSES), None, samples)
    head.attach(tower)
    return head.train()


def test_drawn_classes_stand_for_those_that_are_left_out() -> None:
    features, labels = filled((2, 32), 7, 1.0), torch.tensor([1, 1])
    head = sampled(1)
    head.tower.train()
    full = sampled(None)(features)
    seen = set()
    for seed in range(8):
        head.choose(labels, torch.Generator().manual_seed(seed))
        logits = head(features)
        (drawn,) = [c for c in (0, 2) if logits[0, c].isfinite()]
        seen.add(drawn)
        assert torch.allclose(logits[:, 1], full[:, 1], atol=1e-4) and logits[0, 2 - drawn] == -torch.inf
        assert torch.allclose(logits[:, drawn], full[:, drawn] + torch.tensor(2.0).log(), atol=1e-4)
        torch.nn.functional.cross_entropy(logits, labels).backward()
        assert all(each.grad.isfinite().all() for each in head.tower.parameters() if each.requires_grad)
    assert seen == {0, 2}
    head.tower.eval()
    assert torch.allclose(head(features), full, atol=1e-4)


def test_the_loss_of_sampled_classes() -> None:
    """Sample 3 with label 4: classes 1 and 4 are present, 0 and 3 are two of the three others."""
    counts = torch.tensor([500.0, 200.0, 50.0, 20.0, 5.0])
    z = 5 * torch.sin(1 + 3 + 2 * torch.arange(5.0)).unsqueeze(0)
    chosen = z + torch.tensor([1.5, 1.0, 1.0, 1.5, 1.0]).log()
    chosen[:, 2] = -torch.inf
    prior = Prior(log_prior(counts), counts)
    for logits, wanted in ((chosen, 5.305068), (z, 9.941084)):
        loss, _ = LOSSES["LA"](logits, torch.tensor([4]), torch.ones(1), prior)
        assert loss.item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if not loss.compares_all])
def test_losses_of_a_softmax_train_on_some_classes(name: str, config: Any) -> None:
    words = ("classifier", "TextClassifier", "text_lora", True, "textclassifier.samples", 2, "loss_type", name)
    cfg = config("fake_lt", "tiny_clip", *words)
    method = build_method(cfg, build_model(cfg, NAMES), build_info(cfg)).train()
    batch = {"image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), "label": torch.tensor([0, 3, 3, 0])}
    step = method({**batch, "weight": torch.ones(4)})
    assert step.logits.isfinite().sum(1).tolist() == [4] * 4 and step.loss_sum.isfinite()
    step.loss_sum.backward()
    assert all(each.grad.isfinite().all() for each in method.parameters() if each.requires_grad)
    assert method.batch_coupled and method.eval().predict(batch["image"]).isfinite().all()


def test_other_losses_and_methods_refuse_some_classes(launch: Cli) -> None:
    for words in ("loss_type LAS", "loss_type LADE", "method mixup"):
        done = launch(TEXT, "text_lora True textclassifier.samples 2", words)
        assert done.returncode == 2 and "leaves out logits of classes" in done.stderr


def test_a_run_with_sampled_classes(launch: Cli) -> None:
    done = launch(TEXT, "text_lora True textclassifier.samples 3 init_head none output_dir sampled")
    assert done.returncode == 0, done.stderr
    assert "the classes have no names, so their text features say nothing" in done.stdout + done.stderr
