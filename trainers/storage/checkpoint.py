"""Writes and loads checkpoints, which hold the trained tensors of a run. Checks them before they are loaded."""

import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tailtune
from tailtune.configs.errors import UserError
from tailtune.models import ClassificationModel
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.staged_module import StagedModule
from tailtune.trainers.storage.atomic_io import Digest
from tailtune.trainers.storage.tensor_files import read_folder, write_folder

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "peft", "accelerate", "safetensors")
"""Packages whose versions are recorded with every checkpoint."""


def trained_state(module: StagedModule) -> dict[str, Tensor]:
    """The tensors that a checkpoint holds.

    Args:
        module: a method, or a model.

    Returns:
        Name → tensor: the parameters that are trained or that an earlier run trained, and the buffers of the model.
        Buffers of the pre-trained network that never change are left out.
    """
    parameters = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or name in module.frozen_trained
    }
    encoders = (submodule for submodule in module.modules() if isinstance(submodule, Encoder))
    frozen = {id(buffer) for encoder in encoders for buffer in encoder.frozen_buffers()}
    persistent = module.state_dict()
    buffers = {
        name: buffer for name, buffer in module.named_buffers() if name in persistent and id(buffer) not in frozen
    }
    return {name: tensor.detach() for name, tensor in {**parameters, **buffers}.items()}


def fingerprint(model: ClassificationModel) -> str:
    """An identifier of the base model, which is stored with every checkpoint. Compute it before training starts.

    Args:
        model: the model, as it was built.

    Returns:
        A digest of the pre-trained encoder. If the head is computed from text, a dot and a digest of the text encoder
        and the projection follow.
    """
    encoder_digest = _digest(model.encoder.pretrained_state())
    if model.text_encoder is None:
        return encoder_digest
    projection = model.text_encoder.projection
    if projection is None:  # the image encoder, or its network, has the projection
        projection = model.encoder.projection
    state = {**model.text_encoder.weights(), **({} if projection is None else {"projection": projection})}
    return f"{encoder_digest}.{_digest(state)}"


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(state.items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    """Package → version, for TailTune and PACKAGES."""
    return {"tailtune": tailtune.__version__, **{name: version(name) for name in PACKAGES}}


def save_checkpoint(folder: Path, method: StagedModule, facts: dict[str, Any]) -> dict[Path, Digest]:
    """Write the trained tensors of a run.

    Args:
        folder: the folder to write.
        method: the trained method.
        facts: the content of `facts.json` besides the package versions.

    Returns:
        The digests of the files.
    """
    return write_folder(folder, trained_state(method), {**facts, "packages": package_versions()})


def load_checkpoint(folder: Path, method: StagedModule, class_names: Sequence[str], base: str) -> None:
    """Fill a method from a checkpoint; every tensor must fit.

    Args:
        folder: the folder of the checkpoint.
        method: the method, as it was built.
        class_names: names of the classes in the present data, in label order.
        base: `fingerprint` of the present model.

    Raises:
        UserError: the checkpoint is damaged, or belongs to another base model, tuner, head or set of classes; the
            message says which.
    """
    tensors, facts = read_folder(folder)
    check_base(folder, facts, base)
    copy_state(method, tensors, str(folder), "give the options that it was trained with")
    check_classes(folder, facts, class_names)


def check_base(folder: Path, facts: dict[str, Any], base: str) -> None:
    """Check that a checkpoint was trained on the present base model.

    Text encoders are compared only if both fingerprints contain one. Some heads need no text encoder, and older
    checkpoints do not record it.

    Args:
        folder: the folder of the checkpoint.
        facts: content of its `facts.json`.
        base: `fingerprint` of the present model.

    Raises:
        UserError: the base models differ.
    """
    if not {"base", "class_names"} <= facts.keys():
        raise UserError(f"{folder} is damaged: facts.json names no base model or classes; train again")
    encoders, *text_encoders = zip(str(facts["base"]).split("."), base.split("."), strict=False)
    if len(set(encoders)) > 1:
        raise UserError(
            f"{folder} was trained on another base model than the one at hand; give the backbone, pretrained, "
            "resolution, num_experts and, where that began at random, seed that it was trained with"
        )
    if any(stored != current for stored, current in text_encoders):
        raise UserError(
            f"{folder} was trained with the same image encoder and another text encoder or projection than the one at "
            "hand; give the pretrained that it was trained with"
        )


def check_classes(folder: Path, facts: dict[str, Any], class_names: Sequence[str]) -> None:
    """Check that a checkpoint was trained on the present classes, in the same order.

    Args:
        folder: the folder of the checkpoint.
        facts: content of its `facts.json`.
        class_names: names of the classes in the present data, in label order.

    Raises:
        UserError: the classes differ; the message names the first difference.
    """
    for stored, current in zip_longest(facts["class_names"], class_names):
        if stored != current:
            name = current if stored is None else stored
            raise UserError(
                f"{folder} was trained on other classes: '{name}' is not at its place in this data set; give it the "
                "class names of the training, or train again with `resume False`"
            )


@torch.no_grad()
def copy_state(method: StagedModule, tensors: dict[str, Tensor], where: str, remedy: str) -> None:
    """Copy tensors into all trained parameters and buffers of a method.

    Args:
        method: the method to fill.
        tensors: name → tensor, as `trained_state` names them.
        where: the source of the tensors, for messages.
        remedy: what the user can do, for messages.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    current = trained_state(method)
    check_fit(current, tensors, where, remedy)
    for name, target in current.items():
        target.copy_(tensors[name])


def check_fit(current: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str, remedy: str) -> None:
    """Check that tensors have the same names and shapes as the tensors of a model.

    Args:
        current: name → tensor of the model.
        tensors: name → tensor to load.
        where: the source of the tensors, for messages.
        remedy: what the user can do, for messages.

    Raises:
        UserError: names the tensors that are missing, unexpected or of another shape.
    """
    shared = current.keys() & tensors.keys()
    problems = [
        f"{len(names)} tensors {kind} ({', '.join(sorted(names)[:2])}{', …' if len(names) > 2 else ''})"
        for kind, names in (
            ("missing", current.keys() - tensors.keys()),
            ("unexpected", tensors.keys() - current.keys()),
            ("of another shape", {name for name in shared if current[name].shape != tensors[name].shape}),
        )
        if names
    ]
    if problems:
        raise UserError(f"{where} is of another tuner, head or class count: {'; '.join(problems)}; {remedy}")


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix; the prefix is removed from their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
