"""The peft library around our encoders: every tuner trains, is saved, comes back, and is what peft itself would do."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, Cli
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from small import SIDE, Sizes, fixture_net, put_tuners, small_net
from tiers import slow_except
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.models import ClassificationModel, build_model
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.tuners.peft_adapter import AdaLora, PeftAdapter, export_adapter, merge_adapter
from tailtune.models.tuners.peft_table import PEFTS, REFUSED_TYPES, find_peft_type
from tailtune.models.tuners.peft_wrapper import add_peft
from tailtune.trainers.config_checks import check
from tailtune.trainers.dry_run import forward_flops
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.option_schema import declared
from tailtune.trainers.storage.checkpoint import copy_state, fingerprint, trained_state

Config = Callable[..., CfgNode]
FIT: dict[str, dict[str, Any]] = {
    "VBLoRA": {"vector_length": 16, "num_vectors": 8},
    "C3A": {"block_size": 16},
    "FourierFT": {"n_frequency": 50},
    "WaveFT": {"n_frequency": 50},
}
"""Arguments of those whose defaults are too large for a network of width 64."""
STATS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CONV = [name for name, kind in PEFTS.items() if kind.conv]
each_kind = pytest.mark.parametrize("name", PEFTS)
FEW = ["LoRA", "IA3", "OFT", "VeRA", "Lily"]
"""Low-rank, scaling and orthogonal ones, with weights that layers share and with those that cannot be merged."""
few_kinds = pytest.mark.parametrize("name", slow_except(FEW, PEFTS))


def build(
    name: str, args: dict[str, Any] | None = None, host: Encoder | None = None, partial: Any = None, seed: int = 0
) -> tuple[Encoder, PeftAdapter]:
    """The fixture's network of two blocks, or another, with a tuner of peft."""
    host = ViTEncoder(fixture_net()) if host is None else host
    adapter = add_peft(host, name, {**FIT.get(name, {}), **(args or {})}, partial, SIDE, seed)
    host.set_precision()
    return host.eval(), adapter


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def trains(host: Encoder) -> dict[str, nn.Parameter]:
    return {name: each for name, each in host.named_parameters() if each.requires_grad}


@torch.no_grad()
def stir(host: Encoder) -> None:
    """Adapters begin as the identity; these do not."""
    generator = torch.Generator().manual_seed(2)
    for each in trains(host).values():
        each += 0.05 * torch.randn(each.shape, generator=generator)


