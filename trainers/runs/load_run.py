"""A finished run's model, loaded again: to evaluate, to export, to look at.

It builds models from configs, as `run` does, so it sees them whole; what it calls does not.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.configs import CfgNode, load_resolved, schema_of
from tailtune.configs.errors import UserError
from tailtune.datasets import DataBundle, DataInfo, build_info
from tailtune.datasets.data_settings import DataFolders
from tailtune.datasets.images.transforms import eval_side
from tailtune.models import build_model, find_backbone, resolve
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone
from tailtune.models.tuners.table import TUNERS
from tailtune.trainers.export import ExportedModel
from tailtune.trainers.export.run_command import command_of
from tailtune.trainers.foreign_checkpoints import load_foreign_checkpoint
from tailtune.trainers.foreign_checkpoints.class_numbering import Numbering
from tailtune.trainers.head_preparation import prepare_head
from tailtune.trainers.methods import Earlier, Method, build_method
from tailtune.trainers.runs.run_folder import FACTS, Checkpoint, RunFolder, counts_of
from tailtune.trainers.storage.checkpoint import check_base, check_classes, fingerprint, load_checkpoint
from tailtune.trainers.storage.manifest import check_file, read_folder, read_json

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class FinishedRun:
    """A run whose checkpoint has been loaded, on every process."""

    cfg: CfgNode
    """Whole, because an ensemble builds other models from it."""
    folder: RunFolder
    method: Method
    data: DataBundle
    accelerator: Accelerator
    base: str
    """`fingerprint` of its encoder."""


class FreshMethod(NamedTuple):
    """A method on its device, of which nothing has been trained or loaded yet."""

    method: Method
    base: str
    """`fingerprint` of its pre-trained model, taken before anything could change it."""


def fresh_method(cfg: CfgNode, info: DataInfo, device: torch.device) -> FreshMethod:
    """Model and method of a resolved config, with pre-trained weights.

    Raises:
        UserError: what `build_model` and `build_method` refuse.
    """
    method = make_method(cfg, info)
    base = fingerprint(method.model)
    return FreshMethod(method.to(device), base)


def load_trained(
    fresh: FreshMethod, cfg: CfgNode, checkpoint: Checkpoint, data: DataBundle, accelerator: Accelerator
) -> Method:
    """Fill a fresh method with what its run has trained, and let go of the text encoder; zero-shot has trained nothing.

    Args:
        cfg: of that run.

    Returns:
        The same method, in eval mode.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    method = fresh.method
    if cfg.zero_shot:  # its head is made of text anew; no checkpoint holds it
        prepare_head(method, data, accelerator, cfg.test_batch_size, cfg.num_workers)
    elif checkpoint.foreign is not None:
        log.info(load_foreign_checkpoint(checkpoint.foreign, method, tuners_of(cfg), cfg.partial, _numbering(cfg)))
    else:
        load_checkpoint(checkpoint.home / "checkpoint", method, data.info.class_names, fresh.base)
    method.model.init = None
    return method.eval()


def trained_method(cfg: CfgNode, checkpoint: Checkpoint, data: DataBundle, accelerator: Accelerator) -> Method:
    """The method of a finished run as it was trained: on the device and in eval mode.

    Raises:
        UserError: as `fresh_method` and `load_trained`.
    """
    return load_trained(fresh_method(cfg, data.info, accelerator.device), cfg, checkpoint, data, accelerator)


def make_method(cfg: CfgNode, info: DataInfo) -> Method:
    """Model and method of a resolved config, untrained."""
    model = build_model(cfg, info.class_names, descriptors=info.descriptors, pixel_stats=(info.mean, info.std))
    return build_method(cfg, model, info)


def outline(cfg: CfgNode) -> Method:
    """The method of a resolved config on the meta device, without weights."""
    info = build_info(cfg)
    with torch.device("meta"):
        return make_method(cfg, info)


