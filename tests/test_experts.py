"""Experts on pre-trained networks: tuners of their own in the last blocks of a ViT, or heads alone on any backbone."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Cli
from small import LIFT_TUNERS, SIDE, Sizes, head_context, head_with, plain_features, put_tuners, small_net
from test_exchange import clip_vit
from tiers import slow_except
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.models import build_model
from tailtune.models.backbones.backbone_types import ExpertSplit
from tailtune.models.backbones.expert_split import split_experts
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.classification_model import ClassificationModel
from tailtune.models.heads.expert_heads import ExpertHeads, heads_of
from tailtune.models.tuners.table import TUNERS
from tailtune.trainers.evaluation.feature_analysis import split_features
from tailtune.trainers.export import ExportedModel, export
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import METHODS, Method
from tailtune.trainers.methods.base import Objective
from tailtune.trainers.storage.checkpoint import trained_state

DEPTH, CLASSES = 4, 5
SIZES = Sizes(bottleneck=3, prompts=2, mask_ratio=0.1, mask_seed=4)
INSERTED = [name for name in LIFT_TUNERS if TUNERS[name].insert]
SELECTED = [name for name, tuner in TUNERS.items() if tuner.select and not tuner.on_batch]
Make = Callable[..., CfgNode]


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def vit(
    names: Sequence[str],
    experts: int = 1,
    own: int | None = None,
    partial: Any = None,
    fast: bool = True,
    **changes: Any,
) -> ViTEncoder:
    """A network of four blocks whose tuners, of all experts, have moved away from where they started."""
    torch.manual_seed(3)
    host = ViTEncoder(small_net(depth=DEPTH, **changes), fast=fast)
    split_experts(host, ExpertSplit(experts, own), "a ViT")
    put_tuners(host, names, SIZES, partial)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for each in host.tuners.parameters():
            each.add_(0.1 * torch.randn(each.shape, generator=generator))
    host.set_precision()
    return host


@torch.no_grad()
def give(host: ViTEncoder, single: ViTEncoder, expert: int | None = None) -> None:
    """Put the tuners of a single model into all experts, or into one and what is shared."""
    source = single.state_dict()
    for name, each in host.state_dict().items():
        parts = name.split(".")
        if parts[0] == "tuners" and len(parts) > 4 and parts[3].isdigit():
            if expert is not None and parts[3] != str(expert):
                continue
            del parts[3]
        each.copy_(source[".".join(parts)])


# --- tuners of one's own ---------------------------------------------------------------------------------------------

TOGETHER = "mask vpt_deep lora lora_mlp ssf_attn ssf_mlp ssf_ln adapter adaptformer"


@pytest.mark.parametrize("own", [1, 2, DEPTH])
@pytest.mark.parametrize("names", [*(each for each in INSERTED if each != "vpt_shallow"), TOGETHER])
def test_equal_experts_are_the_single_model(names: str, own: int) -> None:
    single, host = vit(names.split()), vit(names.split(), 3, own)
    give(host, single)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        for each in (single, host):
            each.to(dtype).set_precision(dtype)
        with torch.no_grad():
            wanted, found = single(images()), host(images())
        assert found.shape == (3, 3, single.feature_dim)
        assert (found - wanted.unsqueeze(1)).abs().max() < tolerance
        if dtype == torch.float64:
            with torch.no_grad():
                assert (wanted - plain_features(single, images().double())).abs().max() < 1e-10


@pytest.mark.parametrize(
    "changes",
    [{"global_pool": "avg", "fc_norm": True}, {"reg_tokens": 3}, {"global_pool": "map", "class_token": False}],
    ids=str,
)
@pytest.mark.parametrize("names", ["vpt_deep lora", "vpt_shallow ssf_ln"])
def test_any_pooling_and_prompts_of_the_trunk(changes: dict[str, Any], names: str) -> None:
    single, host = vit(names.split(), **changes), vit(names.split(), 2, 2, **changes)
    give(host, single)
    with torch.no_grad():
        assert (host(images()) - single(images()).unsqueeze(1)).abs().max() < 1e-5


@pytest.mark.parametrize("names, partial", [("vpt_shallow", [3, 4]), ("vpt_shallow", 2), ("vpt_deep", [1, 3])])
@pytest.mark.parametrize("fast", [True, False])
def test_prompts_at_the_boundary(names: str, partial: Any, fast: bool) -> None:
    """Of the trunk they go on into the branches; where they begin in a branch every expert has its own."""
    host = vit([names], 3, 2, partial, fast)
    for expert in range(3):
        single = vit([names], 1, None, partial, fast)
        state = {name: each for name, each in host.state_dict().items() if name.startswith("tuners")}
        own = {
            name: state[name if name in state else ".".join([*name.split(".")[:3], str(expert), *name.split(".")[3:]])]
            for name in single.state_dict()
            if name.startswith("tuners")
        }
        single.load_state_dict(own, strict=False)
        with torch.no_grad():
            assert torch.allclose(host(images())[:, expert], single(images()), atol=1e-5)
    with torch.no_grad():
        first, second, _ = host(images()).unbind(1)
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("names", [*(each for each in INSERTED if each != "vpt_shallow"), TOGETHER])
def test_gradients_are_of_each_experts_own_part(names: str) -> None:
    """An expert's tuners get what a single model of the same values would, those of the trunk the sum."""
    singles = [vit(names.split()) for _ in range(2)]
    host = vit(names.split(), 2, 2)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for own, each in singles[1].named_parameters():
            if own.startswith("tuners") and int(own.split(".")[2]) >= DEPTH - 2:
                each.add_(0.1 * torch.randn(each.shape, generator=generator))
    give(host, singles[0], 0)
    give(host, singles[1], 1)
    if "mask" in names:  # whose positions differ, and go with the values
        assert all(torch.equal(a, b) for a, b in zip(*(s.tuners["mask"].buffers() for s in singles), strict=True))
    for each in (host, *singles):
        each.double().set_precision(torch.float64)
    factor = torch.randn(2, host.feature_dim, dtype=torch.float64, generator=generator)
    (host(images()) * factor).sum().backward()
    for expert, single in enumerate(singles):
        (single(images()) * factor[expert]).sum().backward()
    for name, each in host.tuners.named_parameters():
        tuner, index, rest = name.split(".", 2)
        owned = int(index) >= DEPTH - 2
        expert, rest = rest.split(".", 1) if owned else ("", rest)
        grads = [single.tuners.get_parameter(f"{tuner}.{index}.{rest}").grad for single in singles]
        wanted = grads[int(expert)] if owned else grads[0] + grads[1]
        assert torch.allclose(each.grad, wanted, atol=1e-10, rtol=1e-8), name


