"""GLMC: two mixed views that agree, and cumulative learning (successors' specification §5.2, fixture 44)."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trajectories
from torch import Tensor
from trajectories import trained
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_data, build_info
from tailtune.models import build_model, resolve
from tailtune.trainers.config_checks import outline
from tailtune.trainers.losses import LOSSES, Prior, log_prior
from tailtune.trainers.methods import Method, build_method
from tailtune.trainers.methods.glmc import GLMC, Mixing, blended, consistency, draw, pasted

Config = Callable[..., CfgNode]
COUNTS = torch.tensor([500, 200, 50, 20, 5])
WORDS = ("pretrained", "none", "method", "glmc", "pair_sampler", "shuffle", "loss_type", "CE")


def made(cfg: CfgNode) -> Method:
    cfg = resolve(cfg)
    info = build_info(cfg)
    return build_method(cfg, build_model(cfg, info.class_names), info)


def test_the_loss_is_that_of_the_fixture() -> None:
    """44, in fp64: two heads on two views, and the consistency of their projections."""
    i, c, d = torch.arange(8).double()[:, None], torch.arange(5).double(), torch.arange(6).double()
    heads = [(5 * torch.sin(1 + i + 2 * c + 0.7 * k)).unsqueeze(1) for k in range(4)]
    p1, z1, p2, z2 = (torch.sin(0.5 * i + 0.3 * d + k) for k in range(4))
    labels = torch.arange(8) * 3 % 5
    weights = COUNTS.double() ** -1.2
    weights = weights / weights.mean()
    assert weights.tolist() == pytest.approx([0.015692, 0.047120, 0.248703, 0.746808, 3.941676], abs=1e-6)

    def cross_entropy(logits: Tensor, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return LOSSES["CE"](logits[:, 0], batch["label"], batch["weight"], Prior(log_prior(COUNTS), COUNTS))

    method: Any = SimpleNamespace(alpha=1 - (100 / 200) ** 2, class_weights=weights, loss=cross_entropy)
    method.options, method.sample_weights = SimpleNamespace(consistency=4.0), lambda batch: batch["weight"]
    batch = {"label": labels, "partner_label": labels[[3, 0, 1, 2, 7, 4, 5, 6]], "weight": torch.ones(8).double()}
    cosines = consistency([p1, p2], [z1, z2])
    loss_sum, weight = GLMC.mixture_loss(method, [heads[0], heads[2]], [heads[1], heads[3]], cosines, 0.3, batch)
    assert float(weight) == pytest.approx(8)
    assert float(loss_sum / weight) == pytest.approx(9.722182, abs=1e-6)


def test_samples_of_weight_0_count_for_nothing(config: Config) -> None:
    """An unreadable image gives no loss, even if its logits and cosines are not finite."""
    method = made(config("fake_lt", "tiny_clip", *WORDS))
    assert isinstance(method, GLMC)
    torch.manual_seed(0)
    plain, logits = ([torch.randn(4, 1, 10) for _ in range(2)] for _ in range(2))
    cosines, labels = torch.rand(4), torch.arange(4)
    batch = {"label": labels, "partner_label": labels.flip(0), "weight": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    short = {name: value[:3] for name, value in batch.items()}
    wanted = method.mixture_loss([p[:3] for p in plain], [z[:3] for z in logits], cosines[:3], 0.3, short)
    for each in (*plain, *logits, cosines):
        each[3] = torch.nan
    found = method.mixture_loss(plain, logits, cosines, 0.3, batch)
    assert [float(value) for value in found] == pytest.approx([float(value) for value in wanted])


def test_a_step_may_be_cut_with_deferred_weights(config: Config) -> None:
    """The loss is a sum over samples, with their class weights, too."""
    method = made(config("fake_lt", "tiny_clip", *WORDS, "drw_epoch", 0))
    assert isinstance(method, GLMC) and method.deferred
    torch.manual_seed(0)
    plain, logits = ([torch.randn(4, 1, 10) for _ in range(2)] for _ in range(2))
    cosines, labels = torch.rand(4), torch.tensor([0, 0, 9, 9])
    batch = {"label": labels, "partner_label": labels[[0, 2, 1, 3]], "weight": torch.ones(4)}
    whole = method.mixture_loss(plain, logits, cosines, 0.3, batch)

    def part(rows: slice) -> tuple[Tensor, Tensor]:
        cut = {name: value[rows] for name, value in batch.items()}
        return method.mixture_loss([p[rows] for p in plain], [z[rows] for z in logits], cosines[rows], 0.3, cut)

    parts = [part(slice(0, 3)), part(slice(3, 4))]
    assert [float(value) for value in whole] == pytest.approx(
        [float(sum(values)) for values in zip(*parts, strict=True)]
    )


@pytest.mark.parametrize("loss", ["CB", "GRW"])
def test_losses_with_class_weights_are_refused(loss: str, config: Config) -> None:
    with pytest.raises(UserError, match="method glmc weighs the classes itself"):
        outline(config("fake_lt", "tiny_clip", *WORDS, "loss_type", loss))


def original_box(height: int, width: int, share: float, row: int, column: int) -> tuple[int, ...]:
    """The box of the original: centre, rounded-up sides, halved and cut off."""
    ratio = np.sqrt(1 - share)
    rows, columns = int(np.ceil(height * ratio)), int(np.ceil(width * ratio))
    clip = (
        np.clip([row - rows // 2, row + rows // 2], 0, height),
        np.clip([column - columns // 2, column + columns // 2], 0, width),
    )
    return tuple(int(value) for side in clip for value in side)


@pytest.mark.parametrize("share, row, column", [(0.3, 0, 31), (0.9, 16, 7), (0.0, 16, 16), (1.0, 3, 3)])
def test_the_box_is_that_of_the_original(share: float, row: int, column: int) -> None:
    images, partners = torch.zeros(2, 3, 32, 24), torch.ones(2, 3, 32, 24)
    column = min(column, 23)
    found = pasted(images, partners, Mixing(share, ((row + 0.5) / 32, (column + 0.5) / 24)))
    top, bottom, left, right = original_box(32, 24, share, row, column)
    wanted = torch.zeros_like(images)
    wanted[:, :, top:bottom, left:right] = 1
    assert torch.equal(found, wanted) and not images.any()
    assert torch.equal(blended(images, partners, share), torch.full_like(images, 1 - share))


def test_the_share_is_uniform_and_a_function_of_the_generator() -> None:
    one, other = (draw(torch.Generator().manual_seed(4)) for _ in range(2))
    assert one == other
    shares = [draw(torch.Generator().manual_seed(seed)).share for seed in range(300)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06) and np.std(shares) == pytest.approx(12**-0.5, abs=0.03)


def test_the_second_views_are_of_the_same_images(config: Config) -> None:
    """They are other draws, which repeat; the first views do not change by them."""
    view = build_data(resolve(config("fake_lt", "tiny_clip", *WORDS, "augment", "cifar_crop"))).train
    keys = [(3, 0, 0, 8, -1), (5, 0, 0, 5, -1)]
    plain = view.finish(view.batch(keys))
    view.two_views = True
    found, again = view.finish(view.batch(keys)), view.finish(view.batch(keys))
    assert found["partner_label"].tolist() == view.labels[[8, 5]].tolist()
    assert all(torch.equal(found[name], plain[name]) for name in plain) and "other_image" not in plain
    for name in ("image", "partner"):
        assert torch.equal(found[f"other_{name}"], again[f"other_{name}"])
        assert not torch.equal(found[f"other_{name}"], found[name])
    assert not torch.equal(found["image"][1], found["partner"][1])  # the same image twice, with two draws
    view.transform = build_data(resolve(config("fake_lt", "tiny_clip", *WORDS, "augment", "none"))).train.transform
    fixed = view.finish(view.batch(keys))
    assert all(torch.equal(fixed[f"other_{name}"], fixed[name]) for name in ("image", "partner"))


@pytest.mark.parametrize("experts", [1, 2])
def test_the_balanced_classifier_predicts(experts: int, config: Config) -> None:
    """At the end W_r alone has learnt with class weights; W, h and q are no part of the prediction."""
    method = made(config("fake_lt", "tiny_clip", *WORDS, "num_experts", experts))
    assert isinstance(method, GLMC)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    before = method.eval().predict(images)
    with torch.no_grad():
        for weight in (*method.plain_head.parameters(), *method.projection.parameters()):
            weight.add_(1)
    assert torch.equal(method.predict(images), before)
    batch = {name: images for name in ("image", "partner", "other_image", "other_partner")}
    batch |= {"label": torch.arange(4), "partner_label": torch.arange(4), "weight": torch.ones(4)}
    method.train().before_step(1)
    method.on_epoch(0, 10)
    method(batch).loss_sum.backward()
    head = next(method.model.head.parameters())
    assert head.grad is None or not head.grad.any()  # α = 1: only W learns in the first epoch
    method.zero_grad()
    method.on_epoch(9, 10)
    method(batch).loss_sum.backward()
    assert method.alpha == pytest.approx(0.19) and head.grad is not None and head.grad.any()


RUN = "method glmc pair_sampler tempered loss_type CE glmc.dim 16 "
RUN += "subset_cap 4 batch_size 16 max_test_images 8"  # three steps an epoch, the last one partial


def test_a_cut_and_killed_run_is_the_same(tmp_path: Path) -> None:
    """fp64: 8 images at once as 16, to rounding."""
    whole, killed = (
        trained(trajectories.train(tmp_path, 0, micro, dies, more=RUN)) for micro, dies in ((16, False), (8, True))
    )
    assert all(torch.allclose(killed[name], tensor, rtol=1e-9, atol=1e-12) for name, tensor in whole.items())


@pytest.mark.slow
def test_a_killed_run_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    whole, killed = (trained(trajectories.train(tmp_path, 0, 8, dies, more=RUN)) for dies in (False, True))
    assert all(torch.equal(killed[name], tensor) for name, tensor in whole.items())


def test_the_wide_network_has_the_parameters_of_the_original(config: Config) -> None:
    method = outline(config("cifar100_ir100", "resnet32_glmc"))
    assert method.counts()["total"] == 7_484_424


def test_a_second_image_is_needed(config: Config) -> None:
    with pytest.raises(UserError, match="takes two images at a time"):
        outline(config("fake_lt", "tiny_clip", "pretrained", "none", "method", "glmc"))


def test_text_features_are_refused(config: Config) -> None:
    """W would be a second text tower that no optimizer knows."""
    with pytest.raises(UserError, match="method glmc trains a classifier of its own, and classifier TextClassifier"):
        outline(config("fake_lt", "tiny_clip", *WORDS, "classifier", "TextClassifier", "text_lora", True))
