"""Chooses the transforms of a run from its config."""

from dataclasses import dataclass, replace

from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.images import tensor_transforms, transforms
from tailtune.datasets.images.growing_crop import GrowingArea, GrowingCrop
from tailtune.datasets.images.tensor_transforms import TENSOR_AUGMENTS, TensorTransform
from tailtune.datasets.images.transforms import Transform


@dataclass(frozen=True)
class RunTransforms:
    """The transforms of the images of a run."""

    train: Transform | TensorTransform
    """Training images with augmentation."""
    unaugmented: Transform | TensorTransform
    """Training images from which a head is initialised."""
    test: Transform | TensorTransform
    """Evaluated images. For `tte`, trainers/evaluation/tta.py crops its result into views."""
    validation: Transform | TensorTransform
    """Images of a validation during training: the centre. Options of the test do not change what it decides."""
    adapt: Transform
    """Two augmented views of a test image. SADE blurs them as Pillow does, so Pillow makes them."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "RunTransforms":
        """The transforms that a config asks for.

        Raises:
            UserError: an unknown augmentation or interpolation.
        """
        size = (cfg.resolution, cfg.interpolation)
        train: Transform | TensorTransform = transforms.train_transform(cfg.augment, *size)  # refuses unknown names
        test: Transform | TensorTransform
        adapt = transforms.repeated(transforms.train_transform(cfg.adapt_views, *size), 2)
        made = transforms if cfg.image_backend == "pil" else tensor_transforms
        if cfg.tte and cfg.tte_mode == "randaug":
            test = transforms.repeated(transforms.train_transform(cfg.augment, *size), cfg.randaug_times)
        elif cfg.tte:
            test = made.resize_for_crops(cfg.resolution, cfg.expand, cfg.interpolation)
        else:
            test = made.eval_transform(*size, cfg.augment, cfg.crop_margin)
        if made is tensor_transforms and cfg.augment in TENSOR_AUGMENTS:
            train = TENSOR_AUGMENTS[cfg.augment](*size)
        area = GrowingArea(cfg.mda_func, cfg.num_epochs)
        if isinstance(train, GrowingCrop):
            train = replace(train, area=area)
        elif isinstance(train, TensorTransform) and train.of_epoch is not None:
            train = replace(train, of_epoch=area)
        validation = made.eval_transform(*size, cfg.augment)
        return cls(train, made.unaugmented_transform(*size), test, validation, adapt)


def check_cache(where: str | None, backend: str, augment: str) -> None:
    """Refuse to keep images that Pillow transforms, without the import of torchvision.

    Args:
        where: the option `cache`.
        backend: the option `image_backend`.
        augment: the option `augment`.

    Raises:
        UserError: the combination is not possible.
    """
    if where is not None and (backend == "pil" or augment not in TENSOR_AUGMENTS):
        made = f"image_backend {backend}" if backend == "pil" else f"augment {augment}"
        raise UserError(f"cache {where} keeps tensors, but {made} works on Pillow images: leave one of them out")
