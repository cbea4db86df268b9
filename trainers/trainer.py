"""The training loop, which is the same for all methods."""

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.datasets.data_bundle import DataBundle
from tailtune.datasets.loading.data_loader import train_loader
from tailtune.datasets.loading.samplers import SAMPLERS, StepSampler
from tailtune.datasets.view import View
from tailtune.trainers.compilation import compiled_blocks
from tailtune.trainers.distributed import share_statistics
from tailtune.trainers.evaluation.validation import Validation
from tailtune.trainers.evaluation.validation_metrics import Validated
from tailtune.trainers.flat_minima import sam_mode
from tailtune.trainers.methods.base import Batch, Method, Step
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer, learning_rate, set_lr
from tailtune.trainers.precision import check_frozen
from tailtune.trainers.processes.interrupts import Agreement, Interrupt, Interrupted
from tailtune.trainers.processes.peak_memory import Peak
from tailtune.trainers.progress import Curves, Progress
from tailtune.trainers.runs.metrics_file import TrainReport
from tailtune.trainers.sharding import copy_to_shard, is_sharded, own_part, prepared, shard_states, whole
from tailtune.trainers.step_passes import StepPasses
from tailtune.trainers.storage.checkpoint import copy_state, trained_state
from tailtune.trainers.storage.optimizer_state import restore_optimizer
from tailtune.trainers.storage.resume_states import ResumeStates
from tailtune.trainers.training_meters import TrainingMeters
from tailtune.trainers.training_state import TrainingRun, TrainingState

log = logging.getLogger("tailtune")


