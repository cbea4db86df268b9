"""METHODS: name → training method. Each method has its own file in this folder and one line in the table."""

from dataclasses import replace

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError, lookup
from tailtune.configs.option import options_from
from tailtune.datasets.data_bundle import DataInfo
from tailtune.models import ClassificationModel
from tailtune.trainers.losses import LOSSES, Loss
from tailtune.trainers.methods.balpoe import BalPoE
from tailtune.trainers.methods.base import Earlier, Method, Objective
from tailtune.trainers.methods.batchformer import BatchFormer
from tailtune.trainers.methods.decouple import Normalised, Retrained, WeightScaling
from tailtune.trainers.methods.dirmixe import DirMixE
from tailtune.trainers.methods.distill import Distill
from tailtune.trainers.methods.glmc import GLMC
from tailtune.trainers.methods.h2t import H2T
from tailtune.trainers.methods.lgla import LGLA
from tailtune.trainers.methods.mixup import Mixup
from tailtune.trainers.methods.reslt import ResLT
from tailtune.trainers.methods.ride import Ride
from tailtune.trainers.methods.ride_expert_assignment import ExpertAssignment
from tailtune.trainers.methods.sade import Sade
from tailtune.trainers.methods.wrapper import Wrapper

__all__ = ["METHODS", "Earlier", "Method", "build_method"]

METHODS: dict[str, type[Method]] = {
    "classify": Method,  # zero-shot, head only, PEFT, full fine-tuning: one model, one loss
    "ride": Ride,
    "distill": Distill,
    "sade": Sade,
    "dirmixe": DirMixE,
    "balpoe": BalPoE,
    "lgla": LGLA,
    "ride_ea": ExpertAssignment,
    "batchformer": BatchFormer,
    "crt": Retrained,
    "lws": WeightScaling,
    "tau_norm": Normalised,
    "mixup": Mixup,
    "h2t": H2T,
    "reslt": ResLT,
    "glmc": GLMC,
}


def build_method(cfg: CfgNode, model: ClassificationModel, info: DataInfo) -> Method:
    """Build the method of a config around a model.

    Args:
        cfg: the resolved config.
        model: the model that the method trains.
        info: properties of the training data.

    Raises:
        UserError: an unknown method or loss, or options that do not fit the method.
    """
    objective = Objective(
        class_counts=info.class_counts,
        loss=_loss(cfg),
        drw_epoch=cfg.drw_epoch,
        sampler=cfg.sampler,
        epochs=_epochs(cfg, int(info.class_counts.sum())),
        seed=cfg.seed,
    )
    method = _make(cfg, cfg.method, "method", model, objective)
    if model.samples_classes and (type(method) is not Method or objective.loss.compares_all):
        raise UserError(
            "textclassifier.samples leaves out logits of classes, which works with method classify and losses of a "
            f"softmax, not with method {cfg.method} and loss_type {cfg.loss_type}; leave it out"
        )
    if cfg.num_epochs and not cfg.zero_shot and not method.param_groups():
        raise UserError(f"method {cfg.method} trains nothing here; set num_epochs 0")
    if cfg.pair_sampler and not method.takes_image_pairs:
        raise UserError(
            f"pair_sampler {cfg.pair_sampler}: method {cfg.method} takes single images here; set pair_sampler none"
        )
    if method.takes_image_pairs and not cfg.pair_sampler:
        raise UserError(f"method {cfg.method} takes two images at a time: choose the second by `pair_sampler shuffle`")
    return method


def _loss(cfg: CfgNode) -> Loss:
    """The loss of a config, with its options."""
    loss = lookup(LOSSES, cfg.loss_type, "loss_type")
    if loss.options is None:
        return loss
    return replace(loss, options=options_from(type(loss.options), cfg, cfg.loss_type))


def _epochs(cfg: CfgNode, images: int) -> int:
    """Number of epochs that a run on `images` training images begins; `max_steps` can end the last one early."""
    per_epoch = -(-images // cfg.batch_size)
    begun = cfg.num_epochs if cfg.max_steps is None else -(-cfg.max_steps // per_epoch)
    return 0 if cfg.zero_shot else min(cfg.num_epochs, begun)


def _make(
    cfg: CfgNode, name: str, key: str, model: ClassificationModel, objective: Objective, around: tuple[str, ...] = ()
) -> Method:
    """Build a method and the inner method that it wraps, around one model; `around` names the methods that wrap it."""
    kind = lookup(METHODS, name, key)
    if name in around:
        raise UserError(f"{key} {name}: method {name} would wrap itself; name another")
    if kind.continues_from_earlier_run and not cfg.after:
        raise UserError(f"method {name} continues an earlier run: name that one's model config with `after`")
    if kind.trains_new_head and model.text is not None:
        where = " in both runs" if kind.continues_from_earlier_run else ""
        raise UserError(
            f"{key} {name} trains a classifier of its own, and classifier {cfg.classifier} consists of text features; "
            f"choose another classifier{where}"
        )
    options = kind.Options(**cfg.get(name, {}))
    if not issubclass(kind, Wrapper):
        return kind(model, objective, options)
    inner = _make(cfg, options.inner, f"{name}.inner", model, objective, (*around, name))
    if not inner.can_be_wrapped:
        raise UserError(
            f"{name}.inner {options.inner}: it does more with the model than {name} would let it; choose another "
            "method, such as ride"
        )
    return kind(model, objective, options, inner)
