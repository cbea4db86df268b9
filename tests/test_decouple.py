"""Classifiers made after the representation: cRT, LWS, tau-normalisation."""

import json
import shlex
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from tiers import slow_except
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs import UserError, load_configs
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model
from tailtune.models.heads.expert_heads import heads_of
from tailtune.trainers.config_checks import check, validate
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.option_schema import declared
from tailtune.trainers.precision import PRECISIONS, cast_trainable
from tailtune.trainers.storage.checkpoint import trained_state
from tailtune.trainers.storage.resume_states import ResumeStates

Config = Callable[..., CfgNode]
LINEAR = ("classifier", "LinearClassifier")


def build(config: Config, name: str, *pairs: object, experts: int = 2) -> Any:
    after = () if name == "classify" else ("after", "tiny_clip")
    rest = ("num_epochs", 0) if name == "tau_norm" else ()
    words = ("pretrained", "none", "init_head", "none", "num_experts", experts, "method", name, *after, *rest, *pairs)
    cfg = config("fake_lt", "tiny_clip", *words)
    info = build_info(cfg)
    return build_method(cfg, build_model(cfg, info.class_names), info)


def earlier(config: Config, *pairs: object, experts: int = 2) -> Method:
    """Another model than a fresh one, with random tuners, heads and biases."""
    method = build(config, "classify", *pairs, experts=experts)
    for each in method.parameters():
        each.data += 0.05 * torch.randn_like(each) if each.requires_grad else 0
    return method


def images() -> Tensor:
    return torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_crt_keeps_the_encoder_and_begins_the_head_anew(config: Config) -> None:
    words = ("adaptformer", True)
    first, method, fresh = earlier(config, *words), build(config, "crt", *words), build(config, "classify", *words)
    method.start_from({**trained_state(first), "mixer.layers.0.linear1.weight": torch.ones(2, 2)})
    assert torch.equal(method.model.features(images()), first.model.features(images()))
    weights = [[head.get_parameter("weight") for head in heads_of(each.model.head)] for each in (method, fresh, first)]
    for own, random, old in zip(*weights, strict=True):
        assert torch.equal(own, random) and not torch.equal(own, old), "as a fresh run's"
    assert {name for group in method.param_groups() for name in [group["name"]]} == {"head"}


@torch.no_grad()
def test_lws_scales_the_rows(config: Config) -> None:
    first, method = earlier(config, *LINEAR), build(config, "lws", *LINEAR)
    method.start_from(trained_state(first))
    assert torch.equal(method.expert_logits(images()), first.expert_logits(images())), "as it was, at first"
    method.scales.copy_(torch.rand(2, 10) + 0.5)
    found = method.expert_logits(images())
    for expert, head in enumerate(heads_of(first.model.head)):
        for each in head.parameters():
            each *= method.scales[expert].view(-1, *[1] * (each.ndim - 1))
    assert torch.allclose(found, first.expert_logits(images()), atol=1e-5)
    assert [each.shape for group in method.param_groups() for each in group["params"]] == [(2, 10)]


@pytest.mark.parametrize("experts", [1, 2])
@torch.no_grad()
def test_tau_norm(experts: int, config: Config) -> None:
    """As the original's script: each row divided by its own length to a power, no bias."""
    first = earlier(config, *LINEAR, experts=experts)
    method = build(config, "tau_norm", *LINEAR, "tau_norm.power", 0.6968, experts=experts)
    method.start_from(trained_state(first))
    for own, old in zip(heads_of(method.model.head), heads_of(first.model.head), strict=True):
        rows = torch.stack([row / row.pow(2).sum().sqrt() ** 0.6968 for row in old.get_parameter("weight")])
        assert torch.allclose(own.get_parameter("weight"), rows, atol=1e-6)
        assert not own.get_parameter("bias").any() and old.get_parameter("bias").any()
    assert not method.param_groups()
    wrapped = build(config, "mixup", "mixup.inner", "tau_norm", "num_epochs", 0, *LINEAR, experts=experts)
    assert method.changes_start and wrapped.changes_start, "so the prior is not that of the earlier run"
    equal = build(config, "tau_norm", *LINEAR, "tau_norm.power", 1, experts=experts)
    equal.start_from(trained_state(first))
    assert torch.allclose(heads_of(equal.model.head)[0].get_parameter("weight").norm(dim=1), torch.ones(10))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("method", "tau_norm", "num_epochs", 0), "LinearClassifier"),
        (("method", "tau_norm", *LINEAR), "trains nothing here; set num_epochs 0"),
        (("method", "tau_norm", *LINEAR, "num_epochs", 0, "tau_norm.power", -1), "power"),
        (("method", "crt", "after", "none"), "after"),
    ],
)
def test_refusals(words: tuple[object, ...], says: str, config: Config) -> None:
    with pytest.raises(UserError, match=says):
        check(config("fake_lt", "tiny_clip", "pretrained", "none", "after", "tiny_clip", *words))


