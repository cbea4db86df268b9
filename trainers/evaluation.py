"""Evaluations of a run: which logits, from images or from an earlier evaluation, and the files they end in."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from configs import CfgNode, values_of
from configs.errors import UserError
from configs.key import TEST
from configs.schema import SCHEMA
from datasets import DataBundle, View, build_info
from trainers import test_time
from trainers.evaluator import Logits, infer, save_logits, stored_logits
from trainers.files import read_json, write_json
from trainers.folder import RunFolder
from trainers.methods import Method
from trainers.metrics import evaluate
from trainers.optim import PRECISIONS, cast_trainable
from trainers.progress import write_test_scalars
from trainers.report import circumstances, read_result, table

log = logging.getLogger("tailtune")


@dataclass
class Evaluation:
    """One evaluation, into `target`: the run's own folder or a `tests/<key>/`."""

    cfg: CfgNode
    accelerator: Accelerator
    folder: RunFolder
    target: Path
    notes: list[str] = field(default_factory=list)
    """What a reader of the result has to know."""

    def note(self, text: str, warn: bool = False) -> None:
        """Keep it for metrics.json, and say it."""
        self.notes.append(text)
        if warn:
            log.warning("warning: %s", text)

    def from_stored_logits(self) -> bool:
        """Answer from logits that an earlier evaluation saved, if one fits; needs neither model nor images."""
        found = stored_logits(self.folder.path, self._key()) if self.folder.source == self.folder.path else None
        if found is None or not self.folder.finished():
            return False
        path, logits = found
        if self.accelerator.is_main_process:
            log.info("using the logits of %s", path)
            self.note(f"from the logits of {path}")
            self._finish(self.trained_result(), logits, None, build_info(self.cfg).groups)
        return True

    def trained_result(self) -> dict[str, Any]:
        """metrics.json of the run whose checkpoint is evaluated, without its own evaluation; empty if it has none."""
        path = self.folder.source / "metrics.json"
        result = read_result(path) if path.exists() and self.folder.foreign is None else {}
        return {key: value for key, value in result.items() if key not in ("test", "val", "evaluation")}

    def from_images(self, method: Method, data: DataBundle, result: dict[str, Any]) -> None:
        """Run the method over the images; `result` is metrics.json so far."""
        cfg, precision = self.cfg, PRECISIONS[self.cfg.test_prec]
        method.eval()
        method.model.set_precision(precision.compute)
        cast_trainable(method, precision.trainable)
        method.model.head.to(precision.trainable)
        found = self._infer(method, data.train_as_test if cfg.test_train else data.test)
        val = self._infer(method, data.val) if data.val is not None and not cfg.test_train else None
        if found is not None:
            self._finish(result, found, val, data.info.groups)

    def _infer(self, method: Method, view: View) -> Logits | None:
        """Logits on the first process."""
        cfg = self.cfg
        predict = test_time.averaged(method, cfg.tte_mode, cfg.resolution) if cfg.tte else test_time.plain(method)
        found = infer(predict, view, self.accelerator, cfg.test_batch_size, cfg.num_workers)
        if found is None:
            return None
        if len(found.labels) == 0:
            raise UserError(f"none of the {len(view)} images could be read; check root")
        if found.bad_images:
            self.note(f"{found.bad_images} of {len(view)} images could not be read and are left out", warn=True)
        if len(view) == cfg.max_test_images:
            self.note(f"max_test_images {cfg.max_test_images}: not all images")
        if not found.logits.isfinite().all():
            raise UserError(
                "the logits are not finite, so training diverged: lower lr, or use prec bf16 or fp32, and start over "
                "with `resume False`"
            )
        return found

    def _finish(self, result: dict[str, Any], found: Logits, val: Logits | None, groups: dict[str, Tensor]) -> None:
        """Logits, metrics, metrics.json (last, because it says that the rest is there), the table."""
        save_logits(self.target / "logits.safetensors", found, self._key())
        notes = [*result.get("notes", []), *self.notes]
        about = {**values_of(self.cfg, TEST), "checkpoint": self.folder.checkpoint_id(), "of": self.folder.origin}
        result = {**result, **circumstances(), "notes": list(dict.fromkeys(notes)), "evaluation": about}
        for split, each in (("test", found), ("val", val)):
            if each is not None:
                metrics = evaluate(each.logits.mean(1), each.labels, groups)
                result[split] = {**metrics, "bad_images": each.bad_images}
        if self.target == self.folder.path:
            write_test_scalars(self.folder.events, result["test"])
        write_json(self.target / "metrics.json", result)
        log.info("%s\nrun folder %s", table(result), self.target)

    def _key(self) -> dict[str, Any]:
        """What the logits depend on."""
        test = {key: value for key, value in values_of(self.cfg, TEST).items() if SCHEMA[key].logits}
        return {"checkpoint": self.folder.checkpoint_id(), **test}


def still_true(metrics: Path, folder: RunFolder) -> bool:
    """Whether a stored result is of the checkpoint that stands there now."""
    about = read_json(metrics).get("evaluation")
    return isinstance(about, dict) and about.get("checkpoint") == folder.checkpoint_id()
