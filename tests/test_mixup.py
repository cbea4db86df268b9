"""mixup: the numbers of the specification's fixture, a plain formulation, whose losses count."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs import UserError
from tailtune.datasets.build_data import build_info
from tailtune.models import build_model
from tailtune.trainers.methods import build_method
from tailtune.trainers.methods.mixup import Mixup, mixed

Config = Callable[..., CfgNode]


def build(config: Config, *pairs: object) -> Any:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "init_head", "none", "method", "mixup", *pairs)
    info = build_info(cfg)
    return build_method(cfg, build_model(cfg, info.class_names), info)


def batch() -> dict[str, Any]:
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": images, "label": torch.arange(6), "weight": torch.ones(6)}


def test_images_are_mixed_as_in_the_original() -> None:
    """H5: λ and order are those that NumPy and torch draw for seed 0."""
    share, order = np.random.RandomState(0).beta(1, 1), torch.randperm(4, generator=torch.Generator().manual_seed(0))
    assert share == pytest.approx(0.44912526) and order.tolist() == [0, 1, 3, 2]
    found = mixed(torch.arange(4.0).double(), share, order).tolist()
    assert found == pytest.approx([0, 1, 2.550874710, 2.449125290], abs=1e-7)


def draw(method: Mixup, step: int, count: int = 6) -> tuple[float, Tensor]:
    """What `forward` is about to draw."""
    method.before_step(step)
    found = method.draw(count)
    method.before_step(step)
    return found


@pytest.mark.parametrize(("inner", "experts", "loss"), [("classify", 1, "LAS"), ("ride", 3, "LDAM"), ("sade", 3, "CE")])
def test_the_loss_is_of_both_labels(inner: str, experts: int, loss: str, config: Config) -> None:
    """Two losses of the inner method; a sample counts where both its images could be read."""
    method, given = build(config, "mixup.inner", inner, "num_experts", experts, "loss_type", loss), batch()
    given["weight"][2] = 0.0
    share, order = draw(method, 5)
    outcome = method.train()(given)
    images = method.model.normalised(given["image"])
    logits = method.model(share * images + (1 - share) * images[order])
    weight = given["weight"] * given["weight"][order]
    assert float(outcome.weight) == pytest.approx(float(weight.sum())) and weight.sum() < 6
    first = method.inner.loss(logits, {"label": given["label"], "weight": weight})[0]
    second = method.inner.loss(logits, {"label": given["label"][order], "weight": weight})[0]
    assert torch.allclose(outcome.loss_sum, share * first + (1 - share) * second, rtol=1e-5)
    assert torch.allclose(outcome.logits, logits.mean(1), atol=1e-5)
    given["image"][2] = 255 - given["image"][2]
    method.before_step(5)
    assert torch.equal(method(given).loss_sum, outcome.loss_sum), "what cannot be read counts nowhere"


def test_shares_are_those_of_a_beta_distribution(config: Config) -> None:
    """Functions of seed and step; without α nothing is mixed, and at test time neither."""
    method, given = build(config, "mixup.alpha", 0.2), batch()
    shares = [draw(method, step)[0] for step in range(2000)]
    assert shares == [draw(method, step)[0] for step in range(2000)] and len(set(shares)) > 1900
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * 1.4), abs=0.01)  # 1 / (4 (2α + 1))
    assert draw(method, 1)[0] != draw(build(config, "mixup.alpha", 0.2, "seed", 1), 1)[0]
    method.before_step(7)
    assert method.draw(6)[0] != method.draw(6)[0], "each micro-batch has its own"
    plain = build(config, "mixup.alpha", 0, "loss_type", "CE").train()
    wanted = F.cross_entropy(plain.predict(given["image"]), given["label"], reduction="sum")
    assert torch.allclose(plain(given).loss_sum, wanted)
    assert torch.equal(method.eval()(given).logits, method.predict(given["image"]))
    assert method.batch_coupled


@pytest.mark.parametrize("inner", ["mixup", "batchformer", "ride_ea"])
def test_refusals(inner: str, config: Config) -> None:
    with pytest.raises(UserError, match="mixup"):
        build(config, "mixup.inner", inner, "num_experts", 2, "after", "tiny_clip")


def test_a_teacher_would_see_other_images(config: Config) -> None:
    with pytest.raises(UserError, match=r"mixup\.inner distill"):
        build(config, "mixup.inner", "distill", "distill.inner", "classify", "after", "tiny_clip")
