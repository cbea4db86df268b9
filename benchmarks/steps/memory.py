"""Steps of shipped configs with their own batch: `python -m tailtune.benchmarks.steps.memory JSON`.

Each line on standard input has the words of a config: data, model, and `KEY VALUE` pairs. The answer is about two steps
of its last stage: the memory, or why there is none to measure.
"""

import gc
import json
import sys
import time
from typing import Any

import torch
from yacs.config import CfgNode

from tailtune.benchmarks.step import method_in, stages_at_random, step_of
from tailtune.benchmarks.steps import device
from tailtune.benchmarks.steps.clock import Clock
from tailtune.datasets.build_data import build_info
from tailtune.trainers.distributed import uses_cuda
from tailtune.trainers.methods import Earlier, Method
from tailtune.trainers.micro_batch_size import micro_batch_size
from tailtune.trainers.precision import precision_used
from tailtune.trainers.processes.peak_memory import Peak
from tailtune.trainers.storage.checkpoint import trained_state


def main(row: dict[str, Any]) -> None:
    """Answer until standard input ends.

    Args:
        row: has nothing that is needed here.
    """
    clock = Clock()
    for words in clock.commands():
        gc.collect()  # what the config before this one has left
        peak = Peak(device.device())
        try:
            facts = measured(*words.split())
        except torch.OutOfMemoryError:
            facts = {"why": "out of memory"}
        except Exception as error:  # the other configs can still be measured
            facts = {"why": f"{type(error).__name__}: {error}"}
        clock.answer({**facts, **peak.of_gpu()})


def measured(data: str, model: str, *pairs: str) -> dict[str, Any]:
    """Facts of two steps of a config.

    Args:
        data: data config.
        model: model config.
        pairs: more options.

    Returns:
        `prec`, `batch` and `seconds` of the second step; or `why` nothing was measured.
    """
    stages = stages_at_random(data, model, *pairs)
    cfg = stages[-1]
    method = built(cfg)
    if not cfg.num_epochs or not method.param_groups():
        return {"why": "nothing trains"}
    if len(stages) > 1:
        teacher = built(stages[-2])
        method.after(Earlier(True, lambda: trained_state(teacher), lambda: teacher.eval().requires_grad_(False)))
    at_once = micro_batch_size(cfg, 1)
    step = step_of(method, cfg, at_once, device.device())
    step()
    device.finish()
    start = time.perf_counter()
    step()
    device.finish()
    return {
        "prec": precision_used(cfg.prec, uses_cuda()),
        "batch": at_once,
        "seconds": time.perf_counter() - start,
    }


def built(cfg: CfgNode) -> Method:
    """The method of a resolved config with random weights, on the device."""
    return method_in(cfg, build_info(cfg), precision_used(cfg.prec, uses_cuda())).to(device.device())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
