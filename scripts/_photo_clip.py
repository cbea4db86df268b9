"""Pre-trains a miniature CLIP on photographs, for pretrain_tiny_clip.py: captions are names of the images' classes.

The images are those of a data config, cropped and mirrored as in a training. A state is written now and then, from
which the same command continues bit for bit.
"""

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from tailtune.configs import UserError, load_configs
from tailtune.configs.seeding import generator, seeded
from tailtune.datasets.build_data import build_data
from tailtune.datasets.data_bundle import DataBundle
from tailtune.datasets.loading.data_loader import eval_loader, train_loader
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.datasets.view import View
from tailtune.models import resolve
from tailtune.scripts._contrastive import contrastive_loss, learning_rate
from tailtune.trainers.option_schema import declared
from tailtune.trainers.storage.atomic_io import write_bytes

MODEL_NAME = "photo_clip"
MODEL: Mapping[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
BATCH, LR, WEIGHT_DECAY, WARMUP, EMA_DECAY, SAVE_EVERY = 256, 1e-3, 0.1, 400, 0.999, 100
ZERO_SHOT_TEMPLATE = "a photo of a {}."
TEMPLATES = (
    *(
        ZERO_SHOT_TEMPLATE,
        "a photo of the {}.",
        "a picture of a {}.",
        "a small photo of a {}.",
        "a blurry photo of a {}.",
    ),
    *("a close-up of a {}.", "a cropped photo of a {}.", "a low resolution photo of a {}.", "this is a {}.", "{}"),
)


@dataclass(frozen=True)
class Recipe:
    """What is trained on, and for how long."""

    data: str
    """Data config."""
    captions: Path | None
    """JSON file: class name → its names in captions. None: the class names."""
    left_out: tuple[str, ...]
    """Names of classes whose images are left out."""
    samples: int
    seed: int
    prec: str
    """fp32 or bf16."""


def photographs(recipe: Recipe) -> DataBundle:
    """The training and test images of the classes that are not left out; the labels stay.

    Raises:
        UserError: the data config is wrong, or a name that is left out is no class.
    """
    pairs = ["resolution", str(MODEL["vision_cfg"]["image_size"]), "augment", "lift", "expand", "0"]
    data = build_data(resolve(load_configs(recipe.data, "tiny_clip", pairs, declared())[-1]))
    names = data.info.class_names
    for name in recipe.left_out:
        if name not in names:
            raise UserError(f"--leave-out {name}: the data has no such class")
    wanted = torch.tensor([name not in recipe.left_out for name in names])
    data.train, data.test = (_of_classes(view, wanted) for view in (data.train, data.test))
    return data


def _of_classes(view: View, wanted: Tensor) -> View:
    return view.take(wanted[view.labels].nonzero()[:, 0].numpy())


def names_of(recipe: Recipe, class_names: Sequence[str]) -> list[list[str]]:
    """The names of each class in captions.

    Raises:
        UserError: the file cannot be read, or lacks a class.
    """
    if recipe.captions is None:
        return [[name] for name in class_names]
    try:
        found = json.loads(recipe.captions.read_text(encoding="utf-8"))
        return [[str(each) for each in found[name]] for name in class_names]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--captions {recipe.captions}: {error!r}; it maps each class name to a list of names"
        ) from error


