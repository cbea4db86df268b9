"""`run`: trains and evaluates one config in one run folder. Results that exist already are not computed again."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tailtune.configs import CfgNode, config_hash, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import TRAIN
from tailtune.configs.loader_options import BY_BACKBONE
from tailtune.configs.option import options_from
from tailtune.configs.program import launch_target
from tailtune.datasets.build_data import build_data
from tailtune.datasets.data_bundle import DataBundle
from tailtune.datasets.image_cache import keep_images
from tailtune.datasets.sources.named_source import BadImage
from tailtune.datasets.splits.compare_records import first_few, seen_in_training
from tailtune.datasets.splits.split_records import StoredSplits
from tailtune.datasets.splits.unreadable_images import LEAVE_OUT, MAX_NAMED_IMAGES, UnreadableImages
from tailtune.datasets.view import View
from tailtune.models import ClassificationModel, resolve
from tailtune.models.heads.head_init import NEEDS_TEXT
from tailtune.models.text_mode import classifies_by_text
from tailtune.trainers import training_notes
from tailtune.trainers.config_checks import validate
from tailtune.trainers.distributed import Devices, launched_alone, make_accelerator, on_main, uses_cuda
from tailtune.trainers.evaluation.ensembles import ensemble_named, ensembled
from tailtune.trainers.evaluation.evaluate import Evaluation
from tailtune.trainers.evaluation.evaluation_plan import Builders, EvaluationPlan
from tailtune.trainers.evaluation.validation import OnValidation, Validation, ValidationPlan
from tailtune.trainers.export_run import export_run
from tailtune.trainers.feature_store import FeatureStore
from tailtune.trainers.flat_minima import sam_mode
from tailtune.trainers.head_preparation import prepare_head
from tailtune.trainers.methods import Method
from tailtune.trainers.micro_batch_probe import budget_of, largest_micro_batch
from tailtune.trainers.micro_batch_size import micro_batch_size
from tailtune.trainers.more_epochs import any_length, check_more_epochs
from tailtune.trainers.optimizers_and_schedules import OPTIMIZERS, Plan
from tailtune.trainers.precision import PRECISIONS, RESIDUAL, cast_trainable, precision_used
from tailtune.trainers.processes.console_log import attach_file, detach_file, start_console
from tailtune.trainers.processes.interrupts import Interrupted, how_to_continue, with_hint
from tailtune.trainers.runs.kept_epoch import facts_of_epoch
from tailtune.trainers.runs.load_run import FinishedRun, earlier_run, fresh_method, load_trained
from tailtune.trainers.runs.longer_run import epochs_before
from tailtune.trainers.runs.merged_runs import MergeOptions, facts_of
from tailtune.trainers.runs.metrics_file import RunLabel, TrainReport, headline, summary
from tailtune.trainers.runs.resume_decision import Decision
from tailtune.trainers.runs.run_folder import FACTS, OUTPUT, RunFolder
from tailtune.trainers.runs.run_lock import RunLock
from tailtune.trainers.runs.trained_images import trained_on
from tailtune.trainers.storage.atomic_io import Digest, write_bytes
from tailtune.trainers.storage.checkpoint import save_checkpoint
from tailtune.trainers.storage.manifest import read_json
from tailtune.trainers.storage.resume_states import ResumeStates
from tailtune.trainers.stored_result import SUGGESTED, show, splits_and_decision
from tailtune.trainers.trackers import CurvePlan, finish_trackers, start_curves
from tailtune.trainers.trainer import Trainer

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class Outcome:
    """Where a run has left its files."""

    folder: Path
    """The run folder."""
    metrics: Path
    """The metrics.json of the evaluation that the command asked for, in the run folder or below it."""
    source: Path
    """Folder of the run whose checkpoint was evaluated."""


def run(cfg: CfgNode, previous: Path | None = None) -> Path:
    """As `run_to_outcome`; returns the run folder."""
    return run_to_outcome(cfg, previous).folder


def run_to_outcome(cfg: CfgNode, previous: Path | None = None, on_validation: OnValidation | None = None) -> Outcome:
    """Train, evaluate and export as the config says, as far as it is not done already.

    Args:
        cfg: config of the run.
        previous: folder of the finished run that this run continues (`after`).
        on_validation: as in `run_stages`.

    Raises:
        UserError: invalid input.
        Interrupted: a signal or `on_validation` requested a stop; the state has been saved.
    """
    given, cfg = cfg, resolve(cfg)
    accelerator = make_accelerator(Devices.of(cfg))
    folder = RunFolder(cfg)
    lock = RunLock(folder.path)
    start_console(accelerator.is_main_process)
    try:
        on_main(accelerator, lambda: folder.hold(lock))
        kept, plan = on_main(accelerator, lambda: splits_and_decision(cfg, folder, previous))
        if (stored := plan.stored) is not None:
            on_main(accelerator, lambda: show(stored, plan, folder))
        else:
            if cfg.resume and folder.finished():  # an unfinished run has been validated with all its stages
                on_main(accelerator, lambda: validate([cfg], counts=folder.class_counts(), trains=False))
            suggested = {key: cfg[key] for key in BY_BACKBONE if given[key] is None}
            _Run(cfg, folder, accelerator, plan, kept, previous, suggested, on_validation).go()
        metrics = plan.stored or plan.target / folder.metrics.name
        if cfg.export is not None:
            on_main(accelerator, lambda: export_run(cfg, folder, metrics, accelerator.device))
        accelerator.wait_for_everyone()  # before the lock is released
        return Outcome(folder.path, metrics, folder.source)
    except UserError as error:
        if accelerator.is_main_process and isinstance(error, UnreadableImages):
            error = _listed(cfg, error)
        elif isinstance(error, BadImage):  # it begins like an image, so that only decoding it has found the damage
            error = BadImage(f"{error}; {LEAVE_OUT}, which decodes every image before the training")
        detach_file()
        if lock.is_locked:
            folder.withdraw()
        raise error
    finally:
        finish_trackers(accelerator)
        detach_file()
        lock.release()


def _listed(cfg: CfgNode, error: UnreadableImages) -> UserError:
    """The error. If it has more unreadable images than a message names, they are also written to a file."""
    if len(error.problems) <= MAX_NAMED_IMAGES:
        return error
    lines = [f"{where}\t{why}\n" for where, why in error.problems.items()]
    path = OUTPUT / f"{cfg.data}.unreadable-{Digest.of(''.join(lines).encode(errors='surrogateescape')).sha256[:8]}.txt"
    write_bytes(path, "".join(lines).encode(errors="surrogateescape"))
    return UserError(f"{error}; all are listed in {path}")


@dataclass
class _Run:
    """One run for which something must be computed."""

    cfg: CfgNode
    folder: RunFolder
    accelerator: Accelerator
    plan: Decision
    kept: StoredSplits | None
    previous: Path | None
    suggested: Mapping[str, Any]
    """Options that the command left to the backbone → values that the backbone suggests."""
    on_validation: OnValidation | None

    def go(self) -> None:
        cfg, trains = self.cfg, self.plan.trains
        build, label = Builders.of(cfg, self.folder, trains), RunLabel.of(cfg)
        evaluation_plan = EvaluationPlan.of(cfg)
        self.evaluation = Evaluation(
            evaluation_plan, build, self.accelerator, self.folder, self.plan, {SUGGESTED: dict(self.suggested)}
        )
        self.features = self.evaluation.features = FeatureStore.of(cfg, self.accelerator, self.evaluation.note)
        if launched_alone():
            self.evaluation.note(
                "accelerate launch started one process, as it does without GPUs; `accelerate launch --multi_gpu "
                f"--num_processes N {launch_target()} …` starts N, on CPUs too (the result is the same)",
                warn=True,
            )
        if cfg.gpu is not None and (not uses_cuda() or self.accelerator.num_processes > 1):
            log.info("gpu %d is ignored: %s", cfg.gpu, "several processes" if uses_cuda() else "no CUDA")
        if not trains:
            self._claim()
            if on_main(self.accelerator, self.evaluation.from_stored_logits):
                return
        with self.accelerator.local_main_process_first():  # it may download files
            data = build_data(cfg, self.kept, None if trains else self.folder.class_counts())
            fresh = fresh_method(cfg, data.info, self.accelerator.device)
        method, self.base = fresh
        log.info(headline(label, data, method))
        self.plan.fingerprints = {name: record.fingerprint for name, record in data.records.items()}
        self._warn(method.model, data)
        if trains:
            train = self._train(method, data)
            result = summary(label, data.info, method, train, self._precision())
        else:
            load_trained(fresh, cfg, self.folder.evaluated, data.info.class_names)
            result = self.evaluation.trained_result() or summary(label, data.info, method, None, self._precision())
            run = FinishedRun(cfg, self.folder, method, data, self.accelerator, self.base)
            method, facts = ensembled(run, cfg.ensemble)
            result |= {"ensemble": facts} if facts else {}
        with with_hint(how_to_continue(cfg.resume) if trains and result["train"] else ""):  # its last state is saved
            self.evaluation.from_images(method, data, result)

    def _warn(self, model: ClassificationModel, data: DataBundle) -> None:
        """Warn about conditions under which the result is misleading."""
        cfg, names = self.cfg, data.info.class_names
        if model.random_base:
            text = f"{cfg.backbone} has RANDOM weights (pretrained none): results mean nothing"
            self.evaluation.note(text, warn=True)
        texts = cfg.zero_shot or classifies_by_text(cfg) or cfg.init_head in NEEDS_TEXT
        texts = texts or ensemble_named(cfg.ensemble).text
        read = names if texts and not model.random_base else ()
        for text in training_notes.of_data(cfg.classnames, read, data.records):
            self.evaluation.note(text, warn=True)
        trained = [data.records["train"]] if self.plan.trains else trained_on(self.folder, self.kept)
        for split in ("test", "val"):
            if split in data.records and not cfg.test_train:
                tested = data.records[split]
                apart = self.kept.records.get(split) if self.kept else None
                seen = {path for record in trained for path in seen_in_training(tested, record, data.splits, apart)}
                if seen:
                    text = (
                        f"{len(seen)} of {len(tested.paths)} {split} images were trained on ({first_few(sorted(seen))})"
                    )
                    self.evaluation.note(text, warn=True, own=True)

    def _claim(self, data: DataBundle | None = None) -> None:
        """Claim the run folder, store the splits and start the log file. Nothing is written into the folder before."""

        def claim() -> None:
            self.folder.claim(self.plan.trains)
            if data is not None:
                self.folder.keep_splits(data.records, data.splits)
            attach_file(self.folder.log_file())

        on_main(self.accelerator, claim)

    def _precision(self) -> str:
        return precision_used(self.cfg.prec, uses_cuda())

    # --- training ----------------------------------------------------------------------------------------------

    def _train(self, method: Method, data: DataBundle) -> TrainReport | None:
        cfg, accelerator = self.cfg, self.accelerator
        identity = {"config": config_hash(cfg), "base model": self.base, "images": data.records["train"].fingerprint}
        scratch = self.evaluation.scratch
        validation = Validation(ValidationPlan.of(cfg), data, accelerator, scratch, self.on_validation, self.features)
        of_states = {**identity, **validation.identity}
        states = ResumeStates(self.folder.states, of_states, self.folder.seal, any_length(cfg), cfg.num_epochs)
        fresh = not cfg.resume or not states.begun()
        if fresh:
            prepare_head(method, data, accelerator, cfg.test_batch_size, cfg.num_workers, self.features)
        elif (before := epochs_before(self.folder.config, cfg)) is not None:
            check_more_epochs(before, cfg, method)
        method.model.init = None
        if self.previous is not None:
            method.after(earlier_run(self.previous, data, accelerator, self.base, cfg, fresh))
        self._claim(data)
        report = None if cfg.zero_shot or not cfg.num_epochs else self._fit(method, data, states, validation)
        if accelerator.is_main_process:
            facts: dict[str, Any] = {**identity, "processes": accelerator.num_processes, "base": self.base}
            facts |= {"class_names": list(data.info.class_names), "class_counts": data.info.class_counts.tolist()}
            facts |= facts_of_epoch(report)
            if self.previous is not None:
                facts |= {"after": self.previous.as_posix(), "after_id": read_json(self.previous / FACTS)["sha256"]}
                facts |= facts_of(options_from(MergeOptions, cfg))
            self.folder.seal(save_checkpoint(self.folder.checkpoint, method, facts))
        accelerator.wait_for_everyone()
        return report

    def _fit(self, method: Method, data: DataBundle, states: ResumeStates, validation: Validation) -> TrainReport:
        cfg, note, used = self.cfg, self.evaluation.note, self._precision()
        lr_steps = cfg.lr_steps if cfg.schedule == "multistep" else None
        for text in training_notes.of_settings(cfg.prec, used, cfg.drw_epoch, lr_steps, cfg.num_epochs):
            note(text, warn=True)
        precision = PRECISIONS[used]
        method.model.set_precision(precision.compute, RESIDUAL[cfg.residual_dtype])
        cast_trainable(method, precision.trainable)
        plan = Plan.of(cfg, self._micro_batch(method))
        home, options = self.folder, values_of(cfg, TRAIN)
        curves = start_curves(self.accelerator, CurvePlan.of(cfg), home.path, home.manifest.run, options)
        if method.batch_coupled and plan.micro_batch_size < cfg.batch_size:
            note(training_notes.of_micro_batch(plan.micro_batch_size, cfg.batch_size), warn=True)
        try:
            report = Trainer(self.accelerator, plan, states, validation, curves, self._view_of).fit(method, data)
        except Interrupted:
            raise Interrupted(how_to_continue(cfg.resume)) from None
        log.info("trained %d steps in %.0f s", report.steps, report.seconds)
        for text in validation.outcome(report.validations, cfg.num_epochs):
            log.info(text)
            note(text)
        for text in training_notes.of_report(report):
            note(text, warn=True)
        return report

    def _view_of(self, method: Method, images: View) -> View:
        """The features of the training images; if it has to be the images, the option `cache` keeps them."""
        view = self.features.view_of(method, images)
        if view is images and self.cfg.cache is not None:
            keep_images(images, self.cfg.cache, Path(self.cfg.cache_dir).expanduser())
        return view

    def _micro_batch(self, method: Method) -> int:
        size = micro_batch_size(self.cfg, self.accelerator.num_processes)
        if self.cfg.micro_batch_size == "auto":
            budget = budget_of(self.cfg.memory_budget_gb, self.accelerator.device)
            trained = 4 * sum(each.numel() for each in method.parameters() if each.requires_grad)
            later = trained * (OPTIMIZERS[self.cfg.optimizer].copies + sam_mode(self.cfg.sam).copies)
            return largest_micro_batch(method, self.accelerator, size, self.cfg.resolution, budget, later)
        return size
