"""Evaluation of a run: gets logits from images or from an earlier evaluation, and writes logits, metrics and notes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tailtune.configs.errors import UserError
from tailtune.datasets.data_bundle import DataBundle, DataInfo, TestDistribution
from tailtune.trainers.distributed import on_main
from tailtune.trainers.evaluation import tta as test_time
from tailtune.trainers.evaluation.adapted_results import LearntFiles, Predict, predicted_from_views
from tailtune.trainers.evaluation.curves_of_evaluation import add_curves
from tailtune.trainers.evaluation.distributions import Results, dirichlet_summary, plain_results
from tailtune.trainers.evaluation.evaluation_plan import Builders, EvaluationPlan, with_stored_names
from tailtune.trainers.evaluation.expert_usage import is_finite, usage_report
from tailtune.trainers.evaluation.inference import Logits, infer, rows_of
from tailtune.trainers.evaluation.logit_files import LOGITS, VAL_LOGITS, save_logits, stored_logits
from tailtune.trainers.evaluation.metrics import evaluate_predictions
from tailtune.trainers.evaluation.report_of_evaluation import add_report
from tailtune.trainers.evaluation.target_prior import add_target_results
from tailtune.trainers.feature_store import FeatureStore
from tailtune.trainers.methods import Method
from tailtune.trainers.report.files import NONE
from tailtune.trainers.report.subject import EvaluatedImages
from tailtune.trainers.runs.metrics_file import circumstances, of_ensemble, of_training, write_metrics
from tailtune.trainers.runs.result_table import read_result, table
from tailtune.trainers.runs.resume_decision import Decision
from tailtune.trainers.runs.run_folder import RunFolder
from tailtune.trainers.storage.atomic_io import Damaged
from tailtune.trainers.storage.large_tensors import Scratch
from tailtune.trainers.storage.manifest import read_json

log = logging.getLogger("tailtune")


@dataclass
class Evaluation:
    """One evaluation of a run.

    Its files are written into `decision.target`, which is the run's own folder or a folder `tests/<key>/`.
    """

    plan: EvaluationPlan
    build: Builders
    accelerator: Accelerator
    folder: RunFolder
    decision: Decision
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of `evaluation` in metrics.json."""
    notes: list[str] = field(default_factory=list)
    """Notes and warnings that metrics.json records, of the training and of this evaluation."""
    features: FeatureStore | None = None
    """Gives the features of the images if the encoder is frozen."""

    def __post_init__(self) -> None:
        self._own_notes: list[str] = []
        for text in (*self.decision.notes, *self.plan.warnings):
            self.note(text, warn=True, own=True)
        self.scratch = Scratch(self.folder.path)
        self._learnt: LearntFiles | None = None

    def note(self, text: str, warn: bool = False, own: bool = False) -> None:
        """Record a note for metrics.json; `warn`: log it, too; `own`: not of other evaluations."""
        self.notes.append(text)
        self._own_notes += [text] if own else []
        if warn:
            log.warning("warning: %s", text)

    def from_stored_logits(self) -> bool:
        """Evaluate from the logits that an earlier evaluation saved, if these are sufficient.

        This needs neither the model nor the images, and only the first process calls it.

        Returns:
            Whether the evaluation is done; if not, `from_images` must be called.
        """
        stored, val = self._open(LOGITS), self._open(VAL_LOGITS)
        if stored is None or (stored[1].bad_images and self.plan.asked):  # these options need the labels of all images
            return False
        if val is None and self.plan.needs_val and "val" in read_json(self.folder.metrics):  # saved by older versions
            return False
        if self.plan.adapts and not self._has_learnt(*stored):
            return False
        self._stored(LOGITS)
        (_, test_logits), val_logits = stored, val and val[1]
        info = self.build.info()
        distributions = self._asked(self._distributions(info, test_logits))
        self._keep(test_logits, val_logits)
        measured = plain_results(test_logits, distributions, info.groups)
        if self.plan.adapts:
            self._adapt(test_logits, distributions, info, measured)
        info = with_stored_names(info, self.folder)
        self._aim(test_logits, val_logits, distributions, info, measured)
        split = "train" if self.plan.test_train else "test"
        images = partial(self.build.images, split, self.decision.fingerprints.get(split))
        every = self.build.outline().asks_every_expert
        result = self.trained_result() | of_ensemble(stored[0].with_name("metrics.json"))
        self._finish(result, test_logits, val_logits, info, images, measured, every)
        return True

    def _stored(self, name: str) -> Logits | None:
        """Logits that an earlier evaluation of this run saved and that this evaluation would compute again, or None."""
        stored = self._open(name)
        if stored is not None and name == LOGITS:
            log.info("using the logits of %s", stored[0])
            for text in (f"from the logits of {stored[0]}", *stored[1].notes(self.plan.max_images)):
                self.note(text, own=True)
        return stored and stored[1]

    def _open(self, name: str) -> tuple[Path, Logits] | None:
        """The file that `_stored` reads, and its logits."""
        if self.folder.source != self.folder.path or not self.folder.finished():
            return None
        return stored_logits(self.folder.path, self._key(name), name)

    def _distributions(self, info: DataInfo, stored: Logits) -> tuple[TestDistribution, ...]:
        return self.build.distributions(info, stored.labels, self.decision.fingerprints.get("test"))

    def _has_learnt(self, path: Path, plain: Logits) -> bool:
        """Whether earlier evaluations have learnt what `adapt` needs for every test distribution of these logits."""
        if not (files := self._learnt_files(path)).fitting:
            return False
        tests = self._distributions(self.build.info(), plain)
        return files.find(tests)[0].keys() >= {test.name for test in tests if len(rows_of(plain, test.positions))}

    def _learnt_files(self, logits: Path) -> LearntFiles:
        """The files with what `adapt` has learnt from these logits. They are looked for once."""
        if self._learnt is None:
            self._learnt = LearntFiles.of(self.folder, self.plan, self._key(LOGITS), logits)
        return self._learnt

    def trained_result(self) -> dict[str, Any]:
        """The entries about training in the metrics.json of the run that is evaluated; empty without that file."""
        path = self.folder.source / "metrics.json"
        try:
            return of_training(read_result(path)) if path.exists() and self.folder.foreign is None else {}
        except Damaged as error:
            self.note(f"{error}; the result is without what it says of the training", warn=True, own=True)
            return {}

    def from_images(self, method: Method, data: DataBundle, result: dict[str, Any]) -> None:
        """Evaluate from images. All processes must call this together.

        Args:
            method: the trained method.
            data: the data of the run.
            result: the entries of metrics.json so far.
        """
        test_time.prepare(method, self.plan.test_prec)
        distributions = self._asked(data.test_distributions)
        first = self.accelerator.is_main_process  # all logits are on the first process only
        test_logits, val = (self._stored(name) if first else None for name in (LOGITS, VAL_LOGITS))
        has_test, has_val = on_main(self.accelerator, lambda: (test_logits is not None, val is not None))
        if not has_test:
            test_logits = self._infer(method, data, "train" if self.plan.test_train else "test")
        if not has_val and data.val is not None and not self.plan.test_train and (not has_test or self.plan.needs_val):
            val = self._infer(method, data, "val")
        if test_logits is not None:
            self._keep(test_logits, val)
        measured = {} if test_logits is None else plain_results(test_logits, distributions, data.info.groups)
        if self.plan.adapts:
            names = on_main(self.accelerator, lambda: list(measured))  # a distribution without images is left out
            distributions = tuple(test for test in distributions if test.name in names)
            views = partial(predicted_from_views, self.plan, method, data, test_logits, self.accelerator, self.scratch)
            self._adapt(test_logits, distributions, data.info, measured, views)

        def aim() -> None:
            if test_logits is not None:
                self._aim(test_logits, val, distributions, data.info, measured)

        on_main(self.accelerator, aim)
        if test_logits is not None:
            split, view = ("train", data.train_as_test) if self.plan.test_train else ("test", data.test)
            images = partial(EvaluatedImages, split, view.source, view.indices)
            self._finish(result, test_logits, val, data.info, images, measured, method.asks_every_expert)

    def _asked(self, distributions: tuple[TestDistribution, ...]) -> tuple[TestDistribution, ...]:
        """The test distributions; empty if the training images are evaluated."""
        if not self.plan.test_train:
            return distributions
        if self.plan.asked:
            self.note(f"test_train: {', '.join(self.plan.asked)}: of test images, and left out", own=True)
        return ()

    def _adapt(
        self,
        plain: Logits | None,
        tests: Sequence[TestDistribution],
        info: DataInfo,
        measured: Results,
        predict: Predict | None = None,
    ) -> None:
        """Add the results of `adapt` to `measured`, on the first process. Without `predict`, all was learnt before."""
        if plain is not None:
            files, target = self._learnt_files(self.decision.target / LOGITS), self.decision.target
            if origin := files.add_results(target, plain, tests, info.groups, measured, predict):
                self.note(f"from {origin}", own=True)
        elif predict is not None:
            predict(tests, {})  # this process takes part in the passes over the images

    def _aim(
        self,
        test_logits: Logits,
        val: Logits | None,
        distributions: Sequence[TestDistribution],
        info: DataInfo,
        measured: Results,
    ) -> None:
        """Add the results of `target_prior` on each distribution to `measured`."""
        if self.plan.target is None or self.plan.test_train:
            return
        notes = add_target_results(
            self.plan.target, self.build.assumed(), test_logits, val, distributions, info, measured, self.scratch
        )
        for text in notes:
            self.note(text, warn=True, own=True)

    def _infer(self, method: Method, data: DataBundle, split: str) -> Logits | None:
        """Compute the logits of a split; None on every process but the first."""
        plan, view = self.plan, {"train": data.train_as_test, "test": data.test, "val": data.val}[split]
        assert view is not None
        mode = plan.tte_mode
        if mode is None and self.features is not None:
            view = self.features.view_of(method, view)
        predict = test_time.averaged(method, mode, plan.resolution) if mode else test_time.plain(method)
        compute = partial(infer, predict, view, self.accelerator, plan.batch_size, plan.num_workers)
        logits = compute(scratch=self.scratch, summarised=True, title=f"{split} images")
        if logits is None:
            return None
        if len(logits.labels) == 0:
            raise UserError(f"none of the {len(view)} images could be read; check root")
        for text, warn in logits.notes(plan.max_images).items():
            self.note(text, warn, own=True)
        if not is_finite(logits.summary.asked, logits.summary.finite, method.asks_every_expert):
            raise UserError(
                "the logits are not finite, so training diverged: lower lr, or use prec bf16 or fp32, and start over "
                "with `resume False`"
            )
        return replace(logits, left_out=data.splits.left_out if split == "train" else 0)

    def _keep(self, test_logits: Logits, val: Logits | None) -> None:
        """Save the logits. This comes before every computation on them that may raise a `UserError`."""
        for name, logits in ((LOGITS, test_logits), (VAL_LOGITS, val)):
            if logits is not None:
                path = self.decision.target / name
                self.folder.seal({path: save_logits(path, logits, self._key(name))})

    def _finish(
        self,
        result: dict[str, Any],
        test_logits: Logits,
        val: Logits | None,
        info: DataInfo,
        images: Callable[[], EvaluatedImages],
        distributions: Results,
        asks_every_expert: bool,
    ) -> None:
        """Compute the metrics, write report and metrics, and log the table.

        metrics.json is written last, because its existence means that all other files are complete.
        """
        notes = [*result.get("notes", []), *self.notes]
        about = {**self.plan.options, **self.facts, "checkpoint": self.folder.checkpoint_id(), "of": self.folder.origin}
        about |= {"files": self.folder.files_read(), "images": self.decision.fingerprints, "notes": self._own_notes}
        # Older runs did not name the backbone. A run may be evaluated on other data than those of its training.
        result |= {"backbone": self.folder.cfg.backbone, "data": self.folder.cfg.data}
        result = {**result, **circumstances(), "notes": list(dict.fromkeys(notes)), "evaluation": about}
        for split, logits in (("test", test_logits), ("val", val)):
            if logits is not None:
                metrics = evaluate_predictions(logits.summary.predictions, info.groups)
                if asks_every_expert:
                    experts = logits.summary.expert_metrics(info.groups)
                    metrics |= {"experts": experts} if experts else {}
                elif not self.plan.tte_mode:  # usage is defined for one view only
                    model = self.build.outline().model
                    used = usage_report(logits.summary.asked, logits.labels, info.groups, model, self.plan.resolution)
                    metrics["experts_used"] = used
                result[split] = {**metrics, "bad_images": logits.bad_images + logits.left_out}
        if distributions:
            result["distributions"] = distributions
        if summary := dirichlet_summary(distributions):
            result["dirichlet"] = summary
        target = self.decision.target
        if distributions or target == self.folder.path:
            add_curves(self.plan, self.accelerator, self.folder, target, result, info)
        kind = self.plan.report
        report = "" if kind == NONE else add_report(self.folder, target, result, test_logits, info, images, kind)
        self.folder.seal(write_metrics(target, result))
        log.info("%s\n%srun folder %s", table(result), report, target)

    def _key(self, name: str) -> dict[str, Any]:
        """Everything on which the logits in the file `name` depend."""
        split = "val" if name == VAL_LOGITS else "train" if self.plan.test_train else "test"
        images = self.decision.fingerprints
        also = {"train": images.get("train")} if self.plan.reads_train else {}
        fixed = {"checkpoint": self.folder.checkpoint_id(), "images": images.get(split)}
        return {**fixed, **also, **self.plan.options_of_logits}