class Pretraining:
    """The model, its optimizer and its moving average, at a step.

    Args:
        recipe: what to train on.
        folder: where the state is kept.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.state_file, self.log_file = recipe, folder / "state.pt", folder / "pretrain_log.txt"
        with seeded(recipe.seed, "backbone"):
            self.model = open_clip.CLIP(**MODEL)
            torch.nn.init.normal_(self.model.token_embedding.weight, std=0.05)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
        self.average = [each.detach().clone() for each in self.model.parameters()]
        self.step, self.seconds, self.steps = 0, 0.0, recipe.samples // BATCH
        if self.state_file.exists():
            self._resume()

    def _resume(self) -> None:
        state = torch.load(self.state_file, weights_only=True)
        if state["recipe"] != str(self.recipe):
            raise UserError(f"{self.state_file} is of another command ({state['recipe']}); choose another --out")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.step, self.seconds = state["average"], state["step"], state["seconds"]
        print(f"resuming after step {self.step} of {self.steps}")

    def save(self) -> None:
        """Write the state in one piece: an interruption leaves the one before it."""
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        beside = self.state_file.with_suffix(".tmp")
        torch.save({**states, "recipe": str(self.recipe), "step": self.step, "seconds": self.seconds}, beside)
        os.replace(beside, self.state_file)

    def log(self, line: str) -> None:
        tqdm.write(line)
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def train(self, view: View, names: Sequence[Sequence[str]], num_workers: int | None = None) -> None:
        """Train to the last step.

        Args:
            view: the training images.
            names: the names of each class.
            num_workers: worker processes that decode images; None chooses the number.
        """
        started, before = time.perf_counter(), self.seconds
        running = 0.0
        bar = tqdm(total=self.steps, initial=self.step, unit="batch", mininterval=1)
        for images, captions, classes in self._batches(view, names, num_workers):
            loss = self._one_step(images, captions, classes)
            running = loss if running == 0 else 0.95 * running + 0.05 * loss
            self.step, self.seconds = self.step + 1, before + time.perf_counter() - started
            bar.update()
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.log(f"images {self.step * BATCH:8d}  loss {running:.4f}  seconds {self.seconds:.0f}")
                self.save()
        bar.close()

    def _one_step(self, images: Tensor, captions: Tensor, classes: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(LR, self.step, self.steps, WARMUP)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.prec == "bf16"):
            loss = contrastive_loss(self.model.train(), images, captions, classes)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))
            decay = min(EMA_DECAY, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(self.average, list(self.model.parameters()), 1 - decay)
        return loss.item()

    def _batches(
        self, view: View, names: Sequence[Sequence[str]], num_workers: int | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images [B, 3, S, S], tokens of their captions [B, L] and classes [B], from the present step on."""
        tokenize = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
        tokens = [tokenize([text.format(name) for text in TEMPLATES for name in each]) for each in names]
        sampler = StepSampler(view.labels, BATCH, BATCH, self.recipe.seed)
        whole = len(view) // BATCH  # the last batch of an epoch is smaller and left out
        while self.step < self.steps:
            sampler.set_position(self.step // whole, self.step % whole)
            for batch in train_loader(view, sampler, num_workers):
                if len(batch["label"]) < BATCH or self.step == self.steps:
                    break
                picks = torch.rand(BATCH, generator=generator(self.recipe.seed, "captions", self.step)).tolist()
                captions = [
                    tokens[c][int(pick * len(tokens[c]))] for c, pick in zip(batch["label"], picks, strict=True)
                ]
                yield normalised(batch["image"]), torch.stack(captions), batch["label"]

    def averaged(self) -> open_clip.CLIP:
        """The model with the moving average of its weights, in evaluation mode."""
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self.average, strict=True):
                parameter.copy_(value)
        return self.model.eval()


def normalised(images: Tensor) -> Tensor:
    """uint8 pixels → −1 to 1."""
    return images.float().div_(127.5).sub_(1)


@torch.no_grad()
def zero_shot(model: open_clip.CLIP, view: View, names: Sequence[str]) -> float:
    """Zero-shot accuracy in %, among the given classes."""
    tokenize = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
    text = model.encode_text(tokenize([ZERO_SHOT_TEMPLATE.format(name) for name in names]), normalize=True)
    right = [
        ((model.encode_image(normalised(batch["image"]), normalize=True) @ text.T).argmax(1) == batch["label"]).sum()
        for batch in eval_loader(view, 500, 0)
    ]
    return 100 * float(sum(right)) / len(view)


def pretrain(recipe: Recipe, folder: Path, head: Sequence[str]) -> None:
    """Train, or continue, and write `photo_clip.json`, `weights.safetensors` (fp16) and `pretrain_log.txt`.

    Args:
        recipe: what to train on.
        folder: where the files go.
        head: first lines of the log.

    Raises:
        UserError: wrong data or captions; the folder has the state of another command.
    """
    data = photographs(recipe)
    names = names_of(recipe, data.info.class_names)
    folder.mkdir(parents=True, exist_ok=True)
    training = Pretraining(recipe, folder)
    if training.step == 0:
        write_bytes(training.log_file, "".join(f"{line}\n" for line in head).encode())
        classes = len(data.info.class_names) - len(recipe.left_out)
        training.log(f"images: {len(data.train)} of {classes} classes; names: {sum(map(len, names))}")
    training.train(data.train, names)
    model = training.averaged()
    save_file(
        {key: value.half().contiguous() for key, value in model.state_dict().items()}, folder / "weights.safetensors"
    )
    write_bytes(folder / f"{MODEL_NAME}.json", json.dumps(MODEL, indent=2).encode())
    found = zero_shot(model, data.test, data.info.class_names)
    training.log(f"zero-shot on {len(data.test)} test images among {len(names)} classes: {found:.2f} %")
