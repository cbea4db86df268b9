"""Evaluations of a run: which logits, from images or from an earlier evaluation, and the files they end in."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.datasets import DataBundle, DataInfo
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.trainers.distributed import on_main
from tailtune.trainers.evaluation import tta as test_time
from tailtune.trainers.evaluation.adaptation import UnlabelledTest
from tailtune.trainers.evaluation.adaptation_table import ADAPTS
from tailtune.trainers.evaluation.distributions import Results, dirichlet_summary, plain_results
from tailtune.trainers.evaluation.evaluation_plan import Builders, EvaluationPlan
from tailtune.trainers.evaluation.expert_usage import is_finite, usage_report
from tailtune.trainers.evaluation.inference import (
    LOGITS,
    VAL_LOGITS,
    Logits,
    infer,
    rows_of,
    save_logits,
    stored_logits,
)
from tailtune.trainers.evaluation.metrics import evaluate
from tailtune.trainers.evaluation.target_prior import add_target_results
from tailtune.trainers.methods import Method
from tailtune.trainers.methods.base import combine
from tailtune.trainers.progress import write_test_scalars
from tailtune.trainers.runs.report import circumstances, read_result, table, write_metrics
from tailtune.trainers.runs.resume_decision import Decision
from tailtune.trainers.runs.run_folder import FACTS, RunFolder
from tailtune.trainers.storage.atomic_io import Damaged
from tailtune.trainers.storage.manifest import read_json

log = logging.getLogger("tailtune")

OUTCOMES = ("test", "val", "distributions", "dirichlet", "evaluation")
"""Entries of metrics.json that are of one evaluation."""


@dataclass
class Evaluation:
    """One evaluation, into the decision's `target`: the run's own folder or a `tests/<key>/`."""

    plan: EvaluationPlan
    build: Builders
    accelerator: Accelerator
    folder: RunFolder
    decision: Decision
    notes: list[str] = field(default_factory=list)
    """What a reader of the result has to know."""

    def __post_init__(self) -> None:
        for text in (*self.decision.notes, *self.plan.warnings):
            self.note(text, warn=True)

    def note(self, text: str, warn: bool = False) -> None:
        """Keep it for metrics.json, and say it."""
        self.notes.append(text)
        if warn:
            log.warning("warning: %s", text)

    def from_stored_logits(self) -> bool:
        """Answer from logits that an earlier evaluation saved, if they are enough; needs neither model nor images."""
        found, val = None if self.plan.adapts else self._stored(LOGITS), self._stored(VAL_LOGITS)
        shifted = {"test_dists", "target_prior"} & set(self.plan.asked)
        if found is None or (found.bad_images and shifted):  # then the labels of all images are needed
            return False
        if val is None and self.plan.needs_val and "val" in read_json(self.folder.metrics):  # saved by older versions
            return False
        if self.accelerator.is_main_process:
            info = self.build.info()
            distributions = self._asked(self.build.distributions(info, found.labels))
            self._keep(found, val)
            measured = plain_results(found, distributions, info.groups)
            self._aim(found, val, distributions, info, measured)
            every = self.build.outline().asks_every_expert
            self._finish(self.trained_result(), found, val, info.groups, measured, every)
        return True

    def _stored(self, name: str) -> Logits | None:
        """What an earlier evaluation in this run's folder saved and this one would compute again."""
        if self.folder.source != self.folder.path or not self.folder.finished():
            return None
        found = stored_logits(self.folder.path, self._key(name), name)
        if found is None or name != LOGITS:
            return found and found[1]
        log.info("using the logits of %s", found[0])
        self.note(f"from the logits of {found[0]}")
        return found[1]

    def trained_result(self) -> dict[str, Any]:
        """metrics.json of the run whose checkpoint is evaluated, without its own evaluation; empty if it has none."""
        path = self.folder.source / "metrics.json"
        try:
            result = read_result(path) if path.exists() and self.folder.foreign is None else {}
        except Damaged as error:
            self.note(f"{error}; the result is without what it says of the training", warn=True)
            result = {}
        return {key: value for key, value in result.items() if key not in OUTCOMES}

    def from_images(self, method: Method, data: DataBundle, result: dict[str, Any]) -> None:
        """Run the method over the images; `result` is metrics.json so far."""
        test_time.prepare(method, self.plan.test_prec)
        distributions = self._asked(data.test_distributions)
        found, val = self._stored(LOGITS), self._stored(VAL_LOGITS)
        wants_val = found is None or self.plan.needs_val
        if found is None:
            found = self._infer(method, data, "train" if self.plan.test_train else "test")
        if val is None and data.val is not None and not self.plan.test_train and wants_val:
            val = self._infer(method, data, "val")
        found = found if self.accelerator.is_main_process else None  # stored ones are read by all
        if found is not None:
            self._keep(found, val)
        measured = {} if found is None else plain_results(found, distributions, data.info.groups)
        if self.plan.adapts:
            self._adapt(method, data, found, distributions, measured)

        def aim() -> None:
            if found is not None:
                self._aim(found, val, distributions, data.info, measured)

        on_main(self.accelerator, aim)
        if found is not None:
            self._finish(result, found, val, data.info.groups, measured, method.asks_every_expert)

    def _asked(self, distributions: tuple[TestDistribution, ...]) -> tuple[TestDistribution, ...]:
        """The label distributions of the test images, none where the training images are evaluated."""
        if not self.plan.test_train:
            return distributions
        if self.plan.asked:
            self.note(f"test_train: {', '.join(self.plan.asked)}: of test images, and left out")
        return ()

    def _adapt(
        self,
        method: Method,
        data: DataBundle,
        plain: Logits | None,
        distributions: Sequence[TestDistribution],
        measured: Results,
    ) -> None:
        """Add what `adapt` makes of each distribution to `measured`, on the first process."""
        plan, predict = self.plan, test_time.separate(method)
        assert plan.adapt is not None

        def passes(number: int) -> Logits | None:
            log.info("views of the test images, pass %d", number + 1)
            return infer(predict, data.test_views, self.accelerator, plan.batch_size, plan.num_workers, number)

        distributions = [each for each in distributions if each.name in measured]
        test = UnlabelledTest(method, distributions, plain, passes, self.accelerator, data.test, plan.num_workers)
        adapted = ADAPTS[plan.adapt].run(test, plan.adapt_options)
        if plain is None:
            return
        for name, predictions in adapted.items():
            labels = plain.labels[rows_of(plain, predictions.positions)]
            metrics = evaluate(predictions.logits, labels, data.info.groups)
            predictors = measured[name]["predictors"]
            gain = metrics["accuracy"] - predictors["plain"]["accuracy"]
            predictors[plan.adapt] = {**metrics, "gain": gain, **predictions.facts}

    def _aim(
        self,
        found: Logits,
        val: Logits | None,
        distributions: Sequence[TestDistribution],
        info: DataInfo,
        measured: Results,
    ) -> None:
        """Add what `target_prior` makes of each distribution to `measured`."""
        if self.plan.target is None or self.plan.test_train:
            return
        facts = self.folder.source / FACTS
        method = self.build.trained_outline()
        if self.folder.foreign is None and facts.exists():  # without the lists, the data's names may be placeholders
            info = replace(info, class_names=tuple(read_json(facts)["class_names"]))
        for text in add_target_results(self.plan.target, method, found, val, distributions, info, measured):
            self.note(text, warn=True)

    def _infer(self, method: Method, data: DataBundle, split: str) -> Logits | None:
        """Logits of a split, on the first process."""
        plan, view = self.plan, {"train": data.train_as_test, "test": data.test, "val": data.val}[split]
        assert view is not None
        mode = plan.tte_mode
        predict = test_time.averaged(method, mode, plan.resolution) if mode else test_time.plain(method)
        found = infer(predict, view, self.accelerator, plan.batch_size, plan.num_workers)
        if found is None:
            return None
        if len(found.labels) == 0:
            raise UserError(f"none of the {len(view)} images could be read; check root")
        if found.bad_images:
            self.note(f"{found.bad_images} of {len(view)} images could not be read and are left out", warn=True)
        if len(view) == plan.max_images:
            self.note(f"max_test_images {plan.max_images}: not all images")
        if not is_finite(found.logits, method.asks_every_expert):
            raise UserError(
                "the logits are not finite, so training diverged: lower lr, or use prec bf16 or fp32, and start over "
                "with `resume False`"
            )
        return replace(found, left_out=data.splits.left_out if split == "train" else 0)

    def _keep(self, found: Logits, val: Logits | None) -> None:
        """Save the logits, before anything is made of them that may be refused."""
        for name, logits in ((LOGITS, found), (VAL_LOGITS, val)):
            if logits is not None:
                path = self.decision.target / name
                self.folder.seal({path: save_logits(path, logits, self._key(name))})

    def _finish(
        self,
        result: dict[str, Any],
        found: Logits,
        val: Logits | None,
        groups: dict[str, Tensor],
        distributions: Results,
        asks_every_expert: bool,
    ) -> None:
        """Metrics, metrics.json (last, because it says that the rest is there), the table."""
        notes = [*result.get("notes", []), *self.notes]
        about = {**self.plan.options, "checkpoint": self.folder.checkpoint_id(), "of": self.folder.origin}
        about["files"], about["images"] = self.folder.files_read(), self.decision.fingerprints
        result = {**result, **circumstances(), "notes": list(dict.fromkeys(notes)), "evaluation": about}
        for split, logits in (("test", found), ("val", val)):
            if logits is not None:
                metrics = evaluate(combine(logits.logits), logits.labels, groups)
                if not asks_every_expert and not self.plan.tte_mode:  # of one forward, not of several views
                    model = self.build.outline().model
                    used = usage_report(logits.logits, logits.labels, groups, model, self.plan.resolution)
                    metrics["experts_used"] = used
                result[split] = {**metrics, "bad_images": logits.bad_images + logits.left_out}
        if distributions:
            result["distributions"] = distributions
        if summary := dirichlet_summary(distributions):
            result["dirichlet"] = summary
        target = self.decision.target
        if distributions or target == self.folder.path:
            write_test_scalars(target / "tensorboard", result["test"], distributions)
        self.folder.seal(write_metrics(target, result))
        log.info("%s\nrun folder %s", table(result), target)

    def _key(self, name: str) -> dict[str, Any]:
        """What the logits in the file of that name depend on."""
        split = "val" if name == VAL_LOGITS else "train" if self.plan.test_train else "test"
        images = self.decision.fingerprints.get(split)
        return {"checkpoint": self.folder.checkpoint_id(), "images": images, **self.plan.options_of_logits}