class Conv(nn.Module):
    """A convolutional network in two stages."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(16, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x))).mean((2, 3))


# --- every tuner ---


@each_kind
def test_a_tuner_trains_its_own_weights_alone(name: str) -> None:
    plain = ViTEncoder(fixture_net())
    host, adapter = build(name)
    base = fingerprint(ClassificationModel(plain, nn.Identity(), STATS))
    assert fingerprint(ClassificationModel(host, nn.Identity(), STATS)) == base, "the base model is recognised"
    state, before = {k: v.clone() for k, v in host.state_dict().items()}, trains(host)
    assert before and all(".attn.qkv." in key or ".mlp.fc2." in key for key in before)
    assert all(each.dtype == torch.float32 for each in before.values())
    optimizer = torch.optim.SGD(before.values(), lr=10.0)
    host.train()
    for _ in range(3):  # the second factor moves once the first is no longer zero
        optimizer.zero_grad()
        host(images()).square().sum().backward()
        assert all((each.grad is not None) == each.requires_grad for each in host.parameters())
        optimizer.step()
    moved = {key for key, each in host.state_dict().items() if not torch.equal(each, state[key])}
    assert moved == {key for key, each in host.named_parameters(remove_duplicate=False) if each.requires_grad}
    assert fingerprint(ClassificationModel(host, nn.Identity(), STATS)) == base
    with host.untuned(), torch.no_grad():
        assert torch.allclose(host(images()), plain(images()), atol=1e-6)
    assert trains(host).keys() == before.keys()


@few_kinds
def test_a_checkpoint_brings_it_back_whatever_the_seed(name: str) -> None:
    host, twin = build(name)[0], build(name, seed=1)[0]
    stir(host)
    copy_state(twin, {key: each.clone() for key, each in trained_state(host).items()}, "", "")
    with torch.no_grad():
        assert torch.equal(twin(images()), host(images()))


@few_kinds
def test_the_arithmetic_is_the_runs(name: str) -> None:
    host, _ = build(name)
    stir(host)
    wanted = host(images()).detach()
    host.set_precision(torch.bfloat16)
    features = host(images())
    features.float().square().sum().backward()
    assert features.dtype == torch.bfloat16 and (features - wanted).abs().max() < 0.15
    assert all(each.grad is not None and each.grad.isfinite().all() for each in trains(host).values())
    host.set_precision()
    assert torch.equal(host(images()), wanted)


@few_kinds
def test_shapes_without_weights(name: str) -> None:
    """`--dry-run` counts what trains, and what an image costs."""
    with torch.device("meta"):
        empty, _ = build(name, host=ViTEncoder(small_net()))
    host, _ = build(name)
    assert {k: v.shape for k, v in trains(empty).items()} == {k: v.shape for k, v in trains(host).items()}
    assert all(each.is_meta for each in empty.parameters())
    model = ClassificationModel(empty, nn.Linear(64, 3, device="meta"), STATS)
    with torch.device("meta"):
        assert forward_flops(model, SIDE) >= forward_flops(
            ClassificationModel(ViTEncoder(small_net()), model.head, STATS), SIDE
        )
    assert sum(each.numel() for each in trains(empty).values()) == sum(each.numel() for each in trains(host).values())


@few_kinds
def test_peft_reads_the_file_and_merging_is_the_same(name: str, tmp_path: Path) -> None:
    host, adapter = build(name)
    stir(host)
    export_adapter(host, adapter, tmp_path, "the network")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    torch.manual_seed(7)  # nothing of the file may depend on it
    loaded = peft.PeftModel.from_pretrained(fixture_net(), str(tmp_path)).eval()
    with torch.no_grad():
        wanted = host(images())
        assert torch.allclose(loaded(images()), wanted, atol=1e-5)
        if name == "Lily":
            with pytest.raises(UserError, match="cannot be merged"):
                merge_adapter(host, adapter)
            return
        plain = fixture_net()
        plain.load_state_dict(merge_adapter(host, adapter))
        assert torch.allclose(plain(images()), wanted, atol=1e-5)
        assert torch.equal(host(images()), wanted), "the host stays as it was"


@few_kinds
def test_partial_chooses_the_blocks(name: str) -> None:
    host, adapter = build(name, partial=1)
    assert adapter.targets and all(key.startswith("blocks.1.") for key in adapter.targets)
    assert all(key.startswith("net.blocks.1.") for key in trains(host))


@pytest.mark.parametrize("name", CONV)
def test_convolutions(name: str, tmp_path: Path) -> None:
    host, adapter = build(name, {"oft_block_size": 4} if name == "OFT" else {}, WholeNetworkEncoder(Conv(), 8))
    assert adapter.targets == ["layer1.0", "layer2.0", "layer2.2"]
    stir(host)
    host(images()).sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in trains(host).values())
    export_adapter(host, adapter, tmp_path, "the network")
    loaded = peft.PeftModel.from_pretrained(Conv().eval(), str(tmp_path)).eval()
    assert torch.allclose(loaded(images()), host(images()), atol=1e-6)
    if name == "OFT":  # peft 0.21 adds a merged rotation of a convolution to another place
        with pytest.raises(UserError, match="export peft"):
            merge_adapter(host, adapter)
    else:
        plain = Conv().eval()
        plain.load_state_dict(merge_adapter(host, adapter))
        assert torch.allclose(plain(images()), host(images()), atol=1e-5)
    host, adapter = build(
        name, {"oft_block_size": 4} if name == "OFT" else {}, WholeNetworkEncoder(Conv(), 8), partial=1
    )
    assert adapter.targets == ["layer2.0", "layer2.2"]


def test_every_type_of_the_installed_peft_is_sorted() -> None:
    """A new release may bring types: each belongs into PEFTS or, with the reason, into REFUSED_TYPES."""
    types = {kind.type for kind in PEFTS.values()}
    assert not types & REFUSED_TYPES.keys()
    assert types | REFUSED_TYPES.keys() == {each.value for each in PEFT_TYPE_TO_TUNER_MAPPING}


# --- what is refused ---

BAD: list[tuple[str, dict[str, Any], str]] = [
    ("lorra", {}, "did you mean 'LoRA'"),
    ("prefix_tuning", {}, "vpt_deep"),
    ("LN_TUNING", {}, "`ln_tuning True`"),
    ("OSF", {}, "checkpoint"),
    ("PVeRA", {}, "micro_batch_size"),
    ("LoRA", {"rank": 4}, "unknown field of LoRA in peft_args 'rank'"),
    ("LoRA", {"r": "many"}, "peft_args: '<=' not supported"),
    ("LoRA", {"r": 0}, "positive"),
    ("LoRA", {"target_modules": ["query"]}, "none of the layers of this backbone; LoRA takes"),
    ("LoRA", {"target_modules": "qkv"}, "a pattern of the whole name"),
    ("LoRA", {"exclude_modules": ["qkv"]}, "that exclude_modules leaves"),
    ("LoRA", {"target_modules": "((["}, "peft LoRA with these peft_args"),
    ("LoRA", {"target_modules": ["norm1"]}, "cannot act on blocks.0.norm1, a LayerNorm"),
    ("LoRA", {"init_lora_weights": "pissa"}, "alter the pre-trained weights"),
    ("LoRA", {"bias": "all"}, "bias_tuning"),
    ("LoRA", {"modules_to_save": ["norm"]}, "full_tuning"),
    ("LoHa", {"module_dropout": 0.1}, "without gradient"),
    ("VeRA", {"target_modules": ["proj"]}, "cannot act on patch_embed.proj, a Conv2d; LoRA"),
    ("C3A", {"block_size": 7}, "factor of the input size"),
    ("AdaLoRA", {"total_step": 5}, "always the number of steps of the run"),
    ("AdaLoRA", {"target_r": 12}, "target_r 12 must be less than init_r 12"),
]


@pytest.mark.parametrize(("name", "args", "words"), BAD)
def test_what_is_refused(name: str, args: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as raised:
        build(name, args)
    assert words in str(raised.value) and "\n" not in str(raised.value)


class Attending(nn.Module):
    """Layers that are not simply called."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.read, self.out = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x).flatten(2).transpose(1, 2)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.out(F.linear(x, self.read.weight, self.read.bias)).mean(1)


