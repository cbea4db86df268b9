"""`load`: the model of a finished run, for predictions in Python."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from tailtune.configs import CfgNode, UserError
from tailtune.configs.errors import printable
from tailtune.datasets.build_data import build_info, stored_info, with_descriptors
from tailtune.datasets.data_bundle import DataInfo
from tailtune.datasets.images.image_files import upright_rgb
from tailtune.datasets.images.transforms import eval_transform
from tailtune.models import ClassificationModel, resolve
from tailtune.trainers.distributed import uses_cuda
from tailtune.trainers.evaluation.tta import prepare
from tailtune.trainers.hub_download import local_run
from tailtune.trainers.methods import Method
from tailtune.trainers.option_schema import declared
from tailtune.trainers.runs.load_run import config_of, trained_method
from tailtune.trainers.runs.run_folder import FACTS, Checkpoint, find_checkpoint
from tailtune.trainers.storage.manifest import read_json

if TYPE_CHECKING:
    from tailtune.trainers.predict_in_python import Prediction

Given = str | Path | Image.Image
"""A path, or an image of Pillow."""


@dataclass(frozen=True, eq=False)
class TrainedModel:
    """The model of a finished run, ready to predict. `tailtune.load` makes it."""

    folder: Path
    """The run folder."""
    class_names: tuple[str, ...]
    """Names of the C classes, in the order of the logits."""
    class_counts: tuple[int, ...]
    """Number of training images of each class [C]."""
    resolution: int
    """Side R of the images that the model takes, in pixels."""
    device: torch.device
    """Where the model computes."""
    preprocess: Callable[[Image.Image], Tensor] = field(repr=False)
    """A torchvision transform: PIL image of any size and mode → float32 [3, R, R], normalised. It is the transform of
    the run's evaluation with one centre crop, also if the run was evaluated with several crops (`tte`). An image whose
    EXIF data say that it is turned is rotated in place."""
    config: CfgNode = field(repr=False)
    """All options of the run, frozen: `config.backbone`, `config.lr` …"""
    method: Method = field(repr=False)
    """The `torch.nn.Module` with the model and its objective, in eval mode."""

    @torch.no_grad()
    def predict_logits(self, images: Tensor) -> Tensor:
        """Classify images. They are computed as one batch, in the precision of the run's evaluation (`test_prec`).

        Args:
            images: float [N, 3, R, R], as `preprocess` returns them; on any device.

        Returns:
            Logits float32 [N, C], on the device of the images. With several experts: the mean of their logits.

        Raises:
            UserError: the images have another shape.

        Example:
            ```python
            logits = classifier.predict_logits(classifier.preprocess(image).unsqueeze(0))
            name = classifier.class_names[logits.argmax()]
            ```
        """
        return self.method.predict(self._placed(images)).float().to(images.device)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Encode images: the features from which the classifier makes its logits.

        Args:
            images: float [N, 3, R, R], as `preprocess` returns them; on any device.

        Returns:
            Features float32 [N, D], on the device of the images; [N, E, D] if the E experts have features of their own.

        Raises:
            UserError: the images have another shape.
        """
        return self.method.model.features(self._placed(images)).float().to(images.device)

    def predict(
        self,
        images: Given | Iterable[Given],
        *,
        target_prior: str | Path | None = None,
        threshold: float | None = None,
        tte: bool | str | None = None,
        calibrate: bool | None = None,
        embeddings: bool = False,
        batch_size: int | None = None,
        num_workers: int | None = None,
    ) -> "Iterator[Prediction]":
        """Label images, as the command `predict` does. What is None is as in the run's own evaluation.

        An image that cannot be read is left out, with a warning of the logger `tailtune`; `index` says which are there.

        Args:
            images: a path or several: files, folders, patterns and list files, as the command takes them; or images of
                Pillow. One that its EXIF data turn is rotated in place.
            target_prior: class frequencies of the images: `uniform`, `train`, a JSON file by class name, or `estimate`.
            threshold: probability below which the label is `unsure`.
            tte: average several views of each image: True, False, or the name of the views, such as `tencrop`.
            calibrate: whether the temperature of the validation images divides the logits.
            embeddings: whether the predictions have features.
            batch_size: images that are computed at once.
            num_workers: processes that decode files. Pillow's images stay in this process.

        Returns:
            A prediction for each image, computed batch by batch. Only an estimated prior needs all of them first.

        Raises:
            UserError: there is no image, or an argument is wrong.

        Example:
            ```python
            for found in classifier.predict("photos", threshold=0.8):
                print(found.path, found.label, found.probability)
            ```
        """
        from tailtune.trainers.predict_in_python import predictions  # it imports this module

        options = {"target_prior": target_prior, "tte": tte, "calibrate": calibrate, "test_batch_size": batch_size}
        options |= {"num_workers": num_workers} | ({"tte": True, "tte_mode": tte} if isinstance(tte, str) else {})
        given = {name: value for name, value in options.items() if value is not None}
        return predictions(self.folder, self.method, images, given, threshold, embeddings)

    def _placed(self, images: Tensor) -> Tensor:
        side = self.resolution
        if images.ndim != 4 or images.shape[1:] != (3, side, side):
            raise UserError(
                f"images must have the shape [N, 3, {side}, {side}], not {list(images.shape)}: apply `preprocess` to "
                "each image, then torch.stack"
            )
        return images.to(self.device)