def stored_config(home: Path, here: CfgNode) -> CfgNode:
    """The resolved config of the run in a folder; of data that have moved since, where this command finds them."""
    cfg = _config_of(home, here)
    if cfg.data == here.data:
        cfg.defrost()
        cfg.update({key: here[key] for key, entry in schema_of(here).items() if entry.recorded == "command"})
        cfg.freeze()
    return resolve(cfg)


def _config_of(home: Path, here: CfgNode) -> CfgNode:
    """The config that the run in a folder wrote, read with the options that this command's config knows."""
    check_file(home / "config.yaml")
    return load_resolved(home / "config.yaml", schema_of(here))


def outline_of(folder: RunFolder, cfg: CfgNode) -> Method:
    """The method, without weights, of the run whose checkpoint a command evaluates."""
    own = folder.foreign is None and (folder.source / "config.yaml").exists()
    return trained_outline(folder.source, stored_config(folder.source, cfg) if own else cfg)


def trained_outline(home: Path, cfg: CfgNode) -> Method:
    """The method, without weights, that has made the logits of the run in a folder, which has this config."""
    cfg = resolve(cfg)
    info = build_info(cfg, counts_of(home))
    with torch.device("meta"):
        method = make_method(cfg, info)
    if not method.predicts_as_earlier_run:
        return method
    earlier = Path(read_json(home / FACTS).get("after", ""))
    if not (earlier / "config.yaml").is_file():
        raise UserError(
            f"the logits of {home} are those of the run before it (after {cfg.after}), whose folder "
            f"{earlier} is not there; put it back, or repeat the run with `resume False`"
        )
    return trained_outline(earlier, stored_config(earlier, cfg))


def earlier_run(
    folder: Path, data: DataBundle, accelerator: Accelerator, base: str, here: CfgNode, fresh: bool
) -> Earlier:
    """The finished run in a folder, as the method of the run after it sees it.

    Args:
        base: `fingerprint` of the encoder of the run at hand.
        here: resolved config of the run at hand.
    """
    checkpoint = folder / "checkpoint"

    def tensors() -> dict[str, Tensor]:
        found, facts = read_folder(checkpoint)
        check_base(checkpoint, facts, base)
        check_classes(checkpoint, facts, data.info.class_names)
        return found

    def method() -> Method:
        cfg = resolve(_config_of(folder, here))
        if cfg.resolution != here.resolution:
            raise UserError(
                f"after: the earlier run took images of {cfg.resolution} pixels, and this one has {here.resolution}; "
                "give both the same resolution"
            )
        return trained_method(cfg, Checkpoint(folder), data, accelerator).requires_grad_(False)

    return Earlier(fresh, tensors, method)


def _numbering(cfg: CfgNode) -> Numbering | None:
    """None for data whose labels are those of their lists or folders, which everybody numbers alike."""
    return Numbering(cfg.label_field, DataFolders.of(cfg).for_lists()) if cfg.label_field else None


def tuners_of(cfg: CfgNode) -> tuple[str, ...]:
    """Names of our tuners that are on."""
    return tuple(name for name in TUNERS if cfg[name])


def subject_of(cfg: CfgNode, method: Method, class_names: tuple[str, ...], source: str = "") -> ExportedModel:
    """What an export is made of; on the meta device it can be checked.

    Args:
        source: where the weights come from.
    """
    spec = find_backbone(cfg.backbone)
    keys = ("data", "model", "backbone", "pretrained", "interpolation", "classifier", "zero_shot")
    return ExportedModel(
        method=method,
        tuners=tuners_of(cfg),
        partial=cfg.partial,
        class_names=class_names,
        resolution=cfg.resolution,
        zero_shot=cfg.zero_shot,
        arch=spec.arch if isinstance(spec, OpenClipBackbone) else None,
        base=spec.published(cfg.pretrained),
        resize=eval_side(cfg.resolution, cfg.augment),
        interpolation=cfg.interpolation,
        command=command_of(cfg),
        facts={"of": source, **{key: cfg[key] for key in keys}, "tuners": list(tuners_of(cfg)), "peft": cfg.peft},
    )
