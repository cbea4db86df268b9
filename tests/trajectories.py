"""Runs of one training in many layouts, for test_core.py, and what each of its two processes does; also a script."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from received import counted
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tailtune.configs import load_configs
from tailtune.trainers import distributed
from tailtune.trainers.distributed import gather_objects_to_main
from tailtune.trainers.methods import Method
from tailtune.trainers.option_schema import declared
from tailtune.trainers.run import run

STEPS = 6  # two epochs of three steps; the last step of an epoch is partial
KILLED = 5  # within the second epoch; the newest state is of the step before it
Layout = tuple[int, int, bool]  # workers, images at once, killed and resumed
LAYOUTS: dict[str, dict[int, list[Layout]]] = {
    "few": {1: [(0, 32, False)], 2: [(1, 8, False), (1, 8, True)]},
    "text": {1: [(0, 32, False), (0, 8, False), (0, 8, True)], 2: [(0, 8, False)]},
    "pair": {2: [(0, 8, False)]},
    "all": {world: list(product((0, 2), (8, 32), (False, True))) for world in (1, 2)},
}
"""Tier → processes → layouts; the first on one process is the reference."""
VALIDATED = "val_per_class 1 val_every 1"
MORE = {
    "few": VALIDATED,
    "text": f"{VALIDATED} classifier TextClassifier text_lora True text_memory 0",
    "all": VALIDATED,
}
"""Tier → further words of the command, which test_core.py gives."""
COMMAND = "pretrained none prec fp64 test_prec fp64 num_epochs 2 batch_size 32 lr 0.05 test_per_class 0 save_every 2 "
COMMAND += "subset_cap 12"


class Killed(BaseException):
    """Stands for a kill: nothing between it and the top may catch it."""


@contextmanager
def killed_after(step: int | None) -> Iterator[None]:
    """Training in this process dies after a step, before it can save more than the states it has."""
    original = Method.after_step

    def after_step(self: Method, done: int) -> None:
        original(self, done)
        if done == step:
            raise Killed

    Method.after_step = after_step  # type: ignore[method-assign]
    try:
        yield
    except Killed:
        pass
    finally:
        Method.after_step = original  # type: ignore[method-assign]


def name_of(workers: int, micro: int, killed: bool, world: int) -> str:
    return f"w{workers}_m{micro}_k{int(killed)}_p{world}"


def train(folder: Path, workers: int, micro: int, killed: bool, world: int = 1, more: str = "") -> Path:
    """One training in one layout below `folder`, with more words; returns its run folder."""
    # On two processes a share is 16, so 8 cuts it and 32 does not: the same two cases as with one process.
    at_once = min(micro, 32 // world)
    name = str(folder / name_of(workers, micro, killed, world))
    words = f"{COMMAND} num_workers {workers} micro_batch_size {at_once} output_dir {name} {more}".split()
    (cfg,) = load_configs("fake_lt", "tiny_clip_peft", words, declared())
    if killed:
        with killed_after(KILLED):
            run(cfg)
        AcceleratorState._reset_state()
    run(cfg)
    AcceleratorState._reset_state()
    return Path(name)


MOVES = {(1, 2): "from_1_to_2", (2, 1): "from_2_to_1"}
"""Processes of the first part and of the rest of a run → its folder."""


def move(folder: Path, before: int, after: int, part: int, more: str = "") -> Path:
    """The first (0) or second (1) part of a run that is killed and resumed on another number of processes."""
    path = folder / MOVES[before, after]
    words = f"{COMMAND} num_workers 0 micro_batch_size 8 max_test_images 20 output_dir {path} {more}".split()
    (cfg,) = load_configs("fake_lt", "tiny_clip_peft", words, declared())
    with killed_after(KILLED if part == 0 else None):
        run(cfg)
    AcceleratorState._reset_state()
    return path


EVALUATED = (
    "pretrained none num_experts 3 init_head linear_probe num_epochs 0 prec fp64 test_prec fp64 test_batch_size 16 "
    "test_dists forward5,backward5 adapt sade adapt_epochs 2 target_prior estimate num_workers 0 report none"
)
"""A head from the images, and every kind of evaluation."""


def evaluate(folder: Path, world: int = 1) -> Path:
    """A run that is evaluated and not trained; with it what each process has received from the others."""
    path = folder / f"evaluated_{world}"
    folders = ["output_dir", str(path), "feature_cache_dir", str(folder / f"features_{world}")]  # nothing is kept there
    (cfg,) = load_configs("fake_lt", "tiny_clip", [*EVALUATED.split(), *folders], declared())
    with counted() as received, mock.patch("tailtune.models.heads.head_init.MAX_ITER", 3):  # more magnify rounding
        run(cfg)
    if all_received := gather_objects_to_main(Accelerator(cpu=True), received):
        (folder / f"received_{world}.json").write_text(json.dumps(all_received))
    AcceleratorState._reset_state()
    return path


def losses(folder: Path) -> list[float]:
    """The loss of every step."""
    return scalars(folder, "train/loss")


def scalars(folder: Path, tag: str) -> list[float]:
    """The values of a curve, by step; a repeated step counts once, as TensorBoard shows it."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    by_step = {each.step: each.value for each in events.Scalars(tag)}
    return [by_step[step] for step in sorted(by_step)]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoint" / "tensors.safetensors")


def share_a_gpu() -> None:
    """Let all processes of this launch use the first GPU. NCCL takes one process for each GPU; gloo takes several."""
    os.environ["LOCAL_RANK"] = "0"
    distributed.InitProcessGroupKwargs = partial(InitProcessGroupKwargs, backend="gloo")  # type: ignore[misc,assignment]


def as_rank(rank: int, processes: int, port: int, folder: Path, tier: str, more: str) -> None:
    """What a process does that no launcher has started: torch and Accelerate read their places from the environment."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one is a copy of
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    runs_of_a_process(folder, tier, more)
    torch.distributed.barrier()  # the first process serves the others, so it ends last
    torch.distributed.destroy_process_group()


def runs_of_a_process(folder: Path, tier: str, more: str) -> None:
    """The runs on several processes, of which this is one."""
    torch.set_num_threads(1)
    processes = int(os.environ["WORLD_SIZE"])
    if 0 < torch.cuda.device_count() < processes:
        share_a_gpu()
    for layout in LAYOUTS[tier][processes]:
        train(folder, *layout, processes, more)
    if tier != "pair":
        move(folder, 1, 2, part=1, more=more)
        move(folder, 2, 1, part=0, more=more)
    if tier == "few":
        evaluate(folder, processes)


if __name__ == "__main__":
    runs_of_a_process(Path(sys.argv[1]), sys.argv[2], " ".join(sys.argv[3:]))