@pytest.mark.parametrize("export", ["merged", "peft", "lift"])
def test_no_format_loses_the_scales(export: str, config: Config) -> None:
    words = ("method", "lws", "after", "tiny_clip", "lora", True, "pretrained", "none")
    check(config("fake_lt", "tiny_clip", *words, "export", "onnx"))
    with pytest.raises(UserError, match="changes the logits"):
        check(config("fake_lt", "tiny_clip", *words, "export", export))


@pytest.mark.parametrize(("name", "first"), [("lws", ()), ("crt", ("full_tuning", True))])
def test_what_is_kept_and_what_is_lost(name: str, first: tuple[object, ...], config: Config) -> None:
    """The earlier run has to have trained all that is held, and no more."""
    method = build(config, name, "adaptformer", True)
    with pytest.raises(UserError, match="which did not" if name == "lws" else "more tensors"):
        method.start_from(trained_state(earlier(config, *first)))


TEXTS = "method lws classifier TextClassifier after.classifier TextClassifier"
OTHERWISE = {
    "clip_lora_alpha": "method crt clip_lora True after.clip_lora True clip_lora_alpha 8",
    "adaptformer_scale": "method crt adaptformer True after.adaptformer True adaptformer_scale 0.1"
    " after.adaptformer_scale 0.7",
    "peft": "method crt peft LoRA after.peft rsLoRA",
    "peft_args": "method crt peft LoRA after.peft LoRA peft_args '{lora_alpha: 64}'",
    "clip_adapter_ratio": f"{TEXTS} clip_adapter original after.clip_adapter original clip_adapter_ratio 0.9",
    "text_adaptformer_scale": f"{TEXTS} text_adaptformer True after.text_adaptformer True text_adaptformer_scale 0.1"
    " after.text_adaptformer_scale 0.7",
    "text_tuner_args": f"{TEXTS} text_clip_lora True after.text_clip_lora True"
    " text_tuner_args '{text_clip_lora: {alpha: 8}}'",
    "prompt": f"{TEXTS} text_lora True after.text_lora True prompt classname",
}
"""Option that no tensor shows → words that set it for one of two stages, or otherwise for both."""


@pytest.mark.parametrize("option", OTHERWISE)
def test_what_no_tensor_shows_has_to_be_that_of_the_earlier_run(option: str) -> None:
    words = shlex.split(f"after tiny_clip pretrained none {OTHERWISE[option]}")
    stages = load_configs("fake_lt", "tiny_clip", words, declared())
    with pytest.raises(UserError, match=rf"whose {option} is .* give both the same"):
        validate(stages)


@torch.no_grad()
def stir_updates(method: Method) -> Method:
    """Move low-rank updates away from 0."""
    for name, each in method.named_parameters():
        if "lora_B" in name:
            each.fill_(0.1)
    return method


@pytest.mark.parametrize("tuner", [("clip_lora", True), ("peft", "LoRA", "peft_args", "{lora_dropout: 0.5}")])
def test_a_frozen_encoder_has_no_dropout(tuner: tuple[object, ...], config: Config) -> None:
    method = stir_updates(build(config, "crt", *tuner)).train()
    in_training, encoder = method.model.features(images()), method.model.encoder
    assert torch.equal(in_training, method.eval().model.features(images()))
    assert encoder.is_constant and encoder.constant_blocks == encoder.depth and not method.batch_coupled