def test_names_and_random_starts() -> None:
    """The first expert begins as a single model would, the others elsewhere; names of a single model stay."""
    hosts = []
    for experts in (1, 3):
        host = ViTEncoder(small_net(depth=DEPTH))
        split_experts(host, ExpertSplit(experts, 1), "a ViT")
        put_tuners(host, ["lora", "mask"], SIZES, None, seed=7)
        hosts.append(host)
    single, several = (dict(host.tuners.state_dict()) for host in hosts)
    assert "lora.3.q.lora_A" in single and "lora.2.q.lora_A" in several
    names = [f"lora.3.{expert}.q.lora_A" for expert in range(3)]
    starts = [several[name] for name in names]
    assert torch.equal(starts[0], single["lora.3.q.lora_A"]) and torch.equal(
        several["lora.2.q.lora_A"], single["lora.2.q.lora_A"]
    )
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    positions = [several[f"mask.3.{expert}.qkv.positions"] for expert in range(3)]
    assert torch.equal(positions[0], single["mask.3.qkv.positions"]) and not torch.equal(positions[1], positions[2])
    assert set(several) - set(single) == {name for name in several if name.split(".")[1] == "3"}


def test_one_expert_has_no_split() -> None:
    host = ViTEncoder(small_net(depth=DEPTH))
    split_experts(host, ExpertSplit(1, 2), "a ViT")
    assert host.experts == 1 and host.num_expert_blocks == 0 and host(images()).ndim == 2