class Trainer:
    """Trains a method with Accelerate.

    Args:
        accelerator: made with `gradient_accumulation_steps=1`, because the trainer accumulates sums itself.
        plan: the training settings.
        states: saves the states of the run and loads them to resume it.
        validation: validates after some epochs, and chooses the epoch that is kept.
        curves: where the curves go.
        view_of: (method as it starts or continues, training images) → the view that is trained on; None: the images.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plan: Plan,
        states: ResumeStates,
        validation: Validation,
        curves: Curves,
        view_of: Callable[[Method, View], View] | None = None,
    ) -> None:
        self.accelerator, self.plan, self.curves, self.view_of = accelerator, plan, curves, view_of
        self.validation, self.state = validation, TrainingState(accelerator, states, validation)
        self.sam = sam_mode(plan.sam)

    def fit(self, method: Method, data: DataBundle) -> TrainReport:
        """Train `method` in place. Continue from the newest saved state, if one exists.

        Raises:
            UserError: the loss is not finite, or a state cannot be read or written.
            Interrupted: a signal or `on_validation` requested a stop; the state has been saved.
        """
        device = self.accelerator.device
        peak = Peak(device) if device.type == "cuda" else None  # on a CPU, it would reset the peak of the whole process
        run = self._begin(method, data)  # a resumed run has the weights of its frozen encoder only now
        view = data.train if self.view_of is None else self.view_of(run.method, data.train)
        view.timed, view.two_views = self.plan.profile_data, method.takes_two_views
        loader = train_loader(view, run.sampler, self.plan.num_workers, device)
        steps, total = run.sampler.steps, self.total_steps(run.sampler.steps)
        validation, started, before = self.validation, time.perf_counter(), run.report.seconds
        try:
            with compiled_blocks(run.method, self.plan.compile, self.sam.keeps_graph), Interrupt() as interrupt:
                while run.report.steps < total and not validation.ends(run.report.validations):
                    epoch, first = divmod(run.report.steps, steps)
                    run.method.on_epoch(epoch, self.plan.epochs)
                    run.sampler.set_position(epoch, first)
                    batches, begun = iter(loader), time.perf_counter()
                    for step in range(first, min(steps, total - epoch * steps)):
                        set_lr(run.optimizer, self.plan, epoch, run.report.steps + 1)
                        self._step(run, batches, step)
                        run.report.seconds = before + time.perf_counter() - started - validation.seconds
                        self._after_step(run, interrupt, last=run.report.steps + 1 == total)
                    if self.plan.profile_data:
                        log.info(loader.times.report(epoch + 1, time.perf_counter() - begun))
        finally:
            run.progress.close()
        if peak is not None:
            run.report.peak_memory_bytes = peak.read()
        self._with_trained(run)
        validation.restore_best(method)
        run.report.kept = validation.best_of(run.report.validations)
        return run.report

    def total_steps(self, steps_per_epoch: int) -> int:
        """Number of optimizer steps of the whole run."""
        steps = self.plan.epochs * steps_per_epoch
        return steps if self.plan.max_steps is None else min(steps, self.plan.max_steps)

    def _rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate that the log shows for a step, which is counted from 1 over the whole run."""
        return learning_rate(self.plan, (step - 1) // steps_per_epoch, step)

    # --- one optimizer step ------------------------------------------------------------------------------------

    def _step(self, run: TrainingRun, batches: Iterator[Batch], step: int) -> None:
        """Forward and backward passes over this rank's micro-batches, then one update with the global mean gradient."""
        run.method.before_step(run.report.steps + 1)
        size, padding = run.sampler.counts(step), run.sampler.is_padding(step)
        micro_batches = self._micro_batches(run, batches, size, padding)
        count = partial(self._count, run, padding)
        passes = StepPasses(self.accelerator, run.method, run.wrapped, self.plan.batch_size, size, micro_batches, count)
        totals = self.sam.gradients(passes, self.plan, run.report.steps // run.sampler.steps)
        weight, loss, hits, images, bad = self._sum(totals).unbind()
        self._update(run, weight)
        run.method.after_step(run.report.steps + 1)
        run.optimizer.zero_grad()
        run.finite &= torch.isfinite(loss)
        run.images += torch.stack([images, bad])
        run.meters.end_step(loss / weight.clamp_min(1e-12), 100 * hits / images.clamp_min(1))

    def _micro_batches(self, run: TrainingRun, batches: Iterator[Batch], size: int, padding: bool) -> Iterator[Batch]:
        """The micro-batches of this rank in one step."""
        for _ in range(size):
            waiting = time.perf_counter()
            batch = next(batches)
            run.progress.waited += time.perf_counter() - waiting
            if padding:
                batch["weight"] = torch.zeros_like(batch["weight"])
            yield batch

    @torch.no_grad()
    def _count(self, run: TrainingRun, padding: bool, batch: Batch, outcome: Step) -> Tensor:
        """[weight, loss, hits, images, unreadable images] of a micro-batch, on the device."""
        real = batch["weight"] > 0
        hits = ((outcome.logits.argmax(-1) == batch["label"]) & real).sum()
        run.meters.add(outcome.logits, batch["label"], batch["weight"])
        bad = torch.zeros_like(hits) if padding else (~real).sum()
        return torch.stack([value.double() for value in (outcome.weight, outcome.loss_sum, hits, real.sum(), bad)])

    def _update(self, run: TrainingRun, weight: Tensor) -> None:
        """Scale the gradients to those of the mean loss, and take one optimizer step.

        Before this, they are gradients of the loss sum / batch_size; under DDP, the mean of these over the ranks. The
        division by the constant batch_size keeps fp16 gradients small. If no image of a step could be read, its
        gradients are set to 0.

        Args:
            run: the objects of the run.
            weight: sum of the weights over all micro-batches and ranks, a scalar.
        """
        self.accelerator.unscale_gradients(run.optimizer)
        parameters = (p for group in run.optimizer.param_groups for p in group["params"])
        grads = [own_part(p.grad) for p in parameters if p.grad is not None]
        factor = self.plan.batch_size * self.accelerator.num_processes / weight.clamp_min(1e-12)
        torch._foreach_mul_(grads, torch.where(weight > 0, factor, 0.0).to(grads[0].dtype))
        run.optimizer.step()
        run.report.skipped_steps += self.accelerator.optimizer_step_was_skipped

    # --- between steps -----------------------------------------------------------------------------------------

    def _after_step(self, run: TrainingRun, interrupt: Interrupt, last: bool) -> None:
        run.report.steps += 1
        done = run.report.steps
        run.progress.step()
        end_of_epoch = done % run.sampler.steps == 0
        is_long = run.sampler.steps > 2 * self.plan.print_freq  # a short epoch has one line, at its end
        shows = (is_long and done % self.plan.print_freq == 0) or end_of_epoch or last
        stops = run.agreement.stops(interrupt.requested, done)
        saves = end_of_epoch or last or stops or bool(self.plan.save_every and done % self.plan.save_every == 0)
        if shows or saves:
            self._check_finite(run, weights=saves)
        if saves:
            share_statistics(self.accelerator, run.method)
        validated = self._validate(run, run.report.steps // run.sampler.steps) if end_of_epoch else None
        if shows:
            run.progress.show(done, self._rate, *run.meters.read(self._sum), validated)
        if saves:
            self.state.save(run)
        if stops or self.validation.asks_to_stop(validated):
            raise Interrupted

    def _validate(self, run: TrainingRun, epoch: int) -> Validated | None:
        before = self.validation.seconds
        if not self.validation.is_due(epoch):
            return None
        method = self._with_trained(run)
        validated = self.validation.after_epoch(method, epoch, run.report.steps, run.report.validations)
        if method is not run.method:
            method.to("cpu")
        run.progress.since += self.validation.seconds - before  # the time of a step is without it
        return validated

    def _with_trained(self, run: TrainingRun) -> Method:
        """The method that was given, on the device, with the values that are trained so far."""
        if run.given is not run.method:
            copy_state(run.given, whole(trained_state(run.method)), "this run", "start over with `resume False`")
            run.given.to(self.accelerator.device)
        return run.given

    def _check_finite(self, run: TrainingRun, weights: bool) -> None:
        """Raise a `UserError` if the loss of a step so far or, with `weights`, a trainable weight is not finite."""
        finite = run.finite
        if weights:
            trainable = (weight for weight in run.method.parameters() if weight.requires_grad)
            finite = finite & torch.stack([own_part(weight).isfinite().all() for weight in trainable]).all()
            finite = self._sum((~finite).double()) == 0 if run.given is not run.method else finite  # all shares
        if not bool(finite):
            check_frozen(run.method)
            raise UserError(
                f"loss or weights are not finite after step {run.report.steps}; lower lr, or use prec bf16 or fp32. "
                "The last good state is kept"
            )

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def _sum_numbers(self, values: list[float]) -> list[float]:
        return self._sum(torch.tensor(values, dtype=torch.float64, device=self.accelerator.device)).tolist()

    # --- states ------------------------------------------------------------------------------------------------

    def _begin(self, method: Method, data: DataBundle) -> TrainingRun:
        accelerator, plan = self.accelerator, self.plan
        rank, world = accelerator.process_index, accelerator.num_processes
        sizes, order = (plan.batch_size, plan.micro_batch_size), SAMPLERS[plan.sampler].order
        pair = SAMPLERS[plan.pair_sampler].order if plan.pair_sampler else None
        sampler = StepSampler(data.train.labels, *sizes, plan.seed, rank, world, order, pair, in_step=is_sharded())
        given, method = method, copy_to_shard(method) if is_sharded() else method
        if given is not method:
            log.info("parameters, gradients and optimizer states are sharded over %d processes (FSDP2)", world)
        optimizer = build_optimizer(method.param_groups(), plan)
        meters = TrainingMeters(data.info.num_classes, data.info.groups, accelerator.device)
        saved = self.state.states.load()
        report = TrainReport() if saved is None else self.state.resume(*saved, method, meters, plan.seed)
        method.train()
        wrapped, optimizer = prepared(accelerator, method, optimizer, plan.micro_batch_size)
        if saved is not None:
            restore_optimizer(optimizer.optimizer, saved[0], saved[1].get("optimizer"))
            shard_states(optimizer.optimizer)
        total = self.total_steps(sampler.steps)
        method.before_training(total, sampler.steps)
        progress = Progress(self.curves, plan.epochs, sampler.steps, report.steps, total)
        device = accelerator.device
        images, finite = torch.zeros(2, dtype=torch.float64, device=device), torch.tensor(True, device=device)
        agreement = Agreement(world, report.steps, self._sum_numbers)
        return TrainingRun(
            given, method, wrapped, optimizer, sampler, meters, report, progress, images, finite, agreement
        )
