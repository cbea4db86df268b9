"""Validation during training: the curve, the best epoch, and when to stop. Training itself is not changed by it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError
from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_int
from tailtune.datasets.data_bundle import DataBundle
from tailtune.trainers.distributed import on_main
from tailtune.trainers.evaluation import tta as test_time
from tailtune.trainers.evaluation.expert_usage import is_finite
from tailtune.trainers.evaluation.inference import Logits, infer
from tailtune.trainers.evaluation.metrics import evaluate_predictions
from tailtune.trainers.evaluation.validation_metrics import BEST, HIGHER, LOWER, Validated
from tailtune.trainers.feature_store import FeatureStore
from tailtune.trainers.methods import Method
from tailtune.trainers.storage.checkpoint import copy_state, trained_state, with_prefix
from tailtune.trainers.storage.large_tensors import Scratch
from tailtune.trainers.storage.random_state import random_state, restore_random_state

PREFIX = "best."
"""Beginning of the names of the best epoch's tensors in a saved state."""

OnValidation = Callable[[Validated], bool]
"""Gets a validation, and returns whether the training shall stop after it, with its state saved."""


@dataclass(frozen=True)
class ValidationOptions:
    """When a run is validated, and what follows from that."""

    val_every: int | None = option(
        None,
        "Number of epochs between two validations during training, on the validation split. None means that there are "
        "none.",
        as_int,
        least=1,
        most=10**6,
    )
    keep: str = option(
        "last",
        "Epoch whose weights are evaluated and exported: the last one, or the best of the validated ones by a metric.",
        choices=("last", *(f"{BEST}{metric}" for metric in (*HIGHER, *LOWER))),
    )
    patience: int | None = option(
        None,
        "Number of validations without a new best one, after which training stops. None means that it runs to the end.",
        as_int,
        least=1,
        most=10**6,
    )


@dataclass(frozen=True)
class ValidationPlan:
    """The settings of validation during training, read from the config."""

    every: int | None
    metric: str | None
    """The metric that chooses the best epoch; None: the last epoch is kept."""
    patience: int | None
    batch_size: int
    num_workers: int | None

    @classmethod
    def of(cls, cfg: CfgNode) -> "ValidationPlan":
        """Read and check the settings of a config.

        Raises:
            UserError: an option that needs another one, or a validation that never comes.
        """
        every, keep, patience = cfg.val_every, cfg.keep, cfg.patience
        metric = keep.removeprefix(BEST) if keep.startswith(BEST) else None
        if every is None and (metric or patience):
            asked = f"keep {keep}" if metric else f"patience {patience}"
            raise UserError(f"{asked} needs validations during training; add `val_every 1`")
        if patience and not metric:
            raise UserError(f"patience {patience} needs a metric; add `keep {BEST}mean_acc`, or leave out patience")
        if every is not None and every > cfg.num_epochs:
            raise UserError(f"val_every {every} is above num_epochs {cfg.num_epochs}, so no epoch would be validated")
        return cls(every, metric, patience, cfg.test_batch_size, cfg.num_workers)


