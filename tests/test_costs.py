"""docs/costs.md: what the training of each shipped config costs. The numbers are counted again and compared."""

import pytest
import torch
from tiers import slow_except

from tailtune.scripts._step_cost import Counter
from tailtune.scripts.make_costs import (
    IMAGES_ONLY,
    PAGE,
    PAIRS,
    TEXT_AND_IMAGES,
    TORCH,
    counted,
    page,
    step_of,
    stored,
    waits_of,
)

LIMIT = 18 * 10**9
"""What training may keep on a GPU of 20 GB. The rest is for the buffers of single layers, for CUDA itself and for what
its allocator wastes."""
VERSION, STORED = stored()
CHEAP = [("digits_lt", "tiny_clip_text_peft"), ("digits_lt", "tiny_clip_ride"), ("cifar100_ir100", "resnet32_crt")]
TRAINED = [pair for pair in PAIRS if "reason" not in STORED.get(pair, {})]
SAME = ("trained", "total", "steps", "batch", "at_once", "flops")
"""What does not depend on the version of torch."""


def test_every_config_has_its_costs() -> None:
    """What a config gets or loses is counted again: run scripts/make_costs.py."""
    assert list(STORED) == PAIRS


def test_the_page_shows_the_stored_numbers() -> None:
    assert page(VERSION, STORED) == PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(("data", "model"), slow_except(CHEAP, PAIRS))
def test_a_config_costs_what_is_stored(data: str, model: str) -> None:
    """A difference is meant or not: `python scripts/make_costs.py MODEL` stores it, for the review to see."""
    found = counted(data, model)
    then = {name: value for name, value in STORED[data, model].items() if name != "waits"}
    if VERSION == TORCH:
        assert found == then
    assert {name: found.get(name) for name in SAME} == {name: then.get(name) for name in SAME}


@pytest.mark.parametrize(("data", "model"), slow_except(CHEAP[1:2], TRAINED))
def test_a_step_waits_as_often_as_is_stored(data: str, model: str) -> None:
    assert waits_of(data, model) == STORED[data, model]["waits"]


def test_every_config_fits_a_gpu_of_20_gb() -> None:
    assert not {pair: row["memory"] for pair, row in STORED.items() if row.get("memory", 0) >= LIMIT}


@pytest.mark.parametrize(("data", "most"), [("imagenet_lt", 1.3), ("inat2018", 3.0)])
def test_what_text_mode_costs(data: str, most: float) -> None:
    """Beside the same tuner of the image encoder alone, in a step of 128 images."""
    rows = [STORED[data, IMAGES_ONLY], STORED[data, TEXT_AND_IMAGES]]
    assert [row["batch"] for row in rows] == [128, 128]
    images, with_texts = map(step_of, rows)
    assert 1 < with_texts.flops / images.flops < most and 1 < with_texts.moved / images.moved < most


def test_the_counter_is_right() -> None:
    """A product of 2·M·K·N FLOPs, and a ReLU that reads and writes what the product has written; views are free."""
    with torch.device("meta"), Counter() as counter:
        (torch.empty(16, 8) @ torch.empty(4, 8).T).view(64).relu()
    assert (counter.work.flops, counter.work.kernels, counter.work.moved) == (2 * 16 * 8 * 4, 2, 2 * 4 * 64)


def test_attention_is_counted_as_fused() -> None:
    """Two products forward and five backward, as a fused kernel computes them."""
    batch, heads, tokens, width = 2, 3, 50, 16
    with torch.device("meta"), Counter() as counter:
        q, k, v = (torch.empty(batch, heads, tokens, width, requires_grad=True) for _ in range(3))
        torch.nn.functional.scaled_dot_product_attention(q, k, v).backward(torch.empty_like(q))
    assert counter.work.flops == 7 * 2 * batch * heads * tokens**2 * width
