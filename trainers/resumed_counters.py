"""`resume_counters`: meters and random generators of a resumed run, also on another number of processes."""

import logging

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.configs.seeding import derive_seed
from tailtune.trainers.storage.checkpoint import with_prefix
from tailtune.trainers.storage.random_state import processes_of, restore_random_state
from tailtune.trainers.training_meters import TrainingMeters, joined, without_counts

log = logging.getLogger("tailtune")


def resume_counters(tensors: dict[str, Tensor], meters: TrainingMeters, accelerator: Accelerator, seed: int) -> None:
    """Continue the meters and the generators of this process.

    On another number of processes than before, the first process goes on with what all have counted. Each process gets
    a new seed for the draws of dropout.

    Args:
        tensors: the saved state of all processes.
        meters: the meters of this process.
        accelerator: the processes.
        seed: seed of the new generators.
    """
    rank, world, before = accelerator.process_index, accelerator.num_processes, processes_of(tensors)
    if before == world:
        meters.load(with_prefix(tensors, f"meters.{rank}."))
        restore_random_state(tensors, rank)
        return
    log.info("the run was on %d processes and continues on %d; each step still has the same images", before, world)
    states = [with_prefix(tensors, f"meters.{number}.") for number in range(before)]
    meters.load(joined(states) if rank == 0 else without_counts(states[0]))
    torch.manual_seed(derive_seed(seed, rank))
