"""The order of training images and its partition into steps, ranks and micro-batches."""

from collections import Counter

import pytest
import torch

from datasets.samplers import SAMPLERS, Order, StepSampler, balanced, shuffle

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


@pytest.mark.parametrize("order", SAMPLERS.values(), ids=SAMPLERS)
def test_no_sampler_depends_on_the_world_or_on_resuming(order: Order) -> None:
    (alone,) = ranks(97, 32, 8, 1, epoch=2, order=order)
    samplers = ranks(97, 32, 8, 3, epoch=2, order=order)
    for step in range(alone.steps):
        assert [i for sampler in samplers for i in own(sampler, step)] == own(alone, step)
    (resumed,) = ranks(97, 32, 8, 1, order=order)
    resumed.set_position(2, 2)
    assert list(resumed) == list(alone)[sum(map(alone.counts, range(2))) :]
