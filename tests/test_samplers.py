"""The order of training images and its partition into steps, ranks and micro-batches."""

from collections import Counter

import pytest

from datasets.samplers import StepSampler

LAYOUTS = [(100, 32, 8), (97, 32, 32), (5, 8, 3), (33, 8, 1), (8, 8, 8), (1, 4, 4)]


def ranks(length: int, batch: int, micro: int, world: int, epoch: int = 0, seed: int = 0) -> list[StepSampler]:
    samplers = [StepSampler(length, batch, micro, seed, rank, world) for rank in range(world)]
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
        assert [[index for index, _ in each] for each in batches] == expected
        assert {epoch for each in batches for _, epoch in each} == {3}
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
        return [index for batch in sampler for index, _ in batch]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in [(0, 0), (0, 1), (1, 0), (1, 1)]}) == 4


@pytest.mark.parametrize("sizes", [(0, 1, 1, 0, 0, 1), (1, 0, 1, 0, 0, 1), (1, 1, 0, 0, 0, 1), (1, 1, 1, 0, 1, 1)])
def test_impossible_sizes(sizes: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="length"):
        StepSampler(*sizes)
    with pytest.raises(ValueError, match="step 3"):
        StepSampler(8, 4, 4, 0).set_position(0, 3)
