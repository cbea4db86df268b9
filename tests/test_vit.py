"""The ViT host: LIFT's fixtures, equality of the fast path with a plain formulation, its deterministic costs."""

import pytest
import torch
from small import SIDE, WIDTH, filled, fixture_net, plain_features, small_net, tuned
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from configs.errors import UserError
from models.clip import Clip
from models.heads import CosineClassifier
from models.tuners import TUNERS, Sizes, add_tuners, bottleneck_dim
from models.vit import ViT
from trainers.losses import Prior, log_prior, logit_adjusted

FIXTURES = {  # lift.md §13.6: feature[0:4], sum, L2 norm
    (): ([0.25395, -0.00013, -1.07229, -0.55991], -1.5997, 7.93454),
    ("adaptformer",): ([0.34087, -0.01793, -1.07221, -0.49428], -1.5558, 7.95083),
    ("adapter",): ([0.41301, 0.00843, -1.07978, -0.48767], -1.5184, 7.96310),
    ("lora",): ([0.26121, -0.00160, -1.07264, -0.56721], -1.5965, 7.93476),
    ("vpt_shallow",): ([0.19290, -0.08273, -1.06705, -0.64207], -1.6258, 7.93363),
    ("vpt_deep",): ([0.21805, -0.07004, -1.07934, -0.54365], -1.6130, 7.93372),
}
ALONE = [(name,) for name in TUNERS]
TOGETHER = [("adaptformer", "adapter", "lora", "vpt_deep"), ("bias_tuning", "adaptformer"), ("full_tuning", "lora")]


@pytest.mark.parametrize("names", FIXTURES)
@pytest.mark.parametrize("fast", [True, False])
def test_features_are_those_of_the_original(names: tuple[str, ...], fast: bool) -> None:
    first, total, norm = FIXTURES[names]
    with torch.no_grad():
        feature = tuned(names, fast=fast)(filled((1, 3, SIDE, SIDE), 0, 1.0))[0]
    assert torch.allclose(feature[:4], torch.tensor(first), atol=1e-4)
    assert float(feature.sum()) == pytest.approx(total, abs=2e-4)
    assert float(feature.norm()) == pytest.approx(norm, abs=1e-4)


def test_partial_adaptformer_is_that_of_the_original() -> None:
    with torch.no_grad():
        feature = tuned(["adaptformer"], partial=1)(filled((1, 3, SIDE, SIDE), 0, 1.0))[0]
    assert torch.allclose(feature[:4], torch.tensor([0.25676, -0.03347, -1.07414, -0.52632]), atol=1e-4)
    assert float(feature.sum()) == pytest.approx(-1.6215, abs=2e-4)


