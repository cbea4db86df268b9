"""Our package `datasets` has the name of Hugging Face's, which Accelerate looks for when that one is installed too.

It does so only with two or more processes, so the failure would come on several GPUs, at the worst moment. Here
Accelerate is told that the package is there; the test needs neither it nor a second process.
"""

import accelerate.data_loader
import accelerate.state
import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, TensorDataset

import datasets as ours


@pytest.fixture
def with_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (accelerate.data_loader, accelerate.state):
        monkeypatch.setattr(module, "is_datasets_available", lambda: True, raising=False)
    monkeypatch.setattr("accelerate.utils.imports.is_datasets_available", lambda: True)
    monkeypatch.setattr("accelerate.utils.is_datasets_available", lambda: True)


def test_the_names_that_accelerate_imports_are_there() -> None:
    from datasets import Dataset, IterableDataset

    for sentinel in (Dataset, IterableDataset):
        assert sentinel.__module__ == ours.__name__ and sentinel.__doc__
        assert not isinstance(TensorDataset(torch.zeros(2)), sentinel)
        assert not issubclass(torch.utils.data.Dataset, sentinel)


@pytest.mark.usefixtures("with_hugging_face")
def test_a_loader_is_shared_out_between_two_processes() -> None:
    loader = DataLoader(TensorDataset(torch.arange(10)), batch_size=2)
    seen = []
    for rank in range(2):
        prepared = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        seen += [int(value) for (batch,) in prepared.base_dataloader for value in batch]
    assert sorted(set(seen)) == list(range(10))


@pytest.mark.usefixtures("with_hugging_face")
def test_inputs_are_split_between_two_processes() -> None:
    """Of a kind that is neither list, tuple, dict nor tensor: only then does Accelerate ask for `Dataset`."""
    state = accelerate.state.PartialState(cpu=True)
    before = state.num_processes
    state.num_processes = 2
    try:
        with state.split_between_processes(range(10)) as share:  # type: ignore[arg-type]
            assert isinstance(share, range)
    finally:
        state.num_processes = before
