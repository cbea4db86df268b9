"""Loads the model of a finished run, in order to evaluate it, export it or analyse its features.

The functions of this module build models, so they take a whole config. The functions that they call take single values.
"""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from tailtune.configs import CfgNode, Schema, load_resolved, schema_of, with_values
from tailtune.configs.errors import UserError
from tailtune.configs.option import options_from, value_of
from tailtune.datasets.build_data import build_info
from tailtune.datasets.data_bundle import DataBundle, DataInfo
from tailtune.datasets.data_settings import DataFolders
from tailtune.datasets.images.transforms import eval_side
from tailtune.models import build_model, find_backbone, resolve
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone
from tailtune.models.text_mode import classifies_by_text
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.text_tuners import TEXT_TUNERS
from tailtune.trainers.export import ExportedModel
from tailtune.trainers.export.run_command import command_of
from tailtune.trainers.feature_store import TextFeatures
from tailtune.trainers.foreign_checkpoints.class_numbering import Numbering
from tailtune.trainers.foreign_checkpoints.load_checkpoint import load_foreign_checkpoint
from tailtune.trainers.head_preparation import text_context
from tailtune.trainers.methods import Earlier, Method, build_method
from tailtune.trainers.methods.fixed_texts import with_texts_as_weights
from tailtune.trainers.runs.merged_runs import MergeOptions, folders, merged
from tailtune.trainers.runs.run_folder import FACTS, Checkpoint, RunFolder
from tailtune.trainers.storage.checkpoint import check_base, check_classes, fingerprint, load_checkpoint
from tailtune.trainers.storage.manifest import check_file, read_json
from tailtune.trainers.storage.tensor_files import read_folder

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class FinishedRun:
    """A run whose checkpoint has been loaded, on every process."""

    cfg: CfgNode
    """The whole config, because an ensemble builds further models from it."""
    folder: RunFolder
    method: Method
    data: DataBundle
    accelerator: Accelerator
    base: str
    """`fingerprint` of the pre-trained model."""


class FreshMethod(NamedTuple):
    """A method on its device, before anything is trained or loaded."""

    method: Method
    base: str
    """`fingerprint` of the pre-trained model, computed before training or loading changes it."""


def fresh_method(cfg: CfgNode, info: DataInfo, device: torch.device) -> FreshMethod:
    """Build the model with its pre-trained weights, and the method.

    Args:
        cfg: resolved config.
        info: facts about the data.
        device: device to which the method is moved.

    Raises:
        UserError: `build_model` or `build_method` refuses the config.
    """
    method = make_method(cfg, info)
    base = fingerprint(method.model)
    return FreshMethod(method.to(device), base)


def load_trained(fresh: FreshMethod, cfg: CfgNode, checkpoint: Checkpoint, class_names: tuple[str, ...]) -> Method:
    """Load the trained tensors of a run into a fresh method. The text encoder is released afterwards.

    For `zero_shot`, the head is computed from text, because no checkpoint holds it. No image is read.

    Args:
        fresh: the untrained method.
        cfg: resolved config of the run that was trained.
        checkpoint: where the trained tensors are.
        class_names: names of the classes in label order; they have to be those of the checkpoint.

    Returns:
        The same method, in eval mode.

    Raises:
        UserError: the checkpoint is damaged or belongs to another model.
    """
    method = fresh.method
    if cfg.zero_shot:  # the head is computed from text; no checkpoint holds it
        method.eval()
        if checkpoint.foreign is None and (checkpoint.home / FACTS).exists():
            check_classes(checkpoint.home / "checkpoint", read_json(checkpoint.home / FACTS), class_names)
        device, texts = method.log_prior.device, TextFeatures.of(cfg)
        method.prepare(text_context(method.model, len(class_names), cfg.seed, device, texts))
    elif checkpoint.foreign is not None:
        log.info(load_foreign_checkpoint(checkpoint.foreign, method, tuners_of(cfg), _numbering(cfg)))
    else:
        load_checkpoint(checkpoint.home / "checkpoint", method, class_names, fresh.base)
    method.model.init = None
    return method.eval()


def trained_method(cfg: CfgNode, checkpoint: Checkpoint, info: DataInfo, device: torch.device) -> Method:
    """Build the method of a finished run and load its trained tensors.

    Args:
        cfg: resolved config of the run.
        checkpoint: where the trained tensors are.
        info: facts about the data.
        device: device to which the method is moved.

    Returns:
        The method, on the device and in eval mode.

    Raises:
        UserError: as `fresh_method` and `load_trained`.
    """
    return load_trained(fresh_method(cfg, info, device), cfg, checkpoint, info.class_names)


def make_method(cfg: CfgNode, info: DataInfo) -> Method:
    """Build the untrained method of a resolved config, with its model."""
    model = build_model(cfg, info.class_names, descriptors=info.descriptors, pixel_stats=(info.mean, info.std))
    return build_method(cfg, model, info)


def outline(cfg: CfgNode) -> Method:
    """Build the method of a resolved config on the meta device, without weights."""
    info = build_info(cfg)
    with torch.device("meta"):
        return make_method(cfg, info)


