"""`predict_images`: labels images that belong to no data set, with the model of a finished run.

The images go through the loader, the transform and the model of an evaluation, so their logits are those of
`test_only`. They are dropped after every batch. Only if a target prior is estimated from the images are the logits kept
until the end, in a file if there are many.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tailtune.configs import CfgNode, Schema, load_configs
from tailtune.configs.errors import UserError
from tailtune.configs.launch_environment import world_size
from tailtune.datasets.build_data import build_info
from tailtune.datasets.data_bundle import DataInfo
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.run_transforms import RunTransforms
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.sources.named_source import BadImage
from tailtune.datasets.view import View
from tailtune.models import resolve
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.evaluation import tta
from tailtune.trainers.evaluation.evaluation_plan import EvaluationPlan
from tailtune.trainers.evaluation.inference import CollectedLogits, Logits
from tailtune.trainers.evaluation.logit_files import VAL_LOGITS, stored_logits
from tailtune.trainers.evaluation.rows import Rows, slices
from tailtune.trainers.evaluation.target_prior import fitted_temperature, target_of
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.methods.base import Method, combine
from tailtune.trainers.prediction.outputs import Outputs, open_outputs
from tailtune.trainers.prediction.predictor import Predictor
from tailtune.trainers.prediction.request import PredictRequest
from tailtune.trainers.prediction.tables import TOP
from tailtune.trainers.processes.interrupts import Interrupt
from tailtune.trainers.runs.load_run import config_of, trained_method, trained_outline
from tailtune.trainers.runs.run_folder import FACTS, Checkpoint, RunFolder, find_checkpoint
from tailtune.trainers.storage.large_tensors import Scratch
from tailtune.trainers.storage.manifest import read_json
from tailtune.trainers.trained_model import info_of_run

log = logging.getLogger("tailtune")


class _Loaded(NamedTuple):
    """A trained method on its device, ready to predict."""

    cfg: CfgNode
    checkpoint: Checkpoint
    method: Method
    info: DataInfo
    device: torch.device


def predict_images(request: PredictRequest, schema: Schema, stdout: BinaryIO) -> int:
    """Label images and write the results. Neither a run folder nor a score is written.

    Args:
        request: what shall be done.
        schema: all options.
        stdout: receives the table if the request names no file.

    Returns:
        Number of images that could not be read.

    Raises:
        UserError: wrong input, or the file system refuses to write; no file is left then.
        KeyboardInterrupt: a signal has stopped it; no file is left either.
        BrokenPipeError: nobody reads the table on standard output any more.
    """
    loaded = _loaded(request, schema)
    predictor = _predictor(loaded)
    view, started = _view(loaded.cfg, request), time.perf_counter()
    scratch = Scratch(request.out and request.out.absolute().parent)
    about = {"run": request.run, "backbone": loaded.cfg.backbone}
    with Interrupt() as interrupt, open_outputs(request, predictor.class_names, stdout, about) as outputs:
        images = _Images(loaded, view, interrupt)
        batches = images.batches(outputs)
        found = _collected(batches, len(request.paths), scratch) if predictor.estimates else None
        used = predictor.frequencies(found, scratch)
        for part in batches if found is None else [found]:
            _write(predictor.log_odds(part, used), part.index, predictor.class_names, outputs)
        if interrupt.requested:
            raise KeyboardInterrupt
    count, bad, seconds = len(request.paths), images.unreadable, time.perf_counter() - started
    log.info("%d images in %.1f s, %.0f a second", count - bad, seconds, count / seconds)
    if bad:
        log.warning("%d of %d images could not be read and are left out", bad, count)
    return bad


class _Images:
    """One pass over the images.

    Args:
        loaded: the method.
        view: the images.
        interrupt: ends the pass after a batch.
    """

    def __init__(self, loaded: _Loaded, view: View, interrupt: Interrupt) -> None:
        self.loaded, self.view, self.interrupt, self.unreadable = loaded, view, interrupt, 0

    @torch.no_grad()
    def batches(self, outputs: Outputs) -> Iterator[Logits]:
        """The logits of the images that can be read, batch by batch: the mean of the experts, [b, 1, C] on the CPU.

        Args:
            outputs: receives the features.

        Raises:
            KeyboardInterrupt: a signal has come; the batch that was being computed is finished before.
        """
        cfg, shown = self.loaded.cfg, sys.stderr is not None and sys.stderr.isatty()
        loader = eval_loader(self.view, cfg.test_batch_size, cfg.num_workers, device=self.loaded.device)
        compute = _compute(self.loaded, outputs.embeddings is not None)
        with ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(total=len(self.view), unit="image", disable=not shown, leave=False, dynamic_ncols=True)
            )
            if shown:
                stack.enter_context(logging_redirect_tqdm([log]))  # lines appear above the bar
            for batch in loader:
                logits, features = compute(batch["image"])
                good = batch["weight"].cpu() > 0
                index = batch["index"].cpu()
                for position in index[~good].tolist():
                    self._report(position)
                if not logits[good].isfinite().all():
                    raise UserError("the logits are not finite: the training of this run diverged")
                if features is not None:
                    outputs.add_features(features[good])
                bar.update(len(index))
                bar.clear()  # the table may go to the same terminal
                labels = torch.zeros(int(good.sum()), dtype=torch.int64)  # nobody knows them
                yield Logits(logits[good].unsqueeze(1), labels, index[good])
                if self.interrupt.requested:
                    raise KeyboardInterrupt

    def _report(self, position: int) -> None:
        """Say why an image cannot be read."""
        self.unreadable += 1
        strict = View(self.view.source, self.view.indices, self.view.transform, self.view.seed)
        try:
            strict.batch([position])
            log.warning("cannot read image %s at first: it was changed meanwhile", self.view.source.location(position))
        except BadImage as problem:
            log.warning("%s", problem)


def _compute(loaded: _Loaded, with_features: bool) -> Callable[[Any], tuple[Tensor, Tensor | None]]:
    """Images of a batch → mean of the experts' logits, fp32 [B, C] on the CPU, and features, fp32 [B, …], or None."""
    cfg, method = loaded.cfg, loaded.method
    expert_logits = tta.averaged(method, cfg.tte_mode, cfg.resolution) if cfg.tte else tta.plain(method)

    def compute(images: Any) -> tuple[Tensor, Tensor | None]:
        if not with_features:
            return combine(expert_logits(images).float().cpu()), None
        features = method.model.features(images)
        logits = method.head_logits(features) if method.can_be_wrapped else expert_logits(images)
        return combine(logits.float().cpu()), features.float().cpu()

    return compute


