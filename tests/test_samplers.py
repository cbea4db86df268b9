"""The order of training images and its partition into steps, ranks and micro-batches."""

from collections import Counter
from itertools import islice, product

import numpy as np
import pytest
import torch
from PIL import Image

from tailtune.datasets.images.transforms import train_transform
from tailtune.datasets.loading.data_loader import train_loader
from tailtune.datasets.loading.samplers import SAMPLERS, Order, StepSampler, balanced, reverse, shuffle
from tailtune.datasets.sources.image_sources import ArraySource
from tailtune.datasets.sources.named_source import BadImage
from tailtune.datasets.view import View

LAYOUTS = [(100, 32, 8), (97, 32, 32), (5, 8, 3), (33, 8, 1), (8, 8, 8), (1, 4, 4)]


def ranks(
    length: int, batch: int, micro: int, world: int, epoch: int = 0, seed: int = 0, order: Order = shuffle
) -> list[StepSampler]:
    labels = torch.arange(length) % 3
    samplers = [StepSampler(labels, batch, micro, seed, rank, world, order) for rank in range(world)]
    for sampler in samplers:
        sampler.set_position(epoch, 0)
    return samplers


def own(sampler: StepSampler, step: int) -> list[int]:
    return [] if sampler.is_padding(step) else [i for micro in sampler.micro_batches(step) for i in micro]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("length", "batch", "micro"), LAYOUTS)
