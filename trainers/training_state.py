"""The objects of a training that is under way, and its state on disk."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.configs.seeding import derive_seed
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.trainers.evaluation.validation import Validation
from tailtune.trainers.methods.base import Method
from tailtune.trainers.processes.interrupts import Agreement
from tailtune.trainers.progress import Progress
from tailtune.trainers.resumed_counters import resume_counters
from tailtune.trainers.runs.metrics_file import TrainReport
from tailtune.trainers.sharding import whole
from tailtune.trainers.storage.checkpoint import copy_state, trained_state, with_prefix
from tailtune.trainers.storage.optimizer_state import optimizer_state
from tailtune.trainers.storage.random_state import random_state
from tailtune.trainers.storage.resume_states import ResumeStates
from tailtune.trainers.training_meters import TrainingMeters

log = logging.getLogger("tailtune")


@dataclass
class TrainingRun:
    """The objects that change during one `fit`."""

    given: Method
    method: Method
    """What is trained: a copy of the method that was given, if it is sharded."""
    wrapped: Any
    optimizer: Any
    sampler: StepSampler
    meters: TrainingMeters
    report: TrainReport
    progress: Progress
    images: Tensor
    """Numbers of images [used, left out as unreadable] since the last saved state, over all ranks, on the device."""
    finite: Tensor
    """Whether every loss so far was finite, on the device."""
    agreement: Agreement


class TrainingState:
    """Saves and restores a training.

    Args:
        accelerator: the processes.
        states: the states on disk.
        validation: has a state of its own.
    """

    def __init__(self, accelerator: Accelerator, states: ResumeStates, validation: Validation) -> None:
        self.accelerator, self.states, self.validation = accelerator, states, validation

    def save(self, run: TrainingRun) -> None:
        """Save the state of the run, with the random state and the counters of every rank.

        Raises:
            UserError: no image could be read so far, or the state cannot be written.
        """
        run.report.epochs = run.report.steps // run.sampler.steps
        images, bad_images = map(int, run.images.tolist())
        run.report.images += images
        run.report.bad_images += bad_images
        run.images.zero_()
        if run.report.bad_images and not run.report.images:
            raise UserError(
                f"none of the training images could be read in {run.report.steps} steps, so nothing was learnt; check "
                "`root` and the images"
            )
        rank = self.accelerator.process_index
        meters = {f"meters.{rank}.{name}": tensor for name, tensor in run.meters.state().items()}
        rank_state = {name: tensor.cpu() for name, tensor in {**random_state(rank), **meters}.items()}
        all_ranks: dict[str, Tensor] = {}
        for state in gather_object([rank_state]):
            all_ranks.update(state)
        first = self.accelerator.is_main_process
        trained = {f"method.{name}": tensor for name, tensor in whole(trained_state(run.method), first).items()}
        of_optimizer, values = optimizer_state(run.optimizer)
        of_optimizer = whole(of_optimizer, first)
        if first:
            best = self.validation.state(run.report.validations, run.report.steps)
            scaler = self.accelerator.scaler
            facts = {
                "report": vars(run.report),
                "threads": torch.get_num_threads(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "optimizer": values,
            }
            self.states.save(run.report.steps, {**trained, **best, **of_optimizer, **all_ranks}, facts)
        self.accelerator.wait_for_everyone()

    def resume(
        self, tensors: dict[str, Tensor], facts: dict[str, Any], method: Method, meters: TrainingMeters, seed: int
    ) -> TrainReport:
        """Continue from a saved state: fill the method and the meters, and restore generators and loss scaling.

        Args:
            tensors, facts: what `ResumeStates.load` has returned.
            method: gets its trained values.
            meters: go on with what they have counted.
            seed: seed of the run.

        Returns:
            The report of the run so far.
        """
        if facts["threads"] != torch.get_num_threads():
            log.info("using %d threads, as the run did before (results depend on it)", facts["threads"])
            torch.set_num_threads(facts["threads"])
        where = str(self.states.folder)
        trained, report = with_prefix(tensors, "method."), TrainReport(**facts["report"])
        copy_state(method, trained, where, "start over with `resume False`")
        self.validation.load(tensors, trained, self.validation.best_of(report.validations))
        resume_counters(tensors, meters, self.accelerator, derive_seed(seed, "resumed", report.steps))
        if facts["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        log.info("resuming after step %d", report.steps)
        return report
