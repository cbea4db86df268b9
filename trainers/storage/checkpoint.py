"""What of a run is kept: the checkpoint (what trained) and the states (what resuming needs)."""

import hashlib
import logging
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models import ClassificationModel
from tailtune.models.backbones.encoder import Encoder, StagedModule
from tailtune.trainers.storage.atomic_io import Digest, remove_folder, temporary_of, write_folder
from tailtune.trainers.storage.manifest import is_taken_down, read_folder

PACKAGES = ("torch", "torchvision", "open_clip_torch", "timm", "peft", "accelerate", "safetensors", "torchmetrics")
KEEP = 2
"""States kept: the newest may be damaged."""

Seal = Callable[[dict[Path, Digest], Sequence[Path]], None]

log = logging.getLogger("tailtune")


def trained_state(module: StagedModule) -> dict[str, Tensor]:
    """What a checkpoint holds, by name: every parameter that trains, or that an earlier run trained, and every buffer
    of the model that did not come with the pre-trained network, or that training changes."""
    trains = {
        name: parameter.detach()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad or name in module.frozen_trained
    }
    untouched = {id(each) for host in module.modules() if isinstance(host, Encoder) for each in host.untouched()}
    persistent = module.state_dict()
    buffers = {name: each for name, each in module.named_buffers() if name in persistent and id(each) not in untouched}
    return trains | {name: each.detach() for name, each in buffers.items()}


def fingerprint(model: ClassificationModel) -> str:
    """Names the base model of a checkpoint: a digest of the pre-trained encoder and, behind a dot, one of the text
    tower and the projection where the head is made of text. Taken before anything trains.
    """
    found = _digest(model.encoder.base_state())
    if model.text is None:
        return found
    projection = model.text.projection
    if projection is None:  # the encoder projects itself, or is projected within
        projection = model.encoder.projection
    state = {**model.text.weights(), **({} if projection is None else {"projection": projection})}
    return f"{found}.{_digest(state)}"


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, weight in sorted(state.items()):
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def package_versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def save_checkpoint(folder: Path, method: StagedModule, facts: dict[str, Any]) -> dict[Path, Digest]:
    """Write what trained; returns the digests of the files."""
    return write_folder(folder, trained_state(method), {**facts, "packages": package_versions()})


def load_checkpoint(folder: Path, method: StagedModule, class_names: Sequence[str], base: str) -> None:
    """Fill `method` from a checkpoint, strictly.

    Args:
        class_names: of the data at hand, in label order.
        base: `fingerprint` of the model at hand.

    Raises:
        UserError: damaged; of another base model, class set, tuner or head; each names what differs.
    """
    tensors, facts = read_folder(folder)
    check_base(folder, facts, base)
    copy_state(method, tensors, str(folder), "give the options that it was trained with")
    check_classes(folder, facts, class_names)


def check_base(folder: Path, facts: dict[str, Any], base: str) -> None:
    """Raise a `UserError` if a checkpoint was trained on another base model than `base`.

    Text towers are compared where both sides have one: other heads are made without it, and older checkpoints do not
    name theirs.
    """
    if not {"base", "class_names"} <= facts.keys():
        raise UserError(f"{folder} is damaged: facts.json names no base model or classes; train again")
    encoder, *text = zip(str(facts["base"]).split("."), base.split("."), strict=False)
    if len(set(encoder)) > 1:
        raise UserError(
            f"{folder} was trained on another base model than the one at hand; give the backbone, pretrained, "
            "resolution, num_experts and, where that began at random, seed that it was trained with"
        )
    if any(there != here for there, here in text):
        raise UserError(
            f"{folder} was trained with the same image tower and another text tower or projection than the one at "
            "hand; give the pretrained that it was trained with"
        )


def check_classes(folder: Path, facts: dict[str, Any], class_names: Sequence[str]) -> None:
    """Raise a `UserError` that names the first class of a checkpoint which the data at hand have not in its place."""
    for there, here in zip_longest(facts["class_names"], class_names):
        if there != here:
            name = here if there is None else there
            raise UserError(f"{folder} was trained on other classes: '{name}' is not at its place in this data set")