def test_flops_are_of_one_trunk_and_the_branches() -> None:
    def flops(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return int(counter.get_total_flops())

    single, host = vit(["adaptformer"]), vit(["adaptformer"], 3, 1)
    shared = host.trunk(images())
    trunk, branch = flops(lambda: host.trunk(images())), flops(lambda: host.branch(shared, 2))
    assert flops(lambda: host(images())) == trunk + 3 * branch
    assert flops(lambda: single(images())) == trunk + branch
    assert branch < trunk / 3, "the last block of class tokens is cheaper than the others"


def test_nothing_below_the_first_tuner_is_in_the_graph() -> None:
    host = vit(["lora"], 2, 2, partial=2)
    assert not host.trunk(images()).requires_grad and host(images()).requires_grad


@pytest.mark.parametrize("names", ["vpt_deep", TOGETHER])
def test_without_tuners_all_experts_are_the_pre_trained_network(names: str) -> None:
    host, bare = vit(names.split(), 2, 2), vit([])
    with torch.no_grad(), host.untuned():
        found = host(images())
    assert torch.allclose(found, bare(images()).unsqueeze(1).expand_as(found), atol=1e-6)


@pytest.mark.parametrize("names", ["lora_mlp", "adaptformer", "vpt_deep ssf_mlp"])
def test_narrower_arithmetic(names: str) -> None:
    """QuickGELU is folded where no expert acts inside the MLP; what trains stays fp32; fp32 comes back exactly."""
    host = vit(names.split(), 2, 1)
    with torch.no_grad():
        wanted = host(images())
        folded = ["fc1_folded" in dict(block.mlp.named_buffers()) for block in host.net.blocks]
        assert folded == [names == "adaptformer"] * DEPTH
        for residual in (None, torch.float32):
            host.set_precision(torch.bfloat16, residual)
            found = host(images())
            assert found.dtype == torch.bfloat16 and (found.float() - wanted).abs().max() < 0.1
        host.set_precision()
        assert torch.equal(host(images()), wanted)
    assert {each.dtype for each in host.tuners.parameters()} == {torch.float32}


def test_folding_looks_at_every_experts_blocks() -> None:
    host = vit(["lora_mlp"], 2, 1, partial=1)
    assert ["fc1_folded" in dict(block.mlp.named_buffers()) for block in host.net.blocks] == [True, True, True, False]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SELECTED)
def test_weights_that_experts_share_cannot_be_their_own(name: str) -> None:
    with pytest.raises(UserError, match=rf"{name} trains .* expert_split 0, or partial \[0,3\)"):
        vit([name, "lora"], 2, 1)
    with pytest.raises(UserError, match="no tuner acts in the last 1 blocks"):
        vit([name], 2, 1, partial=[0, 3])


@pytest.mark.parametrize("names, partial", [("", None), ("vpt_shallow", None), ("lora", [0, 2])])
def test_experts_that_would_only_repeat_are_refused(names: str, partial: Any) -> None:
    with pytest.raises(UserError, match="expert_split 2: no tuner acts in the last 2 blocks"):
        vit(names.split(), 2, 2, partial)


WORDS = [
    ("tiny_clip_peft num_experts 2 expert_split 9", ["expert_split 9", "blocks"]),
    ("tiny_clip_peft num_experts 2 reduce_dimension True", ["reduce_dimension", "our ResNets"]),
    ("tiny_clip num_experts 2 expert_split 1", ["no tuner acts in the last 1"]),
    ("tiny_clip_ft num_experts 2 expert_split 1", ["full_tuning", "experts share"]),
    ("tiny_clip num_experts 2 expert_split 1 lora True peft LoRA", ["peft LoRA", "partial [0,"]),
    ("clip_rn50 num_experts 2 expert_split 1", ["expert_split 1: RN50-quickgelu runs as a whole", "ResNet-32"]),
    ("tiny_clip backbone timm:resnet18 num_experts 2 expert_split 1 init_head none", ["resnet18 runs as a whole"]),
    ("zstiny_clip num_experts 2", ["zero_shot", "num_experts 2"]),
]


@pytest.mark.parametrize("words, texts", WORDS)
def test_options_that_do_not_fit(words: str, texts: list[str], config: Make) -> None:
    model, *pairs = words.split()
    with pytest.raises(UserError) as caught, torch.device("meta"):
        build_model(config("fake_lt", model, *pairs), [f"c{k}" for k in range(CLASSES)])
    assert all(text in str(caught.value) for text in texts), caught.value