@pytest.mark.parametrize("names", [(), *ALONE, *TOGETHER])
@pytest.mark.parametrize("partial", [None, 1, [0, 1]])
def test_fast_path_equals_the_plain_formulation(names: tuple[str, ...], partial: int | list[int] | None) -> None:
    """Logits to 1e-5 and every gradient to 1e-4 (relative L2) in fp32."""
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    host, head = tuned(names, partial), CosineClassifier(WIDTH, 7, 25.0)
    labels, prior = torch.tensor([0, 3, 6]), Prior(log_prior(torch.arange(1, 8)), torch.arange(1, 8))

    def logits_and_gradients(features: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = head(features)
        logit_adjusted(logits, labels, torch.ones(3), prior)[0].backward()
        parameters = [*host.named_parameters(), *head.named_parameters()]
        found = {name: each.grad.clone() for name, each in parameters if each.grad is not None}
        host.zero_grad(), head.zero_grad()
        return logits.detach(), found

    logits, gradients = logits_and_gradients(host(images))
    wanted, wanted_gradients = logits_and_gradients(plain_features(host, images))
    assert (logits - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert gradients.keys() == wanted_gradients.keys()
    assert {name for name, each in host.named_parameters() if each.requires_grad} <= gradients.keys()
    for name, each in wanted_gradients.items():
        assert (gradients[name] - each).norm() <= 1e-4 * each.norm() + 1e-7, name


@pytest.mark.parametrize("name", ["adaptformer", "adapter", "lora", "full_tuning", "bias_tuning", "ln_tuning"])
def test_a_fresh_tuner_changes_nothing(name: str) -> None:
    images = torch.randn(2, 3, SIDE, SIDE)
    bare, host = ViT(fixture_net(), fast=False), ViT(fixture_net(), fast=False)
    add_tuners(host, [name], Sizes(4, 3))
    with torch.no_grad():
        assert torch.equal(bare(images), host(images))


def test_initial_values_are_lifts() -> None:
    host = ViT(small_net(embed_dim=768, num_heads=12, img_size=32, patch_size=16))
    add_tuners(host, ["lora", "adaptformer", "vpt_deep"], Sizes(32, 10))
    lora, bottleneck = host.tuners["lora"]["0"]["q"], host.tuners["adaptformer"]["0"]["mlp"]
    assert 0.17 < lora.lora_A.abs().max() < 32**-0.5 and not lora.lora_B.any()
    assert float(bottleneck.down_proj.weight.detach().std()) == pytest.approx(0.02083, rel=0.03)
    assert not bottleneck.up_proj.weight.any() and bottleneck.scale.shape == (1,)
    assert 0.06 < host.tuners["vpt_deep"]["0"]["tokens"].prompt.abs().max() < 0.0625


def test_a_tuners_draw_does_not_depend_on_the_others() -> None:
    alone, both = ViT(small_net()), ViT(small_net())
    add_tuners(alone, ["adaptformer"], Sizes(4, 3), seed=3)
    add_tuners(both, ["lora", "adaptformer", "vpt_deep"], Sizes(4, 3), seed=3)
    for name, each in alone.tuners.named_parameters():
        assert torch.equal(each, both.tuners.get_parameter(name))


def test_refused_combinations() -> None:
    with pytest.raises(UserError, match="vpt_shallow and vpt_deep"):
        add_tuners(ViT(small_net()), ["vpt_shallow", "vpt_deep"], Sizes(4, 3))
    with pytest.raises(UserError, match="more blocks than the 2"):
        add_tuners(ViT(small_net()), ["adapter"], Sizes(4, 3), partial=3)
    with pytest.raises(ValueError, match="layer scale"):
        ViT(small_net(init_values=1e-5))


@pytest.mark.parametrize(("classes", "depth", "dim"), [(100, 12, 4), (365, 12, 8), (1000, 12, 32), (8142, 12, 256)])
def test_bottleneck_rule(classes: int, depth: int, dim: int) -> None:
    assert bottleneck_dim(classes, depth) == dim


def test_half_precision_is_undone_exactly() -> None:
    """Evaluation in fp32 after training in bf16 uses the weights as loaded, folded ones too."""
    images = torch.randn(2, 3, SIDE, SIDE)
    host = tuned(["adaptformer"])
    with torch.no_grad():
        before = host(images)
        host.set_precision(torch.bfloat16)
        assert host.net.blocks[0].attn.qkv.weight.dtype == host(images).dtype == torch.bfloat16
        assert host.tuners["adaptformer"]["0"]["mlp"].scale.dtype == torch.float32
        assert 0 < (host(images).float() - before).abs().max() < 0.1
        host.set_precision()
        assert torch.equal(host(images), before)


def test_folded_weights_are_in_no_state_dict() -> None:
    host = tuned(["adaptformer"])
    assert "fc1_folded" in host.net.blocks[0].mlp._buffers
    assert not [name for name in host.state_dict() if "folded" in name]


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps: unique storages, parameters and their runtime copies left out."""

    def __init__(self, module: nn.Module) -> None:
        known = {each.untyped_storage().data_ptr() for each in [*module.parameters(), *module.buffers()]}
        self.storages: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                self.storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        super().__init__(pack, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self.storages.values())


def full_size() -> tuple[ViT, CosineClassifier]:
    """ViT-B/16 + AdaptFormer for 1000 classes; values do not matter here, sizes do."""
    host = Clip("ViT-B-16-quickgelu").build(None, 224, 0, project=False).encoder
    add_tuners(host, ["adaptformer"], Sizes(32, 10))
    return host, CosineClassifier(768, 1000, 25.0)


@pytest.fixture(scope="module")
def vit_b16() -> tuple[ViT, CosineClassifier]:
    return full_size()


def step(host: ViT, head: nn.Module, count: int) -> torch.Tensor:
    images = torch.zeros(count, 3, 224, 224)
    prior = Prior(torch.zeros(1000), torch.ones(1000))
    return logit_adjusted(head(host(images)), torch.zeros(count, dtype=torch.int64), torch.ones(count), prior)[0]


def test_training_flops_of_vit_b16(vit_b16: tuple[ViT, CosineClassifier]) -> None:
    """≤ 60.4 G an image as the counter sees it on a CPU, which does not see the fused attention kernel."""
    vit_b16[0].set_precision()
    with FlopCounterMode(display=False) as counter:
        step(*vit_b16, 1).backward()
    linear = counter.get_total_flops() / 1e9
    assert linear <= 60.4
    attention = 4 * 197 * 197 * 768 / 1e9  # QKᵀ and AV of one block; its backward counted as twice that (perf.md §2)
    assert linear + (11 + 10 * 2) * attention <= 64.1


@pytest.mark.parametrize(("residual", "limit"), [(None, 34.0), (torch.float32, 40.0)])
def test_saved_activations_of_vit_b16(
    vit_b16: tuple[ViT, CosineClassifier], residual: torch.dtype | None, limit: float
) -> None:
    """MiB an image in bf16, as the slope between one image and three."""
    host, head = vit_b16
    host.set_precision(torch.bfloat16, residual)
    sizes = []
    for count in (1, 3):
        saved = SavedBytes(nn.ModuleList([host, head]))
        with saved:
            step(host, head, count)
        sizes.append(saved.total)
    assert (sizes[1] - sizes[0]) / 2 / 2**20 <= limit, sizes
