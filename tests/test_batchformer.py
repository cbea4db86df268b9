"""BatchFormer: attention across the batch while training, nothing at test time."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs import UserError
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.dry_run import dry_run
from tailtune.trainers.methods import METHODS, build_method
from tailtune.trainers.methods.batchformer_layer import BatchMixer
from tailtune.trainers.methods.wrapper import Wrapper
from tailtune.trainers.storage.resume_states import ResumeStates

Config = Callable[..., CfgNode]


def build(config: Config, *pairs: object, experts: int = 3) -> Any:
    words = ("pretrained", "none", "method", "batchformer", "num_experts", experts, "init_head", "none", *pairs)
    cfg = config("fake_lt", "tiny_clip", *words)
    info = build_info(cfg)
    return build_method(cfg, build_model(cfg, info.class_names), info)


def batch(*weights: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (len(weights), 3, 32, 32), dtype=torch.uint8, generator=generator)
    return {"image": images, "label": torch.arange(len(weights)), "weight": torch.tensor(weights)}


def present(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


@torch.no_grad()
def test_the_fixture_of_the_original() -> None:
    """Specification of the experts, fixture 11."""
    mixer = BatchMixer(8).double().eval()
    for name, each in mixer.named_parameters():
        values = 0.1 * torch.arange(1, each.numel() + 1).double().sin().view_as(each)
        each.copy_(torch.ones_like(each) if "norm" in name and name.endswith("weight") else values)
    b, d = torch.arange(1, 6).view(-1, 1), torch.arange(1, 9)
    found = mixer((0.3 * b * d).double().cos(), present(5))
    first = [1.589784, 1.417462, 0.774600, -0.091767, -0.706486, -0.850516, -0.850833, -1.127935]
    last = [0.455275, -1.100358, -0.210870, 1.120460, 0.054270, -1.493660, -0.379805, 1.708997]
    assert torch.allclose(found[[0, 4]], torch.tensor([first, last]).double(), atol=2e-6)
    assert float(found.abs().sum()) == pytest.approx(35.707458, abs=1e-5)


@pytest.mark.parametrize(("dim", "heads", "layers"), [(8, 1, 1), (12, 3, 2), (136, 0, 1)])
def test_experts_attend_across_the_batch_each_for_itself(dim: int, heads: int, layers: int) -> None:
    """Equal to torch's own encoder over a sequence [B, 1, D], in train mode, values and gradients."""
    mixer = BatchMixer(dim, layers, heads, dropout=0.0).double()
    plain = nn.ModuleList(nn.TransformerEncoderLayer(dim, heads or 4, dim, 0.0).double() for _ in range(layers))
    plain.load_state_dict(mixer.layers.state_dict())
    features = torch.randn(7, 3, dim, dtype=torch.float64)

    def sequence(x: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        for layer in plain:
            x = layer(x)
        return x.squeeze(1)

    found, wanted = mixer(features, present(7)), torch.stack([sequence(each) for each in features.unbind(1)], 1)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.allclose(mixer(features[:, 1], present(7)), wanted[:, 1], atol=1e-12), "features that all share"
    for module, out in ((mixer, found), (plain, wanted)):
        (out * out.detach().cos()).sum().backward()
        assert all(each.grad is not None for each in module.parameters())
    for own, other in zip(mixer.layers.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, atol=1e-10)


@pytest.mark.parametrize(("chunks", "parts"), [(2, (4, 4)), (3, (3, 3, 2)), (9, (1,) * 8)])
def test_chunks_attend_separately(chunks: int, parts: tuple[int, ...]) -> None:
    whole, cut = BatchMixer(8, dropout=0.0), BatchMixer(8, dropout=0.0, chunks=chunks)
    cut.load_state_dict(whole.state_dict())
    features, seen = torch.randn(8, 2, 8), present(8)
    wanted = torch.cat([whole(each, seen[: len(each)]) for each in features.split(parts)])
    assert torch.allclose(cut(features, seen), wanted, atol=1e-6)


def test_nobody_attends_to_what_could_not_be_read() -> None:
    mixer, features = BatchMixer(8, dropout=0.0), torch.randn(5, 2, 8)
    here = torch.tensor([True, True, False, True, False])
    wanted = mixer(features[here], present(3))
    features[~here] = torch.nan
    found = mixer(features, here)
    assert torch.allclose(found[here], wanted, atol=1e-6)
    nobody = mixer(features, torch.zeros(5, dtype=torch.bool))
    assert nobody.isfinite().all() and found.isfinite().all()


@pytest.mark.parametrize(("dim", "parameters"), [(1536, 14_171_136), (384, 888_576), (48, 14_304)])
def test_size(dim: int, parameters: int) -> None:
    with torch.device("meta"):
        mixer = BatchMixer(dim)
    assert sum(each.numel() for each in mixer.parameters()) == parameters == 6 * dim**2 + 10 * dim
    assert mixer.layers[0].self_attn.num_heads == (4 if dim > 128 else 1)  # type: ignore[union-attr]


def test_the_start_of_the_original_for_cifar() -> None:
    plain, kaiming = BatchMixer(64), BatchMixer(64, kaiming=True)
    for name, each in kaiming.named_parameters():
        deviation = float(each.detach().std())
        if name.endswith(("linear1.weight", "linear2.weight", "out_proj.weight")):
            assert deviation == pytest.approx((2 / 64) ** 0.5, rel=0.05)
        else:
            assert deviation == pytest.approx(float(plain.get_parameter(name).detach().std()), rel=0.5, abs=1e-6), name


@pytest.mark.parametrize("mode", ["replace", "sum", "mean"])
@pytest.mark.parametrize("inner", ["classify", "ride", "sade"])
def test_what_is_trained(mode: str, inner: str, config: Config) -> None:
    words = ("batchformer.mode", mode, "batchformer.inner", inner, "batchformer.dropout", 0, "loss_type", "CE")
    method, given = build(config, *words).double().train(), batch(1, 1, 0, 2)
    given["weight"] = given["weight"].double()
    method.model.encoder.set_precision(torch.float64)
    features = method.model.features(given["image"])
    mixed = method.model.logits(method.mixer(features, given["weight"] > 0))
    raw = method.model.logits(features)
    (own, weight), (other, _) = (method.inner.loss(each, given) for each in (mixed, raw))
    found = method(given)
    assert torch.allclose(found.loss_sum, own if mode == "replace" else own + other)
    assert found.weight == (2 * weight if mode == "mean" else weight)
    assert torch.allclose(found.logits, (mixed if mode == "replace" else raw).mean(1))
    found.loss_sum.backward()
    assert all(each.grad is not None for each in method.parameters() if each.requires_grad)


def test_at_test_time_it_is_not_there(config: Config) -> None:
    method, given = build(config).eval(), batch(1, 1, 1)
    with torch.no_grad():
        wanted = method.model(given["image"])
        assert torch.equal(method.expert_logits(given["image"]), wanted)
        assert torch.equal(method(given).logits, wanted.mean(1))
        method.train()
        assert not torch.allclose(method(given).logits, wanted.mean(1))


@pytest.mark.parametrize("name", METHODS)
def test_it_wraps_what_leaves_the_logits_alone(name: str, config: Config) -> None:
    kind = METHODS[name]
    own = name in ("ride_ea", "lws", "mixup", "h2t", "batchformer", "glmc")
    after = ("after", "tiny_clip", "loss_type", "CE") if kind.continues_from_earlier_run else ("loss_type", "CE")
    more = {
        "tau_norm": ("classifier", "LinearClassifier", "num_epochs", 0),
        "h2t": ("h2t.shift_bn", False, "pair_sampler", "shuffle"),
    }.get(name, ())
    words = ("batchformer.inner", name, *after, *more)
    if own:
        with pytest.raises(UserError, match="inner"):
            build(config, *words)
        return
    method = build(config, *words)
    assert isinstance(method, Wrapper) and type(method.inner) is kind
    assert {name.removeprefix("inner.") for name in method.frozen_trained} == method.inner.frozen_trained


def test_groups_counts_and_seeds(config: Config) -> None:
    method = build(config, "full_tuning", True)
    groups = {group["name"]: group["params"] for group in method.param_groups()}
    assert list(groups) == ["tuner", "head", "mixer"]
    assert {id(each) for each in groups["mixer"]} == {id(each) for each in method.mixer.parameters()}
    trains = [each for each in method.parameters() if each.requires_grad]
    assert sum(map(len, groups.values())) == len(trains), "each once"
    again, other = build(config, "full_tuning", True), build(config, "seed", 1)
    weights = [each.mixer.layers[0].linear1.weight for each in (method, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

    words = ("pretrained", "none", "num_experts", 3)
    with_it, without = (
        dry_run(config("fake_lt", "tiny_clip", *words, *more))[0]["params"] for more in (("method", "batchformer"), ())
    )
    dim = method.model.encoder.feature_dim
    size = 6 * dim**2 + 10 * dim
    assert {name: with_it[name] - without[name] for name in with_it} == {
        "total": size,
        "tuner": size,
        "head": 0,
        "trainable": size,
    }
    assert method.counts()["total"] == with_it["total"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("batchformer.heads", 3), "heads 3 do not divide"),
        (("batchformer.heads", -1), "heads"),
        (("batchformer.layers", 0), "layers"),
        (("batchformer.chunks", 0), "chunks"),
        (("batchformer.dropout", 1), "dropout 1"),
        (("batchformer.mode", "both"), "both"),
        (("batchformer.inner", "rid"), "ride"),
        (("batchformer.inner", "batchformer"), "batchformer"),
    ],
)
def test_bad_options(words: tuple[object, ...], says: str, config: Config) -> None:
    with pytest.raises(UserError, match=says):
        build(config, *words)


def test_the_share_of_a_batch_is_part_of_the_run(config: Config) -> None:
    whole, parts = (
        config("fake_lt", "tiny_clip", "method", "batchformer", "micro_batch_size", size) for size in ("none", 8)
    )
    assert whole.coupled_micro is None and parts.coupled_micro == 8 and whole.run_name != parts.run_name


def test_each_process_draws_dropout_of_its_own(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for rank in (0, 1):
        state = SimpleNamespace(process_index=rank)
        monkeypatch.setattr("accelerate.utils.random.AcceleratorState", lambda state=state: state)
        make_accelerator(Devices.of(config("fake_lt", "tiny_clip", "seed", 5)))
        seeds.append(torch.initial_seed())
    assert seeds == [5, 6]


class Killed(BaseException):
    """As a kill: nothing in the program expects it."""


COMMAND = "-d fake_lt -m tiny_clip pretrained none init_head none method batchformer num_experts 2 loss_type CE"
COMMAND += " adaptformer True subset_cap 8 batch_size 16 num_epochs 2 max_steps 4 save_every 1 print_freq 1"
COMMAND += " max_test_images 20 output_dir"


def test_a_killed_run_draws_the_same_dropout(launch: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(COMMAND, "whole").returncode == 0
    save = ResumeStates.save

    def killed(self: ResumeStates, step: int, *rest: Any) -> None:
        save(self, step, *rest)
        if step == 2:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ResumeStates, "save", killed)
        launch(COMMAND, "killed")
    assert launch(COMMAND, "killed").returncode == 0
    folders = [tmp_path / "output" / name for name in ("whole", "killed")]
    assert "resuming after step 2" in (folders[1] / "log.txt").read_text()
    whole, found = (load_file(each / "checkpoint" / "tensors.safetensors") for each in folders)
    assert whole.keys() == found.keys() and all(torch.equal(whole[name], found[name]) for name in whole)
    assert any(name.startswith("mixer.layers.0.") for name in whole)
    result = json.loads((folders[0] / "metrics.json").read_text())
    assert result["params"]["trainable"] == sum(each.numel() for each in whole.values())