def test_layers_that_are_not_called() -> None:
    for target in ("attention", "out_proj"):
        with pytest.raises(UserError, match="merges and unmerges the weights of nn.MultiheadAttention"):
            build("LoRA", {"target_modules": [target]}, WholeNetworkEncoder(Attending(), 8))
    with pytest.raises(UserError, match="read: the network reads the weights"):
        build("LoRA", {"target_modules": ["read", "out"]}, WholeNetworkEncoder(Attending(), 8))
    with pytest.raises(UserError, match="read: the network reads the weights"):
        build("LoRA", host=WholeNetworkEncoder(Attending(), 8))  # all linear layers but the attention's own
    assert build("LoRA", {"target_modules": ["out"]}, WholeNetworkEncoder(Attending(), 8))[1].targets == ["out"]


def test_a_network_without_linear_layers() -> None:
    with pytest.raises(UserError, match="has none that it could wrap; LoRA, .* take convolutions"):
        build("VeRA", host=WholeNetworkEncoder(Conv(), 8))


def test_names_are_spelled_as_in_the_table_and_variants_have_their_own() -> None:
    with pytest.raises(UserError, match="did you mean 'LoRA'"):
        find_peft_type("lora")  # another spelling would be another run of the same model
    assert build("DoRA")[1].config.use_dora and build("rsLoRA")[1].config.use_rslora


def test_who_does_not_ask_for_it_does_not_import_it() -> None:
    """With transformers it takes more than a second."""
    for path in (ROOT / "models").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not any(each.split(".")[0] == "peft" for each in names), path.name


# --- beside our own tuners ---


@pytest.mark.parametrize("other", ["full_tuning", "bias_tuning", "ln_tuning", "adaptformer", "vpt_deep", "lora"])
def test_other_tuners_train_beside_it(other: str, tmp_path: Path) -> None:
    alone = ViTEncoder(fixture_net())
    put_tuners(alone, [other], Sizes(4, 3))
    both = ViTEncoder(fixture_net())
    put_tuners(both, [other], Sizes(4, 3))
    both, adapter = build("LoRA", host=both)
    expected = set(trains(alone)) | {f"net.{key}.lora_{m}.default.weight" for key in adapter.targets for m in "AB"}
    assert {key.replace(".base_layer.", ".") for key in trains(both)} == expected
    for compute in (torch.float32, torch.bfloat16):
        both.set_precision(compute)
        both(images()).float().square().sum().backward()
        assert all(each.grad is not None for each in trains(both).values())
    with pytest.raises(UserError, match="export merged"):
        export_adapter(both, adapter, tmp_path, "the network")


def test_a_tuner_that_takes_the_weights_below_as_frozen() -> None:
    host = ViTEncoder(fixture_net())
    put_tuners(host, ["full_tuning"], Sizes(4, 3))
    with pytest.raises(UserError, match="needs frozen weights"):
        build("HRA", host=host)


def test_dropout_depends_on_how_a_batch_is_cut() -> None:
    host, _ = build("LoRA", {"lora_dropout": 0.5})
    stir(host)
    with torch.no_grad():
        assert not torch.equal(host.train()(images()), host(images()))
        assert torch.equal(host.eval()(images()), host(images()))
    assert host.batch_coupled and not build("LoRA", {"lora_dropout": 0.0})[0].batch_coupled
    values = dict.fromkeys(declared().coupled)
    assert declared().couples({**values, "peft_args": {"lora_dropout": 0.5}})
    assert not declared().couples({**values, "peft_args": {"r": 4}})


# --- AdaLoRA ---

STEPS = 12


