"""Digests of weights, in which unchanged tensors are hashed once."""

import copy
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tailtune.trainers import weight_digest as module
from tailtune.trainers.weight_digest import weight_digest

SIDE = 100  # a weight of several rows of `ROW` bytes, and of a rest


def digest(net: nn.Module) -> str:
    return weight_digest(net, [*net.named_parameters(), *net.named_buffers()])


def flip(weight: Tensor) -> None:
    weight.data.copy_(weight.data.flip(0))


def swap(weight: Tensor) -> None:
    """Two words of eight bytes in one row."""
    weight.data[0, :4] = weight.data[0, :4].roll(2)


def next_number(weight: Tensor) -> None:
    """The last bit of the last value."""
    weight.data[-1, -1] = torch.nextafter(weight.data[-1, -1], torch.tensor(torch.inf))


def move(weight: Tensor) -> None:
    """What one value loses, another one gains."""
    words = weight.data.view(-1).view(torch.int64)
    words[3], words[5] = words[3] + 1, words[5] - 1


@torch.no_grad()
def add(weight: Tensor) -> None:
    weight[2, 3] += 1e-3


def through_half(weight: Tensor) -> None:
    """As a change of the precision, after which torch may give the memory at hand to the new values."""
    weight.data = weight.data.half()
    weight.data = weight.data.float()


def other_type(weight: Tensor) -> None:
    weight.data = weight.data.double()


@pytest.mark.parametrize("change", [flip, swap, next_number, move, add, through_half, other_type])
def test_a_changed_weight_is_hashed_again(change: Callable[[Tensor], None]) -> None:
    net = nn.Sequential(nn.Linear(SIDE, SIDE), nn.BatchNorm1d(SIDE), nn.Conv2d(3, 8, 3)).to(
        memory_format=torch.channels_last
    )
    before = digest(net)
    with mock.patch.object(module, "value_hash", wraps=module.value_hash) as hashed:
        assert digest(net) == before and not hashed.call_count
        change(net[0].weight)
        after = digest(net)
        assert hashed.call_count == 1
    assert after != before and after == digest(copy.deepcopy(net)), "the copy is not known yet"


def test_loaded_weights_statistics_and_shifted_memory_are_hashed_again() -> None:
    net, other = (nn.Sequential(nn.Linear(SIDE, 3), nn.BatchNorm1d(3)) for _ in range(2))
    digests = [digest(net)]
    net.load_state_dict(other.state_dict())
    digests.append(digest(net))
    net(torch.randn(4, SIDE))
    digests.append(digest(net))
    net[0].weight.data = torch.randn(3 * SIDE + 1)[1:].view(3, SIDE)  # does not begin at a multiple of eight bytes
    digests.append(digest(net))
    assert len(set(digests)) == 4 and digests[1] == digest(other) and digests[3] == digest(copy.deepcopy(net))