def _collected(batches: Iterator[Logits], count: int, scratch: Scratch) -> Logits:
    """The logits of all images, in a file if there are many."""
    collected = CollectedLogits(count, scratch, summarised=False)
    for batch in batches:
        if collected.rows is None:
            collected.reserve(batch.logits.shape[1:])
        collected.add(batch.logits[:], batch.labels, batch.index)
    found = collected.all()
    if found is None or not len(found.index):
        raise UserError("target_prior: no image could be read, so that class frequencies cannot be estimated")
    return found


def _write(log_odds: Rows, index: Tensor, class_names: Sequence[str], outputs: Outputs) -> None:
    """Write the most probable classes of n images, a few images at a time."""
    for part in slices(log_odds):
        probabilities, labels = log_odds[part].softmax(1).topk(min(TOP, len(class_names)))
        pairs = zip(labels.tolist(), probabilities.tolist(), strict=True)
        top = [[(class_names[label], p) for label, p in zip(*row, strict=True)] for row in pairs]
        outputs.add(index[part].tolist(), top)


def _view(cfg: CfgNode, request: PredictRequest) -> View:
    """The images, seen as an evaluation sees them."""
    count = len(request.paths)
    source = FileSource(Path(), request.paths, np.zeros(count, dtype=np.int64))
    return View(source, np.arange(count), RunTransforms.of(cfg).test, cfg.seed, skip_bad=True)


