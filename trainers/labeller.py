"""`Labeller`: the model of a run, ready to label images that belong to no data set. `predict`, `serve` and Python share
it.

The images go through the loader, the transform and the model of an evaluation, so their logits are those of
`test_only`.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tailtune.configs import CfgNode, Schema, load_configs, schema_of, with_values
from tailtune.configs.errors import UserError
from tailtune.configs.key import TRAIN
from tailtune.configs.launch_environment import world_size
from tailtune.configs.unread_options import refuse_unread_options
from tailtune.datasets.build_data import build_info
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.run_transforms import RunTransforms
from tailtune.datasets.sources.image_sources import Source
from tailtune.datasets.sources.named_source import BadImage
from tailtune.datasets.view import View
from tailtune.models import resolve
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.evaluation import tta
from tailtune.trainers.evaluation.evaluation_plan import EvaluationPlan
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.logit_files import VAL_LOGITS, stored_logits
from tailtune.trainers.evaluation.target_prior import fitted_temperature, target_of
from tailtune.trainers.foreign_checkpoints.checkpoint_file import ForeignCheckpoint
from tailtune.trainers.methods.base import Method, combine
from tailtune.trainers.prediction.predictor import Predictor
from tailtune.trainers.prediction.request import ModelRequest
from tailtune.trainers.runs.class_prior import prior_of
from tailtune.trainers.runs.load_run import config_of, trained_method
from tailtune.trainers.runs.run_folder import FACTS, Checkpoint, RunFolder, find_checkpoint
from tailtune.trainers.storage.manifest import read_json
from tailtune.trainers.trained_model import info_of_run

log = logging.getLogger("tailtune")

READ = frozenset(
    {
        *("tte", "tte_mode", "expand", "randaug_times", "crop_margin", "test_prec"),
        *("target_prior", "calibrate", "adapt_batch_size", "adapt_seed"),
        *("shift_order", "shift_max", "shift_factors", "shift_files", "shift_seed"),
        *("root", "lists", "text_memory", "gpu", "num_workers", "test_batch_size"),
        *("feature_cache", "feature_cache_dir", "feature_cache_gb"),
    }
)
"""The options of an evaluation or of the machine that change how images are labelled. A request may set only these."""


class Computed(NamedTuple):
    """What the model has computed for a batch of images."""

    logits: Logits
    """Of the images that can be read: the mean of the experts, fp32 [b, 1, C] on the CPU."""
    features: Tensor | None
    """Of the same images, fp32 [b, …] on the CPU; None if they were not asked for."""
    unreadable: list[int]
    """Positions of the other images in the view."""


def config_to_label(request: ModelRequest, schema: Schema, command: str) -> tuple[CfgNode, Checkpoint]:
    """The config with which a run labels images, and its checkpoint. Nothing is loaded yet.

    Args:
        request: names the run and the options.
        schema: all options.
        command: the word on the command line, for messages.

    Returns:
        The resolved config, without what needs the data of the run; the checkpoint.

    Raises:
        UserError: there is no such run, or an option is wrong.
    """
    if world_size() > 1:
        raise UserError(f"{command} runs in one process: start it without accelerate launch")
    home, foreign = find_checkpoint(request.run, f"{command}:")
    cfg = _config(request, home, foreign, schema)
    _refuse_unread(cfg, command)
    plan = EvaluationPlan.of(cfg)
    for warning in plan.warnings:
        log.warning("warning: %s", warning)
    if plan.target is not None and plan.target.name == "known":
        raise UserError("target_prior known reads labels, which these images do not have; name the frequencies")
    return cfg, Checkpoint(home, foreign)


class Labeller:
    """A trained method on its device, and how its logits become probabilities.

    Args:
        cfg, checkpoint: what `config_to_label` has returned.
        method: the trained method, if it has been loaded and prepared for `test_prec` already.

    Raises:
        UserError: a file is damaged, or the options need something that the run does not have.
    """

    def __init__(self, cfg: CfgNode, checkpoint: Checkpoint, method: Method | None = None) -> None:
        self.cfg, self.checkpoint = cfg, checkpoint
        self.info = build_info(cfg) if checkpoint.foreign else info_of_run(cfg, read_json(checkpoint.home / FACTS))
        if method is None:
            method = trained_method(cfg, checkpoint, self.info, make_accelerator(Devices.of(cfg)).device)
            tta.prepare(method, cfg.test_prec)
        self.method, self.device = method, method.log_prior.device
        self.predictor = self._predictor()

    def view(self, source: Source) -> View:
        """Images, seen as an evaluation sees them. Unreadable ones are skipped.

        Args:
            source: the images.
        """
        return View(source, np.arange(len(source)), RunTransforms.of(self.cfg).test, self.cfg.seed, skip_bad=True)

    @torch.no_grad()
    def batches(self, view: View, num_workers: int | None, with_features: bool = False) -> Iterator[Computed]:
        """Compute the logits of images, batch by batch.

        Args:
            view: the images, from `view`.
            num_workers: processes that decode them; None chooses the number.
            with_features: whether the features are wanted, too.

        Raises:
            UserError: the logits are not finite, or a worker process has failed.
        """
        for batch in eval_loader(view, self.cfg.test_batch_size, num_workers, device=self.device):
            logits, features = self._compute(batch["image"], with_features)
            good, index = batch["weight"].cpu() > 0, batch["index"].cpu()
            if not logits[good].isfinite().all():
                raise UserError("the logits are not finite: the training of this run diverged")
            labels = torch.zeros(int(good.sum()), dtype=torch.int64)  # nobody knows them
            found = Logits(logits[good].unsqueeze(1), labels, index[good])
            yield Computed(found, None if features is None else features[good], index[~good].tolist())

    def _compute(self, images: Any, with_features: bool) -> tuple[Tensor, Tensor | None]:
        """Images of a batch → mean of the experts' logits, fp32 [B, C] on the CPU, and features, fp32 [B, …]."""
        cfg, method = self.cfg, self.method
        expert_logits = tta.averaged(method, cfg.tte_mode, cfg.resolution) if cfg.tte else tta.plain(method)
        if not with_features:
            return combine(expert_logits(images).float().cpu()), None
        features = method.model.features(images)
        logits = method.head_logits(features) if method.can_be_wrapped else expert_logits(images)
        return combine(logits.float().cpu()), features.float().cpu()

    def _predictor(self) -> Predictor:
        """Find the temperature and the target prior."""
        cfg, method, info = self.cfg, self.method, self.info
        val, plan = self._stored_val(), EvaluationPlan.of(cfg).target
        reads_prior = plan is not None or (val is not None and cfg.calibrate)
        stored = reads_prior and self.checkpoint.foreign is None
        assumed = prior_of(self.checkpoint.home, cfg, info).assumed if stored else method.assumed_prior()
        prior = assumed.cpu().mean(0).log_softmax(0)
        if val is None and cfg.calibrate:
            log.info(
                "the probabilities are not calibrated: the run has no logits of validation images for these options"
            )
        if plan is not None and plan.name == "estimate_bbse" and val is None:
            raise UserError(
                "target_prior estimate_bbse needs a run with validation images (val_per_class); try estimate"
            )
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

    def _stored_val(self) -> Logits | None:
        """The logits of validation images that an evaluation of this checkpoint with the same options has stored."""
        home, foreign = self.checkpoint.home, self.checkpoint.foreign
        options = EvaluationPlan.of(self.cfg).options_of_logits
        folder = RunFolder(with_values(self.cfg, model_dir=str(home), test_only=True))
        kept = None if foreign else folder.kept()
        if kept is None or "val" not in kept.records:
            return None
        key = {"checkpoint": folder.checkpoint_id(), "images": kept.records["val"].fingerprint, **options}
        stored = stored_logits(home, key, VAL_LOGITS)
        return stored and stored[1]


def _refuse_unread(cfg: CfgNode, command: str) -> None:
    """Raise a `UserError` if the request sets an option that changes no label."""
    schema = schema_of(cfg)
    for key in cfg.given or ():
        if schema[key].cls != TRAIN and key not in READ:
            raise UserError(f"{command}: {key} changes nothing in the labels of images: leave it out")
    refuse_unread_options(cfg)


def problem_of(view: View, position: int) -> str:
    """Why an image cannot be read.

    Args:
        view: the images, which may skip unreadable ones.
        position: position of the image in the view.
    """
    strict = View(view.source, view.indices, view.transform, view.seed)
    try:
        strict.batch([position])
    except BadImage as problem:
        return str(problem)
    return f"cannot read image {view.source.location(position)} at first: it was changed meanwhile"


def _config(request: ModelRequest, home: Path, foreign: ForeignCheckpoint | None, schema: Schema) -> CfgNode:
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
    return with_values(resolve(cfg), ensemble=None, adapt=None, test_train=False)