def test_every_image_once_an_epoch(length: int, batch: int, micro: int, world: int) -> None:
    samplers = ranks(length, batch, micro, world)
    seen = Counter(i for sampler in samplers for step in range(sampler.steps) for i in own(sampler, step))
    assert seen == Counter(range(length))
    assert samplers[0].steps == -(-length // batch)


@pytest.mark.parametrize("world", [2, 3, 7])
@pytest.mark.parametrize(("length", "batch", "micro"), LAYOUTS)
def test_the_global_batch_does_not_depend_on_the_world(length: int, batch: int, micro: int, world: int) -> None:
    (alone,) = ranks(length, batch, batch, 1)
    samplers = ranks(length, batch, micro, world)
    for step in range(alone.steps):
        assert [i for sampler in samplers for i in own(sampler, step)] == own(alone, step)


@pytest.mark.parametrize("world", [1, 2, 7])
@pytest.mark.parametrize(("length", "batch", "micro"), LAYOUTS)
def test_iterating_gives_the_micro_batches(length: int, batch: int, micro: int, world: int) -> None:
    for sampler in ranks(length, batch, micro, world, epoch=3):
        expected = [each for step in range(sampler.steps) for each in sampler.micro_batches(step)]
        batches = list(sampler)
        assert [[index for index, *_ in each] for each in batches] == expected
        assert {epoch for each in batches for _, epoch, _ in each} == {3}
        assert all(1 <= len(each) <= micro for each in batches)
        assert len(sampler) == len(batches) == sum(map(sampler.counts, range(sampler.steps)))


@pytest.mark.parametrize("world", [1, 2, 7])
@pytest.mark.parametrize(("length", "batch", "micro"), LAYOUTS)
def test_resuming_gives_the_tail(length: int, batch: int, micro: int, world: int) -> None:
    for whole, resumed in zip(
        ranks(length, batch, micro, world, epoch=2), ranks(length, batch, micro, world), strict=True
    ):
        for step in range(whole.steps + 1):
            resumed.set_position(2, step)
            done = sum(map(whole.counts, range(step)))
            assert list(resumed) == list(whole)[done:]
            assert len(resumed) == len(whole) - done


def test_a_rank_without_samples_gets_one_borrowed_image() -> None:
    samplers = ranks(9, 8, 4, 3)  # the last step has one image for three ranks
    assert [sampler.is_padding(0) for sampler in samplers] == [False, False, False]
    assert [sampler.is_padding(1) for sampler in samplers].count(True) == 2
    assert all(len(sampler.micro_batches(1)) == sampler.counts(1) == 1 for sampler in samplers)
    assert all(0 <= sampler.micro_batches(1)[0][0] < 9 for sampler in samplers)


def test_order_depends_on_seed_and_epoch_only() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        (sampler,) = ranks(64, 16, 4, 1, epoch, seed)
        return [index for batch in sampler for index, *_ in batch]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


@pytest.mark.parametrize("sizes", [(0, 1, 1, 0, 0, 1), (1, 0, 1, 0, 0, 1), (1, 1, 0, 0, 0, 1), (1, 1, 1, 0, 1, 1)])
def test_impossible_sizes(sizes: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        StepSampler(torch.zeros(sizes[0]), *sizes[1:])
    with pytest.raises(ValueError, match="step 3"):
        StepSampler(torch.zeros(8), 4, 4, 0).set_position(0, 3)


def drawn(labels: torch.Tensor, epoch: int = 0, seed: int = 0) -> torch.Tensor:
    order = balanced(labels, seed, epoch)
    assert order.shape == labels.shape
    return order


def test_balanced_draws_every_class_equally_often() -> None:
    """3 classes of 9000, 900 and 100 images, class 1 without any: about N/3 images each."""
    labels = torch.tensor([0] * 9000 + [2] * 900 + [3] * 100)
    found = labels[drawn(labels)].bincount(minlength=4).tolist()
    assert found[1] == 0 and all(abs(found[k] - 10000 / 3) < 150 for k in (0, 2, 3))  # 3.2 standard deviations


def test_balanced_goes_round_in_a_class() -> None:
    """No image of a class comes a second time before all have come once, and each round has another order."""
    labels = torch.tensor([0] * 200 + [1] * 10)
    own = [i for i in drawn(labels).tolist() if i >= 200]
    rounds = [own[i : i + 10] for i in range(0, len(own) - 9, 10)]
    assert len(rounds) >= 6 and all(sorted(each) == list(range(200, 210)) for each in rounds)
    assert len(set(map(tuple, rounds))) == len(rounds)


def test_balanced_depends_on_labels_seed_and_epoch_only() -> None:
    labels = torch.arange(60) % 4
    assert torch.equal(drawn(labels), drawn(labels))
    orders = [drawn(labels, *key).tolist() for key in [(0, 0), (0, 1), (1, 0), (1, 1)]]
    assert len(set(map(tuple, orders))) == 4


def test_an_image_that_comes_again_is_another_view() -> None:
    """Or a class of few images would be augmented in one way all epoch."""
    (sampler,) = ranks(90, 32, 8, 1, epoch=1, order=balanced)
    keys = [key for batch in sampler for key in batch]
    assert len(set(keys)) == len(keys) == 90 and {epoch for _, epoch, _ in keys} == {1}
    times = Counter(index for index, *_ in keys)
    assert max(times.values()) > 1
    for index, count in times.items():
        assert [again for each, _, again in keys if each == index] == list(range(count))
    assert not any(again for batch in ranks(90, 32, 8, 1)[0] for *_, again in batch)


@pytest.mark.parametrize("order", [entry.order for entry in SAMPLERS.values()], ids=SAMPLERS)
def test_no_sampler_depends_on_the_world_or_on_resuming(order: Order) -> None:
    (alone,) = ranks(97, 32, 8, 1, epoch=2, order=order)
    samplers = ranks(97, 32, 8, 3, epoch=2, order=order)
    for step in range(alone.steps):
        assert [i for sampler in samplers for i in own(sampler, step)] == own(alone, step)
    (resumed,) = ranks(97, 32, 8, 1, order=order)
    resumed.set_position(2, 2)
    assert list(resumed) == list(alone)[sum(map(alone.counts, range(2))) :]


# --- pairs --------------------------------------------------------------------------------------------------------


def paired(micro: int, world: int = 1, seed: int = 0, labels: torch.Tensor | None = None) -> list[StepSampler]:
    """Classes drawn equally often, and beside them every image once."""
    labels = torch.arange(97) % 3 if labels is None else labels
    return [StepSampler(labels, 32, micro, seed, rank, world, balanced, shuffle) for rank in range(world)]


def keys(sampler: StepSampler, epoch: int = 1) -> list[tuple[int, ...]]:
    sampler.set_position(epoch, 0)
    return [key for each in sampler for key in each]


def test_pairs_are_a_function_of_seed_and_epoch() -> None:
    """Index, epoch and number of the first, index and number of the second: an order of its own, each image once."""
    (sampler,) = paired(8)
    found = keys(sampler)
    assert found == keys(paired(8)[0]) and found != keys(paired(8, seed=1)[0]) and found != keys(sampler, epoch=2)
    alone = StepSampler(torch.arange(97) % 3, 32, 8, 0, order=balanced)
    assert [key[:3] for key in found] == keys(alone), "the first images are those without a second"
    assert sorted(index for *_, index, _ in found) == list(range(97))
    assert all(number == -1 for *_, number in found), "never the augmentation of a first image"
    assert len({(key[0], key[3]) for key in found}) > 90
    twin = StepSampler(torch.arange(97) % 3, 32, 8, 0, order=shuffle, pair=shuffle)
    assert all(sum(key[0] == key[3] for key in keys(twin, epoch)) < 8 for epoch in range(3)), "two orders, not one"


def test_pairs_do_not_depend_on_ranks_and_micro_batches() -> None:
    whole = keys(paired(32)[0])
    assert keys(paired(5)[0]) == whole
    joined, ranked = [], paired(8, world=3)
    for step, each in product(range(ranked[0].steps), ranked):
        each.set_position(1, step)
        micro_batches = islice(each, 0 if each.is_padding(step) else each.counts(step))
        joined += [key for micro in micro_batches for key in micro]
    assert joined == whole


def test_reverse_draws_a_class_by_its_rarity() -> None:
    """9000, 900 and 100 images: p ∝ 1/n. Of a class its images come in turn."""
    labels = torch.tensor([0] * 9000 + [2] * 900 + [3] * 100)
    order = reverse(labels, 0, 0)
    shares = labels[order].bincount(minlength=4) / 10_000
    rarity = torch.tensor([1 / 9000, 0, 1 / 900, 1 / 100])
    assert torch.allclose(shares, rarity / rarity.sum(), atol=0.01)
    rare = [i for i in order.tolist() if i >= 9900]
    rounds = [rare[i : i + 100] for i in range(0, len(rare) - 99, 100)]
    assert all(sorted(each) == list(range(9900, 10_000)) for each in rounds)


@pytest.mark.parametrize("workers", [0, 2])
def test_both_images_of_a_pair_are_augmented_for_themselves(workers: int) -> None:
    """The one with itself is two views; weight 0 if either is bad; the label is the first one's."""
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(12)]

    class Source(ArraySource):
        def load(self, position: int) -> Image.Image:
            if position == 5:
                raise BadImage("broken")
            return super().load(position)

    source = Source(images, np.arange(12) % 3, "test")
    view = View(source, np.arange(12), train_transform("cifar_crop", 32, "bilinear"), skip_bad=True)
    alone, pair = view[(2, 1, 0)], view[(2, 1, 0, 7, -1)]
    assert torch.equal(pair["image"], alone["image"]) and torch.equal(pair["partner"], view[(7, 1, -1)]["image"])
    assert not torch.equal(view[(2, 1, 0, 2, -1)]["partner"], alone["image"])
    assert pair["label"] == 2 and [view[(a, 1, 0, b, -1)]["weight"] for a, b in ((2, 5), (5, 2), (2, 7))] == [0, 0, 1]
    sampler = StepSampler(view.labels, 8, 4, 0, order=balanced, pair=shuffle)
    batches = list(train_loader(view, sampler, workers))
    assert all(each["partner"].shape == each["image"].shape == (4, 3, 32, 32) for each in batches)
    keys = [key for each in sampler for key in each]
    for sample, key in zip((s for each in batches for s in each["partner"]), keys, strict=True):
        assert torch.equal(sample, view[(key[3], key[1], key[4])]["image"])