def _loaded(request: PredictRequest, schema: Schema) -> _Loaded:
    """Load the trained method, as an evaluation does."""
    if world_size() > 1:
        raise UserError("predict runs in one process: start it without accelerate launch")
    home, foreign = find_checkpoint(request.run, "predict:")
    cfg, checkpoint = _config(request, home, foreign, schema), Checkpoint(home, foreign)
    if request.embeddings is not None and cfg.tte:
        raise UserError("--embeddings are of one view of an image; leave it out, or set tte to False")
    for warning in EvaluationPlan.of(cfg).warnings:
        log.warning("warning: %s", warning)
    info = build_info(cfg) if foreign else info_of_run(cfg, read_json(home / FACTS))
    device = make_accelerator(Devices.of(cfg)).device
    method = trained_method(cfg, checkpoint, info, device)
    tta.prepare(method, cfg.test_prec)
    return _Loaded(cfg, checkpoint, method, info, device)


def _config(request: PredictRequest, home: Path, foreign: ForeignCheckpoint | None, schema: Schema) -> CfgNode:
    """The resolved config of the run, with the options of the request, and without what needs the data of the run."""
    if foreign is None:
        if request.data or request.model:
            raise UserError(f"{home} is a run, which has its own configs: leave out -d and -m")
        cfg = config_of(home, schema, request.options)
    elif request.data and request.model:
        cfg = load_configs(request.data, request.model, request.options, schema)[-1]
    else:
        raise UserError(
            f"{foreign.path} is a checkpoint of another project, which does not say with which options it was trained: "
            "add -d DATA -m MODEL, and options of the training as --option KEY VALUE"
        )
    for key in ("ensemble", "adapt"):
        if cfg[key] is not None:
            log.warning("warning: %s %s needs the data of the run; the model predicts alone", key, cfg[key])
    cfg = resolve(cfg)
    cfg.defrost()
    cfg.ensemble, cfg.adapt, cfg.test_train = None, None, False
    cfg.freeze()
    return cfg


def _predictor(loaded: _Loaded) -> Predictor:
    """Find the temperature and the target prior."""
    cfg, method, info = loaded.cfg, loaded.method, loaded.info
    computes = trained_outline(loaded.checkpoint.home, cfg) if method.predicts_as_earlier_run else method
    prior = computes.assumed_prior().cpu().mean(0).log_softmax(0)
    val = _stored_val(loaded)
    if val is None and cfg.calibrate:
        log.info("the probabilities are not calibrated: the run has no logits of validation images for these options")
    plan = EvaluationPlan.of(cfg).target
    if plan is not None and plan.name == "known":
        raise UserError("target_prior known reads labels, which these images do not have; estimate reads the images")
    if plan is not None and plan.name == "estimate_bbse" and val is None:
        raise UserError("target_prior estimate_bbse needs a run with validation images (val_per_class); try estimate")
    return Predictor(
        class_names=info.class_names,
        train=method.log_prior.exp().cpu(),
        prior=prior.float(),
        temperature=fitted_temperature(val, prior) if val is not None and cfg.calibrate else 1.0,
        val=val,
        target=None if plan is None else target_of(plan, info, info.class_names),
        estimates=plan is not None and plan.name.startswith("estimate"),
        batch_size=cfg.adapt_batch_size,
        seed=cfg.adapt_seed,
    )


def _stored_val(loaded: _Loaded) -> Logits | None:
    """The logits of validation images that an evaluation of this checkpoint with the same options has stored."""
    cfg, (home, foreign) = loaded.cfg.clone(), (loaded.checkpoint.home, loaded.checkpoint.foreign)
    options = EvaluationPlan.of(cfg).options_of_logits
    cfg.defrost()
    cfg.model_dir, cfg.test_only = str(home), True
    folder = RunFolder(cfg)
    kept = None if foreign else folder.kept()
    if kept is None or "val" not in kept.records:
        return None
    key = {"checkpoint": folder.checkpoint_id(), "images": kept.records["val"].fingerprint, **options}
    stored = stored_logits(home, key, VAL_LOGITS)
    return stored and stored[1]