# --- heads alone, and how they begin ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [(), ("expert_split", 0)])
@pytest.mark.parametrize("backbone", ["TinyCLIP", "timm:resnet18", "CLIP-RN50", "timm:vit_tiny_patch16_224"])
def test_heads_alone_on_any_backbone(backbone: str, split: tuple[Any, ...], config: Make) -> None:
    words = ("backbone", backbone, "init_head", "none", "num_experts", 3, "resolution", "none", *split)
    words += ("adaptformer", False) + (("lora", True) if "vit" in backbone or backbone == "TinyCLIP" else ())
    with torch.device("meta"):
        model = build_model(config("fake_lt", "tiny_clip_peft", *words), ["a", "b", "c"])
        encoder = model.encoder
        side = 224 if backbone != "TinyCLIP" else encoder.grid[0] * encoder.patch_size
        assert encoder.experts == 1 and model.num_experts == 3
        assert model(torch.empty(2, 3, side, side)).shape == (2, 3, 3)


def classifier(
    host: ViTEncoder, experts: int, init: Tensor | None = None, name: str = "CosineClassifier"
) -> ClassificationModel:
    torch.manual_seed(0)
    heads = [head_with(name, host.feature_dim, CLASSES, 20.0) for _ in range(experts)]
    head = heads[0] if experts == 1 else ExpertHeads(heads)
    start = None if init is None else lambda _: init
    return ClassificationModel(host, head, ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25)), start)


@pytest.mark.parametrize("name", ["CosineClassifier", "LinearClassifier"])
def test_heads_with_the_same_start_begin_apart(name: str) -> None:
    """Heads that are given the same rows begin one hundredth apart; the first has exactly those, the rest is seeded."""
    rows = F.normalize(torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(2)), dim=-1)
    context = head_context(torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64), CLASSES)
    host = vit(["adaptformer"], 3, 1)
    model = classifier(host, 3, rows, name)
    model.init_head(context)
    weights = [head.get_parameter("weight").detach().clone() for head in heads_of(model.head)]
    assert torch.equal(weights[0], rows)
    for each in weights[1:]:
        assert torch.allclose((each - rows).norm(dim=-1), torch.full((CLASSES,), 0.01), atol=1e-6)
    assert not torch.equal(weights[1], weights[2])
    again = classifier(host, 3, rows, name)
    again.init_head(context)
    assert torch.equal(heads_of(again.head)[2].get_parameter("weight"), weights[2])


def train(model: ClassificationModel, diversity: float, steps: int = 20) -> Callable[[], float]:
    """Some steps of RIDE; the spread of the experts' logits, before and after."""
    kind = METHODS["ride"]
    method = kind(model, Objective(torch.arange(CLASSES) + 1, LOSSES["CE"]), kind.Options(diversity=diversity)).train()
    batch = {"image": images(8), "label": torch.arange(8) % CLASSES, "weight": torch.ones(8)}
    optimizer = torch.optim.SGD([each for each in method.parameters() if each.requires_grad], 0.01, 0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        step = method(batch)
        (step.loss_sum / step.weight).backward()
        optimizer.step()

    @torch.no_grad()
    def spread() -> float:
        logits = method.expert_logits(batch["image"])
        return float((logits - logits.mean(1, keepdim=True)).abs().max())

    return spread


@pytest.mark.parametrize("diversity, least", [(-0.2, 0.05), (-3.0, 1.5)])
def test_heads_that_begin_apart_stay_so(diversity: float, least: float) -> None:
    """Alike they are one for ever. Apart, the reward for differing wins where it outweighs the loss, whose second
    derivative in the logits is the divergence's own: heads on one feature differ little under RIDE's -0.2."""
    context = head_context(torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64), CLASSES)
    rows = F.normalize(torch.randn(CLASSES, 64, generator=torch.Generator().manual_seed(2)), dim=-1)
    model = classifier(vit([]), 3, rows)
    model.init_head(context)
    before = train(model, diversity, 0)()
    assert train(model, diversity)() > least * before > 0
    with torch.no_grad():
        for head in heads_of(model.head):
            head.get_parameter("weight").copy_(rows)
    assert train(model, diversity)() < 1e-4


def test_tuners_of_ones_own_grow_apart() -> None:
    """All begin as the network that they are put into, and end as others."""
    host = ViTEncoder(small_net(depth=DEPTH))
    split_experts(host, ExpertSplit(3, 1), "a ViT")
    put_tuners(host, ["adaptformer"], SIZES)
    host.set_precision()
    model = classifier(host, 3)
    assert host(images()).std(1).max() < 1e-5
    train(model, -0.2)
    assert host(images()).std(1).max() > 1e-3