def adaptive(config: Config, *pairs: object) -> Method:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "partial", 2, "peft", "AdaLoRA", *pairs)
    info = build_info(cfg)
    return build_method(cfg, build_model(cfg, info.class_names), info).train()


def take(method: Method, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        batch = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)
        outcome = method({"image": batch, "label": torch.arange(6), "weight": torch.ones(6)})
        (outcome.loss_sum / outcome.weight).backward()
        optimizer.step()
        method.after_step(step + 1)
        optimizer.zero_grad()


def sgd(method: Method) -> torch.optim.Optimizer:
    return torch.optim.SGD([each for each in method.parameters() if each.requires_grad], lr=0.5)


def test_adalora_cuts_ranks_and_survives_a_kill(config: Config) -> None:
    method, after = adaptive(config), []
    method.before_training(STEPS, 1)
    for step in range(STEPS):
        take(method, sgd(method), step, step + 1)
        after.append({key: each.clone() for key, each in trained_state(method).items()})
    for killed in (5, 9, 11):  # between two cuts, at the last one, behind it
        resumed = adaptive(config)
        copy_state(resumed, after[killed - 1], "", "")
        resumed.before_training(STEPS, 1)
        take(resumed, sgd(resumed), killed, STEPS)
        assert all(torch.equal(each, after[-1][key]) for key, each in trained_state(resumed).items())
    ranks = [each for key, each in method.named_parameters() if "lora_E" in key]
    assert len(ranks) == 2 and sum(int((each != 0).sum()) for each in ranks) == 2 * 8, "target_r is 8"


def test_adalora_pulls_its_factors_to_orthogonality(config: Config) -> None:
    """The term that peft adds to the loss of a model of its own, once for each sample's share of the mean."""
    method, free = adaptive(config), adaptive(config, "peft_args", "{orth_reg_weight: 0}")
    adapter = method.model.peft
    assert isinstance(adapter, AdaLora)
    tuner = adapter.model.base_model

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tuner.model

        def forward(self) -> Any:
            return type("Outputs", (), {"loss": torch.zeros(())})()

    tuner.model, net = Net(), tuner.model
    wanted = tuner().loss
    tuner.model = net
    penalty = adapter.penalty()
    assert penalty is not None and torch.allclose(penalty, wanted) and free.model.penalty() is None
    batch = {"image": torch.zeros(6, 3, 32, 32), "label": torch.arange(6), "weight": torch.tensor([1.0, 1, 0, 2, 1, 1])}
    halves = [method({key: each[part] for key, each in batch.items()}) for part in (slice(0, 2), slice(2, 6))]
    with_term, without = method(batch), free(batch)
    assert torch.allclose(sum(each.loss_sum for each in halves), with_term.loss_sum)
    assert torch.allclose(with_term.loss_sum, without.loss_sum + 6 * wanted)


def test_adalora_needs_steps_to_cut_in(config: Config) -> None:
    with pytest.raises(UserError, match="leaves none of the 1 steps"):
        adaptive(config).before_training(1, 1)
    with pytest.raises(UserError, match="tinit 5"):
        adaptive(config, "peft_args", "{tinit: 5, tfinal: 5}").before_training(10, 1)


def test_adalora_goes_on_after_an_overflow(config: Config) -> None:
    method = adaptive(config)
    method.before_training(STEPS, 1)
    for each in method.parameters():
        each.grad = torch.full_like(each, torch.inf) if each.requires_grad else None
    method.after_step(1)
    method.zero_grad()
    take(method, sgd(method), 1, STEPS)
    assert all(each.isfinite().all() for each in trained_state(method).values())


# --- as users meet it ---


def test_the_count_of_lora_on_vit_b16(config: Config) -> None:
    cfg = config("imagenet_lt", "clip_vit_b16", "peft", "LoRA", "peft_args", "{r: 8}", "classnames", "none")
    with torch.device("meta"):
        model = build_model(cfg, [str(each) for each in range(1000)])
    assert model.counts()["tuner"] == 12 * 8 * (768 + 2304)


def test_peft_args_alone_mean_nothing(config: Config) -> None:
    with pytest.raises(UserError, match="choose one, such as"):
        check(config("fake_lt", "tiny_clip", "peft_args", "{r: 8}"))
    with pytest.raises(UserError, match="zero_shot trains nothing, so peft"):
        check(config("fake_lt", "tiny_clip", "zero_shot", True, "peft", "LoRA"))


@pytest.mark.parametrize("words", ["peft VeRA", "peft AdaLoRA"])
def test_a_run(words: str, launch: Cli) -> None:
    command = f"-d fake_lt -m tiny_clip {words} batch_size 16 max_steps 6 max_test_images 20 num_workers 0"
    assert launch(command, "output_dir", "one").returncode == 0
    again = launch(command, "output_dir", "one", "test_only", True, "tte", True)
    assert again.returncode == 0, again.stderr
