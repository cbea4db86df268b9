"""On a GPU, a step mixes no devices and Python waits for no number, for every shipped config: see fake_gpu.py."""

import pytest
import torch
from fake_gpu import GPU, fake_gpu, put
from tiers import slow_except

from tailtune.benchmarks.shipped import PAIRS
from tailtune.benchmarks.step import method_in, stages_at_random
from tailtune.datasets.build_data import build_info
from tailtune.datasets.images.tensor_transforms import TENSOR_AUGMENTS
from tailtune.trainers.memory_estimate import blank_batch
from tailtune.trainers.methods import Earlier
from tailtune.trainers.storage.checkpoint import trained_state
from tailtune.trainers.training_meters import TrainingMeters

FEW = [("digits_lt", f"tiny_clip_{name}") for name in ("peft", "sade", "dirmixe", "h2t", "coop")]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("data", "model"), slow_except(FEW, PAIRS))
def test_a_step_stays_on_the_gpu(data: str, model: str) -> None:
    stages = stages_at_random(data, model)
    info = build_info(stages[-1])
    earlier, method = (method_in(cfg, info, "fp32") for cfg in (stages[0], stages[-1]))
    with fake_gpu() as mode, torch.no_grad():
        put(method, mode), put(earlier, mode)
        if len(stages) > 1:
            method.after(Earlier(True, lambda: trained_state(earlier), lambda: earlier.eval()))
        method.train().before_training(100, 10)
        method.on_epoch(9, 10)
        method.before_step(91)
        batch = blank_batch(method, GPU, 4, stages[-1].resolution)
        outcome = method(batch)
        meters = TrainingMeters(info.num_classes, info.groups, GPU)
        meters.add(outcome.logits, batch["label"], batch["weight"])
        meters.end_step(outcome.loss_sum, outcome.weight)
        assert outcome.loss_sum.device == outcome.weight.device == outcome.logits.device == GPU
        assert method.eval().expert_logits(batch["image"]).device == GPU


@pytest.mark.parametrize("name", TENSOR_AUGMENTS)
def test_augmentation_is_finished_on_the_gpu(name: str) -> None:
    transform = TENSOR_AUGMENTS[name](32, "bicubic")
    with fake_gpu():
        images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8, device=GPU)
        draws = torch.rand(4, sum(change.draws for change in transform.finish), device=GPU)
        assert transform.on_device(images, draws).device == GPU


def test_what_is_wrong_on_a_gpu_is_seen() -> None:
    with fake_gpu():
        there = torch.zeros(2, device=GPU)
        with pytest.raises(RuntimeError, match="device"):
            there + torch.zeros(2)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            float(there[0])
        assert float(torch.ones(2).sum()) == 2
