"""Pre-trains a miniature CLIP on photographs, for pretrain_tiny_clip.py: captions are names of the images' classes.

The images are those of a data config, cropped and mirrored as in a training. A state is written now and then, from
which the same command continues bit for bit.
"""

import io
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tailtune.configs import UserError, load_configs
from tailtune.configs.seeding import generator, seeded
from tailtune.datasets.build_data import build_data
from tailtune.datasets.data_bundle import DataBundle
from tailtune.datasets.loading.data_loader import eval_loader, train_loader
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.datasets.view import View
from tailtune.models import resolve
from tailtune.models.backbones.safe_torch_load import READ_ERRORS, safe_torch_load
from tailtune.scripts._contrastive import ContrastiveTraining, running_mean
from tailtune.trainers.option_schema import declared
from tailtune.trainers.storage.atomic_io import write_bytes

MODEL_NAME = "photo_clip"
MODEL: Mapping[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
BATCH, LR, WEIGHT_DECAY, WARMUP, EMA_DECAY, SAVE_EVERY = 256, 1e-3, 0.1, 400, 0.999, 100
PATCH_DROPOUT = 0.5
"""Share of the patches that a training image lacks: half the time of a step (FLIP, arXiv 2212.00794)."""
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
    if len(data.train) < BATCH:
        raise UserError(f"--data {recipe.data}: {len(data.train)} training images are less than one batch of {BATCH}")
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
        names = [[str(each) for each in found[name]] for name in class_names]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--captions {recipe.captions}: {error!r}; it maps each class name to a list of names"
        ) from error
    if not all(names):
        raise UserError(f"--captions {recipe.captions}: {class_names[names.index([])]} has no name; give it one")
    return names


class Pretraining:
    """A training with the step that it has reached.

    Args:
        recipe: what to train on.
        folder: where the state is kept.
    """

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.state_file, self.log_file = recipe, folder / "state.pt", folder / "pretrain_log.txt"
        with seeded(recipe.seed, "backbone"):
            vision = {**MODEL["vision_cfg"], "patch_dropout": PATCH_DROPOUT}
            model = open_clip.CLIP(**{**MODEL, "vision_cfg": vision})
            torch.nn.init.normal_(model.token_embedding.weight, std=0.05)
        self.step, self.seconds, self.steps = 0, 0.0, recipe.samples // BATCH
        self.training = ContrastiveTraining(model, self.steps, LR, WEIGHT_DECAY, WARMUP, EMA_DECAY)
        if self.state_file.exists():
            self._resume()

    def _resume(self) -> None:
        try:
            state = safe_torch_load(self.state_file)
        except READ_ERRORS as error:
            raise UserError(f"{self.state_file} is damaged ({error}); remove it to train anew") from error
        if state["recipe"] != str(self.recipe):
            raise UserError(f"{self.state_file} is of another command ({state['recipe']}); choose another --out")
        self.training.model.load_state_dict(state["model"])
        self.training.optimizer.load_state_dict(state["optimizer"])
        self.training.average = [each.clone() for each in state["average"]]
        self.step, self.seconds = state["step"], state["seconds"]
        print(f"resuming after step {self.step} of {self.steps}")

    def save(self) -> None:
        """Write the state in one piece: an interruption leaves the one before it."""
        own, content = self.training, io.BytesIO()
        states = {"model": own.model.state_dict(), "optimizer": own.optimizer.state_dict(), "average": own.average}
        torch.save({**states, "recipe": str(self.recipe), "step": self.step, "seconds": self.seconds}, content)
        write_bytes(self.state_file, content.getvalue())

    def log(self, line: str) -> None:
        """Print a line and add it to the log, unless a training that had ended has left it there."""
        tqdm.write(line)
        with self.log_file.open("a+", encoding="utf-8") as file:
            file.seek(0)
            if line not in file.read().splitlines():
                file.write(line + "\n")

    def train(self, view: View, names: Sequence[Sequence[str]]) -> None:
        """Train to the last step.

        Args:
            view: the training images.
            names: the names of each class.
        """
        started, before, running = time.perf_counter(), self.seconds, None
        bar = tqdm(total=self.steps, initial=self.step, unit="batch", mininterval=1)
        for batch in self._batches(view, names):
            # With so few tokens the fused attention of a CPU is slower: 1.2 times over the whole step.
            with seeded(self.recipe.seed, "patches", self.step), sdpa_kernel(SDPBackend.MATH):
                loss = self.training.update(self.step, *batch, bf16=self.recipe.prec == "bf16")
            running = running_mean(running, loss)
            self.step, self.seconds = self.step + 1, before + time.perf_counter() - started
            bar.update()
            if self.step % SAVE_EVERY == 0 or self.step == self.steps:
                self.log(f"images {self.step * BATCH:8d}  loss {running:.4f}  seconds {self.seconds:.0f}")
                self.save()
        bar.close()

    def _batches(self, view: View, names: Sequence[Sequence[str]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images [B, 3, S, S], tokens of their captions [B, L] and classes [B], from the present step on."""
        tokenize = open_clip.SimpleTokenizer(context_length=MODEL["text_cfg"]["context_length"])
        tokens = [tokenize([text.format(name) for text in TEMPLATES for name in each]) for each in names]
        sampler = StepSampler(view.labels, BATCH, BATCH, self.recipe.seed)
        whole = len(view) // BATCH  # the last batch of an epoch is smaller and left out
        while self.step < self.steps:
            sampler.set_position(self.step // whole, self.step % whole)
            for batch in train_loader(view, sampler, None):
                if len(batch["label"]) < BATCH or self.step == self.steps:
                    break
                picks = torch.rand(BATCH, generator=generator(self.recipe.seed, "captions", self.step)).tolist()
                of_images = [tokens[each] for each in batch["label"]]
                captions = [each[int(pick * len(each))] for each, pick in zip(of_images, picks, strict=True)]
                yield normalised(batch["image"]), torch.stack(captions), batch["label"]


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
    model = training.training.finish(folder / "weights.safetensors")
    write_bytes(folder / f"{MODEL_NAME}.json", json.dumps(MODEL, indent=2).encode())
    found = zero_shot(model, data.test, data.info.class_names)
    training.log(f"zero-shot on {len(data.test)} test images among {len(names)} classes: {found:.2f} %")