def test_texts_of_a_frozen_tower_have_no_dropout(config: Config) -> None:
    """What is computed in training is kept, and an evaluation reads it."""
    words = ("classifier", "TextClassifier", "text_clip_lora", True)
    trained, evaluated = (stir_updates(build(config, "lws", *words, experts=1)) for _ in range(2))
    in_training = trained.train().model.head.class_features()
    assert torch.equal(in_training, evaluated.eval().model.head.class_features())


@pytest.mark.parametrize(
    ("tuner", "prec"),
    slow_except(
        [("full_tuning", "fp16"), ("full_tuning", "fp64"), ("adaptformer", "bf16")],
        product(("full_tuning", "adaptformer"), PRECISIONS),
    ),
)
@torch.no_grad()
def test_what_is_held_is_never_rounded(tuner: str, prec: str, config: Config) -> None:
    """Neither by the precision of the training, nor is anything made of it before a state is loaded."""
    first, method, resumed = earlier(config, tuner, True), *(build(config, "crt", tuner, True) for _ in range(2))
    method.start_from(trained_state(first))
    wanted = {name: each.clone() for name, each in trained_state(method).items()}
    for each in (method, resumed):
        each.model.set_precision(PRECISIONS[prec].compute)
        cast_trainable(each, PRECISIONS[prec].trainable)
    state = trained_state(method)
    for name in method.frozen_trained:
        assert torch.equal(state[name].double(), wanted[name].double()), name
    for name, each in trained_state(resumed).items():  # as the trainer resumes
        each.copy_(state[name])
    assert torch.allclose(method.expert_logits(images()), resumed.expert_logits(images()), atol=1e-5)
    method.model.set_precision()
    cast_trainable(method, torch.float32)
    assert torch.allclose(method.model.features(images()), first.model.features(images()), atol=1e-5)


# --- runs ----------------------------------------------------------------------------------------------------------

BOTH = "adaptformer True classifier LinearClassifier init_head none"
RESNET = BOTH.replace("adaptformer", "full_tuning") + " backbone ResNet-20 resolution none bn_tuning True"
SHORT = "-d fake_lt -m tiny_clip pretrained none max_test_images 20 subset_cap 8 batch_size 16 lr 0.05"


def command(name: str, both: str) -> str:
    earlier = "after tiny_clip after.loss_type CE after.lr 0.01 after.subset_cap 8 after.batch_size 16 " + " ".join(
        f"after.{a} {b}" for a, b in zip(both.split()[::2], both.split()[1::2], strict=True)
    )
    steps = "num_epochs 0" if name == "tau_norm" else "max_steps 3 save_every 1"
    return f"{SHORT} {both} {earlier} after.pretrained none after.max_steps 2 method {name} {steps} output_dir run"


@pytest.mark.parametrize(
    ("name", "both"), [("crt", RESNET), ("lws", BOTH), ("tau_norm", BOTH)], ids=("crt", "lws", "tau_norm")
)
def test_a_chain_of_runs(name: str, both: str, launch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, killed and resumed on the way, evaluated again from its checkpoint alone."""
    save = ResumeStates.save

    def killed(self: ResumeStates, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 2 and self.folder.parent.name == "run":
            raise InterruptedError

    if name != "tau_norm":
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(ResumeStates, "save", killed)
            launch(command(name, both))
    done = launch(command(name, both))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "output" / "run"
    before, after = (load_file(each / "checkpoint" / "tensors.safetensors") for each in (folder / "stage1", folder))
    same = {key for key, each in before.items() if key in after and torch.equal(each, after[key])}
    heads = {"model.head.weight", "model.head.bias"}
    assert before.keys() - same == (set() if name == "lws" else heads)
    assert after.keys() - before.keys() == ({"scales"} if name == "lws" else set())
    result = json.loads((folder / "metrics.json").read_text())
    assert result["params"]["trainable"] == {"crt": 64 * 10 + 10, "lws": 10, "tau_norm": 0}[name]
    again = launch(command(name, both), "test_only True test_batch_size 7 test_prec fp64")
    assert again.returncode == 0, again.stderr
    logits = [load_file(each / "logits.safetensors")["row_max"] for each in (folder, *(folder / "tests").iterdir())]
    assert torch.allclose(*logits, rtol=1e-3, atol=1e-3)