def load(run_folder: str | Path, device: str | torch.device | None = None) -> TrainedModel:
    """Load the model of a finished run. The images that it was trained on are not needed.

    A checkpoint holds only what was trained. So the backbone's pre-trained weights are read as the run read them: from
    the package, a local file, or the cache of downloads.

    Args:
        run_folder: path of the run folder, or its name in output/; or the name USER/NAME of a repository of the
            Hugging Face Hub that `export hub` has made, which is downloaded once.
        device: where to compute, such as `"cuda:1"`; None: the first GPU, or the CPU if there is none.

    Returns:
        The model with its class names and its transform.

    Raises:
        UserError: the folder holds no checkpoint, a file is damaged, pre-trained weights are missing, the repository
            cannot be downloaded, or there is no such device.

    Example:
        ```python
        from PIL import Image
        import tailtune

        classifier = tailtune.load("output/digits_lt_tiny_clip_peft")
        image = classifier.preprocess(Image.open("three.png"))
        probabilities = classifier.predict_logits(image.unsqueeze(0)).softmax(1)
        ```
    """
    place = _device(device)
    home, foreign = find_checkpoint(str(local_run(str(run_folder))), "load:", "name the folder of a finished run")
    if foreign is not None:
        raise UserError(
            f"load: {foreign.path} is a checkpoint of another project, which does not say with which options it was "
            "trained; evaluate it on the command line with `test_only True model_dir …`"
        )
    return _loaded(home, place)


def _loaded(home: Path, device: torch.device) -> TrainedModel:
    """The model of the run in folder `home`, which has a checkpoint."""
    cfg = resolve(config_of(home, declared()))
    info = info_of_run(cfg, read_json(home / FACTS))
    method = trained_method(cfg, Checkpoint(home), info, device).requires_grad_(False)
    prepare(method, cfg.test_prec)
    return TrainedModel(
        folder=home,
        class_names=info.class_names,
        class_counts=tuple(info.class_counts.tolist()),
        resolution=cfg.resolution,
        device=device,
        preprocess=_preprocess(cfg, method.model),
        config=cfg,
        method=method,
    )


def info_of_run(cfg: CfgNode, facts: Mapping[str, Any]) -> DataInfo:
    """Facts about the data of a finished run, from its checkpoint. Only zero-shot reads the texts of `descriptors`.

    Args:
        cfg: resolved config of the run.
        facts: content of its `checkpoint/facts.json`.
    """
    counts = facts.get("class_counts")  # early versions recorded none
    info = build_info(cfg) if counts is None else stored_info(cfg, facts["class_names"], counts)
    return with_descriptors(cfg, info) if cfg.zero_shot else info


def _preprocess(cfg: CfgNode, model: ClassificationModel) -> v2.Compose:
    """The transform of the evaluation, from a PIL image of any mode to a normalised float32 tensor [3, R, R]."""
    mean, std = model.mean.flatten().tolist(), model.std.flatten().tolist()
    cut = eval_transform(cfg.resolution, cfg.interpolation, cfg.augment, cfg.crop_margin)
    return v2.Compose([v2.Lambda(upright_rgb), cut, v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])


def _device(device: str | torch.device | None) -> torch.device:
    """The device that is asked for.

    Raises:
        UserError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if uses_cuda() else "cpu")
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was built without CUDA
        raise UserError(f"device '{printable(device)}': {' '.join(str(error).split())[:200]}") from error
    if place.type == "meta":
        raise UserError("device 'meta' holds no values, so it cannot predict; choose cpu or cuda")
    return place
