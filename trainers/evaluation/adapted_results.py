"""Results of `adapt` on the test distributions. What it learns is stored beside the logits, for later evaluations."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.datasets.data_bundle import DataBundle, TestDistribution
from tailtune.trainers.evaluation import tta
from tailtune.trainers.evaluation.adaptation import AdaptedPredictions, Learnt, UnlabelledTest
from tailtune.trainers.evaluation.adaptation_table import ADAPTS
from tailtune.trainers.evaluation.distributions import Results
from tailtune.trainers.evaluation.evaluation_plan import EvaluationPlan
from tailtune.trainers.evaluation.inference import Logits, infer, rows_of
from tailtune.trainers.evaluation.logit_files import checksum_of
from tailtune.trainers.evaluation.metrics import evaluate
from tailtune.trainers.methods import Method
from tailtune.trainers.runs.run_folder import RunFolder
from tailtune.trainers.storage.atomic_io import Damaged, write_json
from tailtune.trainers.storage.large_tensors import Scratch
from tailtune.trainers.storage.manifest import read_json

ADAPTED = "expert_weights.json"
"""Name of the file, beside the logits."""
FORMAT = 1
"""Version of the file's layout, and of what its numbers mean."""

Predict = Callable[[Sequence[TestDistribution], Mapping[str, Learnt]], dict[str, AdaptedPredictions]]
"""(test distributions, name → what was learnt for it before) → name of a distribution → its predictions."""

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class LearntFiles:
    """The files of a run that hold what adaptations in its evaluations have learnt.

    What was learnt is used again only if everything on which it depends is the same: the file of the logits, the
    checkpoint, images and options from which logits follow, the adaptation with its options and seed, and the images of
    the test distribution.
    """

    folder: RunFolder
    plan: EvaluationPlan
    about: Mapping[str, Any]
    """Everything that the test distributions of a file have in common."""
    fitting: Mapping[Path, Mapping[str, Any]]
    """File with the same `about` → name of a distribution → its `images` and what was `learnt`."""

    @classmethod
    def of(cls, folder: RunFolder, plan: EvaluationPlan, key: Mapping[str, Any], logits: Path) -> "LearntFiles":
        """The files for one evaluation. A damaged file is warned about, and left out.

        Args:
            folder: the run's folder.
            plan: the settings of the evaluation.
            key: everything on which the logits depend.
            logits: the file of the logits of the test images.
        """
        options = {"views": plan.options["adapt_views"], **asdict(plan.adapt_options)}
        about = {"format": FORMAT, "adapt": plan.adapt, "options": options, "logits": checksum_of(logits), "of": key}
        about = json.loads(json.dumps(about))
        fitting = {}
        for path in sorted(folder.path.glob(f"**/{ADAPTED}")):
            try:
                content = read_json(path)
            except Damaged as error:
                log.warning("warning: %s; what it held is learnt again", error)
                continue
            if {name: content.get(name) for name in about} == about:
                fitting[path] = content["distributions"]
        return cls(folder, plan, about, fitting)

    def find(self, tests: Sequence[TestDistribution]) -> tuple[dict[str, Learnt], str]:
        """What earlier evaluations have learnt for some test distributions.

        Returns:
            Name of a distribution → what was learnt; and a line about its files, empty if there is none.
        """
        found: dict[str, Learnt] = {}
        files = []
        for path, entries in self.fitting.items():
            same = [test.name for test in tests if entries.get(test.name, {}).get("images") == _images(test)]
            new = {name: entries[name]["learnt"] for name in same if name not in found}
            found |= new
            files += [str(path)] if new else []
        line = f"the expert weights of {', '.join(files)} for {len(found)} of {len(tests)} test distributions"
        return found, line if found else ""

    def add_results(
        self,
        target: Path,
        plain: Logits,
        tests: Sequence[TestDistribution],
        groups: Mapping[str, Tensor],
        measured: Results,
        predict: Predict | None,
    ) -> str:
        """Add the results of `adapt` to those of each test distribution, and store what it has learnt.

        Args:
            target: the folder of the evaluation.
            plain: logits of all test images.
            tests: the test distributions.
            groups: `many`, `med`, `few` → class indices.
            measured: the results of the distributions; changed in place.
            predict: makes the predictions; None: everything was learnt before.

        Returns:
            A line about what was learnt before, as `find`.
        """
        tests = [test for test in tests if test.name in measured]
        learnt, origin = self.find(tests)
        if origin:
            log.info("using %s", origin)
        adapted = predict(tests, learnt) if predict else self._again(plain, tests, learnt)
        self.save(target, adapted, tests)
        for name, predictions in adapted.items():
            metrics = evaluate(predictions.logits, plain.labels[rows_of(plain, predictions.positions)], groups)
            predictors = measured[name]["predictors"]
            gain = metrics["accuracy"] - predictors["plain"]["accuracy"]
            predictors[str(self.plan.adapt)] = {**metrics, "gain": gain, **predictions.facts}
        return origin

    def _again(
        self, plain: Logits, tests: Sequence[TestDistribution], learnt: Mapping[str, Learnt]
    ) -> dict[str, AdaptedPredictions]:
        again = ADAPTS[str(self.plan.adapt)].again
        assert again is not None, "only an adaptation that can do this stores anything"
        return again(plain, tests, self.plan.adapt_options, learnt)

    def save(self, target: Path, adapted: Mapping[str, AdaptedPredictions], tests: Sequence[TestDistribution]) -> None:
        """Write what was learnt. The result does not need this file, so an error becomes a warning.

        Args:
            target: the folder of the evaluation.
            adapted: name of a distribution → its predictions.
            tests: the test distributions.
        """
        entries = {
            test.name: {"images": _images(test), "learnt": adapted[test.name].learnt}
            for test in tests
            if adapted[test.name].learnt is not None
        }
        if not entries:
            return
        try:
            if target == self.folder.path:
                self.folder.own(ADAPTED)
            self.folder.seal({target / ADAPTED: write_json(target / ADAPTED, {**self.about, "distributions": entries})})
        except UserError as error:
            log.warning("warning: %s; a later evaluation learns the weights again", error)


def _images(test: TestDistribution) -> str:
    """Checksum of the images of a test distribution, and of those from which it is learnt."""
    checksum = hashlib.sha256()
    for positions in (test.positions, test.learn_positions):
        checksum.update(b"none" if positions is None else positions.numpy().tobytes() + b";")
    return checksum.hexdigest()


def predicted_from_views(
    plan: EvaluationPlan,
    method: Method,
    data: DataBundle,
    plain: Logits | None,
    accelerator: Accelerator,
    scratch: Scratch,
    tests: Sequence[TestDistribution],
    learnt: Mapping[str, Learnt],
) -> dict[str, AdaptedPredictions]:
    """The predictions of `adapt`, which learns what is not known yet. All processes must call this together.

    Args:
        plan: the settings of the evaluation.
        method: the trained method.
        data: the data of the run.
        plain: logits of all test images; None on every process but the first.
        accelerator: the processes.
        scratch: gives room for the logits of the views.
        tests: the test distributions.
        learnt: name of a distribution → what was learnt for it before.
    """
    predict = tta.separate(method)

    def passes(number: int) -> Logits | None:
        log.info("views of the test images, pass %d", number + 1)
        sizes, title = (plan.batch_size, plan.num_workers), f"views, pass {number + 1}"
        return infer(predict, data.test_views, accelerator, *sizes, number, scratch, title=title)

    images = UnlabelledTest(method, tests, plain, passes, accelerator, data.test, plan.num_workers, learnt)
    return ADAPTS[str(plan.adapt)].run(images, plan.adapt_options)
