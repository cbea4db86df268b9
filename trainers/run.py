"""`run`: one config → one run folder. Trains what is unfinished, evaluates what is asked, repeats nothing."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from filelock import FileLock
from torch import Tensor

from configs import CfgNode, config_hash, values_of
from configs.errors import UserError
from configs.schema import SCHEMA, TEST
from datasets import DataBundle, View, build_data, build_info
from models import build_model, patch_size
from trainers import test_time
from trainers.autosize import largest_micro_batch
from trainers.checkpoint import States, fingerprint, load_checkpoint, save_checkpoint
from trainers.evaluator import Logits, infer, save_logits, stored_logits
from trainers.files import read_folder, read_json, write_json
from trainers.folder import RunFolder, start_log
from trainers.head import prepare_head
from trainers.launch import launched_alone, make_accelerator, on_main
from trainers.methods import Method, build_method
from trainers.metrics import evaluate
from trainers.optim import PRECISIONS, RESIDUAL, Plan, cast_trainable, micro_batch_size, precision_used
from trainers.progress import write_test_scalars
from trainers.report import headline, read_result, summary, table
from trainers.trainer import Trainer, TrainReport

log = logging.getLogger("tailtune")


def run(cfg: CfgNode, previous: Path | None = None) -> Path:
    """Do what a config asks for, as far as it is not done; returns the run's folder.

    Args:
        previous: folder of the finished run that this one starts from (`after`).

    Raises:
        UserError: bad input. Interrupted: stopped by a signal, with the state saved.
    """
    cfg = _resolved(cfg)
    accelerator = make_accelerator(cfg)
    folder = RunFolder(cfg)
    lock = FileLock(folder.path / ".lock", timeout=0)
    try:
        on_main(accelerator, lambda: folder.hold(lock))
        start_log(folder.path / "log.txt" if accelerator.is_main_process else None)
        stored, target = on_main(accelerator, lambda: _decide(cfg, folder))
        if stored is not None:
            log.info("finished before; the result of %s\n%s", stored, table(read_result(stored)))
        else:
            _Run(cfg, folder, accelerator, target, previous).go()
        accelerator.wait_for_everyone()  # before the lock goes
        return folder.path
    except UserError:
        if lock.is_locked:
            folder.drop_if_empty()
        raise
    finally:
        lock.release()


def _resolved(cfg: CfgNode) -> CfgNode:
    """With the defaults that depend on the backbone filled in."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.expand is None:
        cfg.expand = 3 * patch_size(cfg.backbone) // 2  # 1.5 patches, as LIFT
    cfg.freeze()
    return cfg


def _decide(cfg: CfgNode, folder: RunFolder) -> tuple[Path | None, Path]:
    """(metrics file to show, or None; folder that an evaluation goes to). Only the main process asks."""
    folder.claim()
    target = folder.target()
    trains = not cfg.zero_shot and not cfg.model_dir
    if cfg.test_only and trains and not (folder.checkpoint / "facts.json").exists():
        raise UserError(
            f"nothing is trained in {folder.path}: run the same command without test_only first, or name a run "
            "with model_dir"
        )
    metrics = target / "metrics.json"
    return (metrics if metrics.exists() and cfg.resume and not cfg.model_dir else None), target