@torch.no_grad()
def copy_state(method: StagedModule, tensors: dict[str, Tensor], where: str, remedy: str) -> None:
    """Copy tensors into what trains, or say what does not fit."""
    own = trained_state(method)
    check_fit(own, tensors, where, remedy)
    for name, target in own.items():
        target.copy_(tensors[name])


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: str, remedy: str) -> None:
    """Raise a `UserError` that names what of `tensors` is missing, unexpected or of another shape."""
    problems = [
        f"{len(names)} tensors {kind} ({', '.join(sorted(names)[:2])}{', …' if len(names) > 2 else ''})"
        for kind, names in (
            ("missing", own.keys() - tensors.keys()),
            ("unexpected", tensors.keys() - own.keys()),
            ("of another shape", {k for k in own.keys() & tensors.keys() if own[k].shape != tensors[k].shape}),
        )
        if names
    ]
    if problems:
        raise UserError(f"{where} is of another tuner, head or class count: {'; '.join(problems)}; {remedy}")


class States:
    """The states of an unfinished run, `state/<step>/`, newest last.

    Args:
        folder: where they lie.
        identity: what must agree for a state to be of this run: config hash, base, world size, data.
        seal: takes the digests of files that are written, and the folders that are about to go.
    """

    def __init__(self, folder: Path, identity: dict[str, Any], seal: Seal = lambda digests, gone: None) -> None:
        self.folder, self.identity, self.seal = folder, identity, seal

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Write one and drop all but the last two.

        Raises:
            UserError: it cannot be written; the ones before stay whole.
        """
        new = self.folder / f"{step:08d}"
        digests = write_folder(new, tensors, {**facts, "identity": self.identity})
        earlier = [path for path in self._all() if path < new][1 - KEEP :]
        gone = [path for path in self._all() if path not in (*earlier, new)]  # later ones were damaged
        self.seal(digests, gone)
        for path in gone:
            remove_folder(path)
        for entry in self.folder.iterdir():
            if temporary_of(entry.name[1:9], "new").fullmatch(entry.name):  # cut off by a kill
                shutil.rmtree(entry)

    def begun(self) -> bool:
        """Whether there is any state, whole or not."""
        return bool(self._all())

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest whole state, None where no run was begun.

        Raises:
            UserError: every state is damaged, or the newest whole one is of another run.
        """
        found = self._all()
        for path in reversed(found):
            try:
                tensors, facts = read_folder(path)
            except UserError as error:
                log.warning("%s; going back to the state before it", error)
                continue
            self._check(path, facts.get("identity", {}))
            return tensors, facts
        if found:
            raise UserError(f"every state in {self.folder} is damaged; start over with `resume False`")
        return None

    def _check(self, path: Path, identity: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if identity.get(name) != value:
                raise UserError(
                    f"{path} is of another run: its {name} is {identity.get(name)}, here it is {value}; launch it as "
                    "before, start over with `resume False`, or choose another output_dir"
                )

    def _all(self) -> list[Path]:
        """Those that were written to the end, oldest first; a kill may have come before one was taken down."""
        return sorted(each for each in self.folder.glob("[0-9]*") if each.is_dir() and is_taken_down(each))


def rng_state(rank: int) -> dict[str, Tensor]:
    """Random state of this process. Nothing of ours draws from it; a method or a library may."""
    python = torch.tensor([int(each) for each in random.getstate()[1]], dtype=torch.int64)
    numpy = np.random.get_state(legacy=False)
    position = torch.tensor([numpy["state"]["pos"], numpy["has_gauss"]])
    state = {
        "torch": torch.get_rng_state(),
        "python": python,
        "numpy": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
        "numpy_position": position,
        "numpy_gauss": torch.tensor(numpy["gauss"], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"rng.{rank}.{name}": each for name, each in state.items()}


def restore_rng(tensors: dict[str, Tensor], rank: int) -> None:
    """Undo `rng_state`."""
    own = {name.split(".", 2)[2]: each for name, each in tensors.items() if name.startswith(f"rng.{rank}.")}
    torch.set_rng_state(own["torch"])
    random.setstate((3, tuple(own["python"].tolist()), None))
    position, has_gauss = own["numpy_position"].tolist()
    key = own["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", key, position, has_gauss, float(own["numpy_gauss"])))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