class Validation:
    """Validates a method after some epochs, and holds the weights of the best epoch.

    The method predicts in the arithmetic of training. The random state and the modes of all modules are put back.

    Args:
        plan: the settings.
        data: the data of the run.
        accelerator: device and processes; all processes validate together.
        scratch: gives room for large logits.
        on_validation: gets each validation, on the first process.
        features: gives the features of the images if the encoder is frozen.

    Raises:
        UserError: the data have no validation split.
    """

    def __init__(
        self,
        plan: ValidationPlan,
        data: DataBundle,
        accelerator: Accelerator,
        scratch: Scratch,
        on_validation: OnValidation | None = None,
        features: FeatureStore | None = None,
    ) -> None:
        if plan.every is not None and data.val is None:
            raise UserError(
                f"val_every {plan.every} needs a validation split, and {data.info.name} has none; the test images must "
                "not choose the model: hold images out with val_per_class, or give a val_list or a folder val"
            )
        self.plan, self.data, self.accelerator, self.scratch = plan, data, accelerator, scratch
        self.on_validation, self.features = on_validation, features
        self.view = data.val_in_training
        self.best: dict[str, Tensor] = {}
        """Trained tensors of the best epoch, on the CPU; empty if no epoch is chosen."""
        self.seconds = 0.0
        """Time that validations of this launch have taken."""

    @property
    def identity(self) -> dict[str, Any]:
        """Which images are validated, for the states of the run: a resumed run must go on with the same ones."""
        if self.plan.metric is None or self.view is None:
            return {}
        return {"validation images": f"{len(self.view)} of {self.data.records['val'].fingerprint}"}

    def is_due(self, epoch: int) -> bool:
        """Whether this is one of the epochs to validate, counted from 1."""
        return self.plan.every is not None and epoch % self.plan.every == 0

    def after_epoch(self, method: Method, epoch: int, step: int, earlier: list[Validated]) -> Validated | None:
        """Validate, if this is one of the epochs to validate.

        Args:
            method: the method, without a wrapper. Its batch norms have the same statistics on all processes.
            epoch: number of the epoch that has ended, counted from 1.
            step: number of optimizer steps so far.
            earlier: the validations of the run so far; the new one is added.

        Returns:
            The new validation; None if there was none.

        Raises:
            UserError: no validation image can be read, or the logits are not finite.
        """
        if not self.is_due(epoch):
            return None
        started = time.perf_counter()
        assert self.view is not None
        with undisturbed(method, self.accelerator.process_index):
            if self.features is not None:
                self.view = self.features.view_of(method, self.view)
            logits = infer(
                test_time.plain(method),
                self.view,
                self.accelerator,
                self.plan.batch_size,
                self.plan.num_workers,
                scratch=self.scratch,
                summarised=True,
                title="validation",
            )
        metrics = on_main(self.accelerator, lambda: self._measured(logits, method.asks_every_expert, epoch))
        earlier.append({"epoch": epoch, "step": step, **metrics})
        if self.best_of(earlier) is earlier[-1]:
            self.best = {name: tensor.cpu().clone() for name, tensor in trained_state(method).items()}
        self.seconds += time.perf_counter() - started
        return earlier[-1]

    def _measured(self, logits: Logits | None, asks_every_expert: bool, epoch: int) -> dict[str, float | None]:
        assert logits is not None, "asked on the first process"
        if len(logits.labels) == 0:
            raise UserError("none of the validation images could be read; check root")
        if not is_finite(logits.summary.asked, logits.summary.finite, asks_every_expert):
            raise UserError(f"the logits of the validation images are not finite after epoch {epoch}; lower lr")
        metrics = evaluate_predictions(logits.summary.predictions, self.data.info.groups)
        return {name: value for name, value in metrics.items() if not isinstance(value, (dict, list))}

    def best_of(self, validations: Sequence[Validated]) -> Validated | None:
        """The best validation, of equal ones the first; None if no epoch is chosen or validated."""
        if self.plan.metric is None or not validations:
            return None
        metric, sign = self.plan.metric, -1 if self.plan.metric in LOWER else 1
        return max(validations, key=lambda validated: sign * validated[metric])

    def ends(self, validations: Sequence[Validated]) -> bool:
        """Whether `patience` ends the training after these validations."""
        best = self.best_of(validations)
        if best is None or self.plan.patience is None:
            return False
        return sum(validated["epoch"] > best["epoch"] for validated in validations) >= self.plan.patience

    def asks_to_stop(self, validated: Validated | None) -> bool:
        """Give the newest validation, if there is one, to `on_validation`.

        Returns:
            Whether all processes shall stop.
        """
        asked = self.on_validation
        return asked is not None and validated is not None and on_main(self.accelerator, lambda: asked(validated))

    def outcome(self, validations: Sequence[Validated], epochs: int) -> Iterator[str]:
        """Sentences about what the validations have decided, for the log and the notes of a run of `epochs` epochs."""
        best, metric = self.best_of(validations), self.plan.metric
        if best is not None and metric is not None:
            value = f"{metric} {best[metric]:.4g}"
            yield f"the weights are those of epoch {best['epoch']}, the best of {len(validations)} validated ({value})"
        elif metric is not None:
            yield "no epoch was validated, so the weights are the last ones"
        if self.ends(validations) and validations[-1]["epoch"] < epochs:
            yield f"patience {self.plan.patience} ended the training after epoch {validations[-1]['epoch']}"

    # --- saved states ----------------------------------------------------------------------------------------------

    def state(self, validations: Sequence[Validated], step: int) -> dict[str, Tensor]:
        """The tensors that a state after a step needs besides the trained ones."""
        best = self.best_of(validations)
        if best is None or best["step"] == step:  # then they are the trained ones
            return {}
        return {f"{PREFIX}{name}": tensor for name, tensor in self.best.items()}

    def load(self, tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor], best: Validated | None) -> None:
        """Continue from a saved state.

        Args:
            tensors: all tensors of the state.
            trained: its trained tensors, by their names in `trained_state`.
            best: `best_of` its validations.
        """
        if best is not None:
            self.best = with_prefix(tensors, PREFIX) or dict(trained)

    def restore_best(self, method: Method) -> None:
        """Give the method the weights of the best epoch, if an epoch is chosen."""
        if self.best:
            copy_state(method, self.best, "the best epoch", "start over with `resume False`")


@contextmanager
def undisturbed(method: Method, rank: int) -> Iterator[None]:
    """In the block the method is in eval mode. Afterwards modes and the random state of the process are as before.

    Args:
        method: the method.
        rank: index of this process.
    """
    modes = [(module, module.training) for module in method.modules()]
    before = random_state(rank)
    method.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        restore_random_state(before, rank)