@dataclass
class _Run:
    """One run that has something to do."""

    cfg: CfgNode
    folder: RunFolder
    accelerator: Accelerator
    target: Path
    previous: Path | None

    def go(self) -> None:
        cfg = self.cfg
        self.notes: list[str] = []
        self.prec = precision_used(cfg.prec, self.accelerator.device.type == "cuda")
        if self.prec != cfg.prec:
            self._note(f"prec {cfg.prec} needs a CUDA GPU; running in {self.prec}", warn=True)
        if cfg.gpu is not None and (not torch.cuda.is_available() or self.accelerator.num_processes > 1):
            log.info("gpu %d is ignored: %s", cfg.gpu, "several processes" if torch.cuda.is_available() else "no CUDA")
        if launched_alone():
            self._note(
                "accelerate launch started one process only, as it does without GPUs; `accelerate launch --multi_gpu "
                "--num_processes N main.py …` starts N, on CPUs too (the result is the same)",
                warn=True,
            )
        if self.target != self.folder.path and self._from_stored_logits():
            return
        with self.accelerator.main_process_first():  # who may download
            data = build_data(cfg)
            model = build_model(cfg, data.info.class_names)
        method = build_method(cfg, model, data.info)
        self.base = fingerprint(model.encoder)
        if model.random_base:
            self._note(f"{cfg.backbone} has RANDOM weights (pretrained none): results mean nothing", warn=True)
        method.to(self.accelerator.device)
        log.info(headline(cfg, data, model))
        train = None
        if self.target == self.folder.path:
            train = self._train(method, data)
        else:
            source = Path(cfg.model_dir) if cfg.model_dir else self.folder.path
            if cfg.model_dir and not (source / "checkpoint").is_dir():
                raise UserError(f"model_dir {source} holds no checkpoint/; name the folder of a finished run")
            if not cfg.zero_shot:
                load_checkpoint(source / "checkpoint", method, data.info.class_names, self.base)
            else:
                self._init_head(method, data)
        self._evaluate(method, data, train)

    # --- training ----------------------------------------------------------------------------------------------

    def _train(self, method: Method, data: DataBundle) -> TrainReport | None:
        cfg, accelerator = self.cfg, self.accelerator
        identity = {"config": config_hash(cfg), "base model": self.base, "processes": accelerator.num_processes}
        states = States(self.folder.states, identity)
        if not states.begun():
            self._init_head(method, data)
            if self.previous is not None:
                self._start_from(method, self.previous / "checkpoint")
        method.model.init = None  # lets go of the text tower, also where it was not needed
        report = None
        if not cfg.zero_shot and cfg.num_epochs:
            precision = PRECISIONS[self.prec]
            method.model.set_precision(precision.compute, RESIDUAL[cfg.residual_dtype])
            cast_trainable(method, precision.trainable)
            plan = Plan.of(cfg, self._micro_batch(method))
            events = self.folder.events if accelerator.is_main_process else None
            report = Trainer(accelerator, plan, states, events).fit(method, data)
            log.info("trained %d steps in %.0f s", report.steps, report.seconds)
        if accelerator.is_main_process:
            facts = {**identity, "base": self.base, "class_names": list(data.info.class_names)}
            save_checkpoint(self.folder.checkpoint, method, facts)
        accelerator.wait_for_everyone()
        return report

    def _start_from(self, method: Method, checkpoint: Path) -> None:
        tensors, facts = read_folder(checkpoint)
        if facts["base"] != self.base:
            raise UserError(f"after: {checkpoint} was trained on another base model (backbone or pretrained)")
        method.start_from(tensors)

    def _micro_batch(self, method: Method) -> int:
        size = micro_batch_size(self.cfg, self.accelerator.num_processes)
        if self.cfg.micro_batch_size == "auto":
            return largest_micro_batch(method, self.accelerator, size, self.cfg.resolution)
        return size

    def _init_head(self, method: Method, data: DataBundle) -> None:
        prepare_head(method, data, self.accelerator, self.cfg.test_batch_size, self.cfg.num_workers)

    # --- evaluation --------------------------------------------------------------------------------------------

    def _evaluate(self, method: Method, data: DataBundle, train: TrainReport | None) -> None:
        cfg = self.cfg
        method.eval()
        method.model.set_precision(PRECISIONS[cfg.test_prec].compute)
        found = self._infer(method, data.train_as_test if cfg.test_train else data.test)
        val = self._infer(method, data.val) if data.val is not None and not cfg.test_train else None
        if not self.accelerator.is_main_process:
            return
        save_logits(self.target / "logits.safetensors", found, self._key(self._checkpoint_id()))
        result = summary(cfg, data.info, method.model, train, self.notes)
        self._finish(result, found, val, data.info.groups)

    def _infer(self, method: Method, view: View) -> Logits:
        cfg = self.cfg
        predict = test_time.five_crops(method, cfg.resolution) if cfg.tte else test_time.plain(method)
        found = infer(predict, view, self.accelerator, cfg.test_batch_size, cfg.num_workers)
        if found.bad_images:
            self._note(f"{found.bad_images} test images could not be read and are left out", warn=True)
        if not found.logits.isfinite().all():
            raise UserError(
                "the logits are not finite, so training diverged: lower lr, or use prec bf16 or fp32, and start over "
                "with `resume False`"
            )
        return found

    def _from_stored_logits(self) -> bool:
        """Answer from logits that an earlier evaluation saved, if one fits; needs neither model nor images."""
        checkpoint = None if self.cfg.model_dir else self._checkpoint_id()
        found = stored_logits(self.folder.path, self._key(checkpoint)) if checkpoint else None
        if found is None or not self.folder.finished():
            return False
        path, logits = found
        if self.accelerator.is_main_process:
            log.info("using the logits of %s", path)
            info = build_info(self.cfg)
            self._note(f"from the logits of {path}")
            result = {**read_result(self.folder.metrics), "notes": self.notes}
            result.pop("val", None)
            save_logits(self.target / "logits.safetensors", logits, self._key(checkpoint))
            self._finish(result, logits, None, info.groups)
        return True

    def _finish(self, result: dict[str, Any], found: Logits, val: Logits | None, groups: dict[str, Tensor]) -> None:
        """Metrics, metrics.json (last, because it says that the rest is there), the table."""
        cfg = self.cfg
        if cfg.max_test_images is not None:
            self._note(f"max_test_images {cfg.max_test_images}: not the whole test set")
        result = {**result, "prec_used": self.prec}
        result["test"] = {**evaluate(found.logits.mean(1), found.labels, groups), "bad_images": found.bad_images}
        if val is not None:
            result["val"] = {**evaluate(val.logits.mean(1), val.labels, groups), "bad_images": val.bad_images}
        if self.target == self.folder.path:
            write_test_scalars(self.folder.events, result["test"])
        write_json(self.target / "metrics.json", result)
        log.info("%s\nrun folder %s", table(result), self.target)

    def _key(self, checkpoint: str | None) -> dict[str, Any]:
        """What the logits depend on."""
        test = {key: value for key, value in values_of(self.cfg, TEST).items() if SCHEMA[key].logits}
        return {"checkpoint": checkpoint, **test}

    def _checkpoint_id(self) -> str | None:
        facts = self.folder.checkpoint / "facts.json"
        if self.cfg.model_dir:
            facts = Path(self.cfg.model_dir) / "checkpoint" / "facts.json"
        if not facts.exists():
            return None
        stored = read_json(facts)
        return f"{stored.get('sha256', '')[:16]}-{stored.get('base')}"

    def _note(self, text: str, warn: bool = False) -> None:
        """Say it, and keep it for metrics.json."""
        self.notes.append(text)
        if warn:
            log.warning("warning: %s", text)
