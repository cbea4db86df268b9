"""The runs of test_sharding.py. As a script, the parts that two processes make: `sharded_runs.py FOLDER`."""

import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from trajectories import killed_after

from tailtune.configs import load_configs
from tailtune.trainers.option_schema import declared
from tailtune.trainers.run import run

COMMAND = (
    "pretrained none full_tuning True optimizer adamw lr 0.001 prec fp64 test_prec fp64 num_epochs 2 batch_size 32 "
    "micro_batch_size 8 num_workers 0 test_per_class 0 val_per_class 2 val_every 1 save_every 3 report none"
)


EXPERTS = "full_tuning False lora True num_experts 3 expert_split 2"
"""Words of a run whose last blocks are computed once for each expert, and whose blocks do not train."""


def part(path: Path, killed: bool, more: str = "") -> None:
    """Train in a run folder, from its last state on, to the end or until it is killed after step 7."""
    words = [*COMMAND.split(), *more.split(), "output_dir", str(path)]
    (cfg,) = load_configs("fake_lt", "tiny_clip", words, declared())
    with killed_after(7 if killed else None):
        run(cfg)
    AcceleratorState._reset_state()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    for name, killed in (("whole", False), ("resumed", True), ("resumed", False), ("to_one", True), ("to_two", False)):
        part(folder / name, killed)
    part(folder / "experts", killed=False, more=EXPERTS)