def stored_config(home: Path, here: CfgNode) -> CfgNode:
    """The resolved config of the run in a folder.

    The data may have been moved since the run. If both configs use the same data set, paths are taken from `here`.

    Args:
        home: folder of the run.
        here: config of the present command.
    """
    cfg = config_of(home, schema_of(here))
    if cfg.data == here.data:
        recorded = {key: here[key] for key, entry in schema_of(here).items() if entry.recorded == "command"}
        cfg = with_values(cfg, **recorded)
    return resolve(cfg)


def config_of(home: Path, schema: Schema, pairs: Sequence[str] = ()) -> CfgNode:
    """The config that a run has stored.

    Args:
        home: folder of the run.
        schema: all options.
        pairs: `KEY VALUE KEY VALUE …`, options of the evaluation or of the machine that replace the stored ones.

    Raises:
        UserError: the file is missing or damaged, or has an option that this version does not have.
    """
    check_file(home / "config.yaml")
    return load_resolved(home / "config.yaml", schema, pairs)


def differently_held(cfg: CfgNode, other: CfgNode, parts: Collection[str]) -> Iterator[tuple[str, Any, Any]]:
    """Options that change parts of a model without a change of its tensors (`Key.held_with`), where two configs differ.

    Args:
        cfg, other: resolved configs.
        parts: of `encoder`, `head` and `texts`.

    Returns:
        Name of the option, and its values in both configs.
    """
    for key, entry in schema_of(cfg).items():
        if entry.held_with in parts and (here := value_of(cfg, key)) != (there := value_of(other, key)):
            yield key, here, there


def check_same_network(cfg: CfgNode, home: Path, what: str) -> None:
    """Check that the weights of another run can be averaged with those of a model. Tensors are not compared.

    Args:
        cfg: resolved config of the model.
        home: folder of the other run.
        what: the option that names it.

    Raises:
        UserError: an option differs that changes what is computed with the same tensors.
    """
    parts = ("encoder", "head", *(["texts"] if classifies_by_text(cfg) else []))
    for key, here, there in differently_held(cfg, resolve(config_of(home, schema_of(cfg))), parts):
        raise UserError(
            f"{what}: {home} was trained with {key} {there}, and not {here}, so its weights mean something else; name "
            "runs of equal networks"
        )


def earlier_run(
    folder: Path, data: DataBundle, accelerator: Accelerator, base: str, here: CfgNode, fresh: bool
) -> Earlier:
    """Give the method of the present run access to a finished earlier run (`after`).

    Args:
        folder: folder of the earlier run.
        data: the data of the present run.
        accelerator: gives the device.
        base: `fingerprint` of the pre-trained model of the present run.
        here: resolved config of the present run.
        fresh: True if the present run starts; False if it resumes.
    """

    def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
        tensors_by_name, facts = read_folder(checkpoint)
        check_base(checkpoint, facts, base)
        check_classes(checkpoint, facts, data.info.class_names)
        return tensors_by_name

    def tensors() -> dict[str, Tensor]:
        options = options_from(MergeOptions, here)
        for other in folders(options):
            check_same_network(resolve(config_of(folder, schema_of(here))), other, "merge_runs")
        return merged(tensors_of(folder / "checkpoint"), options, tensors_of)

    def method() -> Method:
        cfg = resolve(config_of(folder, schema_of(here)))
        if cfg.resolution != here.resolution:
            raise UserError(
                f"after: the earlier run took images of {cfg.resolution} pixels, and this one has {here.resolution}; "
                "give both the same resolution"
            )
        return trained_method(cfg, Checkpoint(folder), data.info, accelerator.device).requires_grad_(False)

    return Earlier(fresh, tensors, method)


def _numbering(cfg: CfgNode) -> Numbering | None:
    """The class numbering of iNaturalist; None for other data, whose classes all projects number in the same way."""
    return Numbering(cfg.label_field, DataFolders.of(cfg).for_lists()) if cfg.label_field else None


def tuners_of(cfg: CfgNode) -> tuple[str, ...]:
    """Names of the tuners of TUNERS that are enabled."""
    return tuple(name for name in TUNERS if cfg[name])


def subject_of(
    cfg: CfgNode, method: Method, class_names: tuple[str, ...], source: str = "", **more: Any
) -> ExportedModel:
    """Collect the model and the facts that an export needs.

    A method on the meta device is enough to check whether the export is possible.

    Args:
        cfg: resolved config of the run.
        method: the method with its model.
        class_names: names of the classes, in label order.
        source: where the weights come from, in words.
        more: further fields of `ExportedModel`, which are known of a finished run.
    """
    spec = find_backbone(cfg.backbone)
    tuners = [*tuners_of(cfg), *(name for name in TEXT_TUNERS if cfg[name])]
    keys = ("data", "model", "backbone", "pretrained", "interpolation", "classifier", "zero_shot")
    return ExportedModel(
        method=with_texts_as_weights(method),
        tuners=tuners_of(cfg),
        class_names=class_names,
        resolution=cfg.resolution,
        zero_shot=cfg.zero_shot,
        arch=spec.arch if isinstance(spec, OpenClipBackbone) else None,
        base=spec.published(cfg.pretrained),
        resize=eval_side(cfg.resolution, cfg.augment, cfg.crop_margin),
        interpolation=cfg.interpolation,
        command=command_of(cfg),
        facts={"of": source, **{key: cfg[key] for key in keys}, "tuners": tuners, "peft": cfg.peft},
        half=cfg.export_fp16,
        **more,
    )