def test_one_head_has_the_rows_as_they_are() -> None:
    rows = torch.ones(CLASSES, 64)
    model = classifier(vit(["lora"]), 1, rows)
    model.init_head(head_context(torch.zeros(1, 64), torch.zeros(1, dtype=torch.int64), CLASSES))
    assert torch.equal(model.head.get_parameter("weight"), rows)


# --- exports and analysis --------------------------------------------------------------------------------------------


class Routing(Method):
    """Says that it asks only some experts about an image."""

    asks_every_expert = False


def subject(own: int = 1, routes: bool = False) -> ExportedModel:
    host = vit(["lora"], 3, own)
    kind = Routing if routes else Method
    method = kind(classifier(host, 3), Objective(torch.arange(CLASSES) + 1, LOSSES["CE"])).eval()
    return ExportedModel(method, ["lora"], [f"c{k}" for k in range(CLASSES)], SIDE)


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("name", ["peft", "merged", "lift"])
def test_formats_of_one_head_are_refused(name: str, own: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"export {name}: .* 3 experts; `export onnx` keeps them"):
        export(subject(own), name, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("own", slow_except([], [0, 2]))
def test_onnx_has_the_logits_of_each_expert(own: int, tmp_path: Path) -> None:
    import onnxruntime

    made = subject(own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(made, "onnx", tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    mean, each = map(torch.from_numpy, session.run(None, {"image": made.images(4).numpy()}))
    with torch.no_grad():
        wanted = made.method.expert_logits(made.images(4))
    assert each.shape == (4, 3, CLASSES) and torch.allclose(each, wanted, atol=1e-4)
    assert torch.allclose(mean, wanted.mean(1), atol=1e-4)
    assert "expert_logits" in json.loads((tmp_path / "facts.json").read_text())


def test_a_method_that_routes_has_no_graph(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export onnx: the method asks other experts about every image"):
        export(subject(routes=True), "onnx", tmp_path / "onnx")


def test_distances_are_means_over_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(8))
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    batches = [{"image": raw[k : k + 3], "label": labels[k : k + 3], "weight": torch.ones(3)} for k in (0, 3)]
    monkeypatch.setattr("tailtune.trainers.evaluation.feature_analysis.eval_loader", lambda *_, **__: batches)
    method: Any = nn.Module()
    method.model = nn.Module()
    method.model.features = lambda images: images
    device = torch.device("cpu")
    both = split_features(method, [], 3, device, 3, 0)  # type: ignore[arg-type]
    alone = []
    for expert in range(2):
        method.model.features = lambda images, expert=expert: images[:, expert]
        alone.append(split_features(method, [], 3, device, 3, 0))  # type: ignore[arg-type]
    assert torch.allclose(both.distances, torch.stack([each.distances for each in alone]).mean(0), atol=1e-6)
    assert torch.allclose(both.similarity, torch.stack([each.similarity for each in alone]).mean(0), atol=1e-6)


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command_trains_tests_and_resumes_experts(launch: Cli) -> None:
    words = "-d fake_lt -m tiny_clip_peft num_experts 2 expert_split 1 num_epochs 1 num_workers 0 output_dir x"
    words += " init_head class_mean micro_batch_size 8"
    assert launch(words).returncode == 0
    stored = json.loads(Path("output/x/metrics.json").read_text())
    names = list(trained_tensors(Path("output/x/checkpoint/tensors.safetensors")))
    assert any(".1.up_proj.weight" in name or ".1.mlp." in name for name in names)
    done = launch(words, "test_only True test_batch_size 16")
    assert done.returncode == 0, done.stderr
    (again,) = Path("output/x/tests").glob("*/metrics.json")
    assert json.loads(again.read_text())["test"]["nll"] == pytest.approx(stored["test"]["nll"], abs=1e-4)
    assert launch(words, "num_experts 1 test_only True").returncode == 2


def trained_tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_what_a_checkpoint_holds() -> None:
    made = subject()
    assert "model.encoder.tuners.lora.3.2.v.lora_B" in trained_state(made.method)
    assert clip_vit().experts == 1
