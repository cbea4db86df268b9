"""Random changes of Pillow images that more than one training transform is made of, or that torchvision does not have.

All draws come from torch's global CPU generator, as in `transforms.py`.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageFilter

from tailtune.configs.lazy_module import lazy_module

v2 = lazy_module("torchvision.transforms.v2")
auto_augment = lazy_module("timm.data.auto_augment")  # its import takes a second

Step = Callable[..., Image.Image]

GREY = (128, 128, 128)
"""What AutoAugment fills with what a shift uncovers (Cubuk et al. 2019)."""
IMAGENET_MEAN = (124, 116, 104)
"""ImageNet's mean colour."""
GREY_SHARE = 0.2
"""Share of the images that SimCLR makes grey."""
BLUR_SIGMAS = (0.1, 2.0)
"""Smallest and largest standard deviation of its Gaussian blur, in pixels."""


def simclr(blurred: float, hue: float = 0.1, jittered: float = 0.8) -> tuple[Step, ...]:
    """Colour jitter, grey, blur and flip of SimCLR (Chen et al. 2020, appendix A), with half its colour strength.

    Args:
        blurred: share of the images that are blurred; SADE sets it per data set.
        hue: largest change of the hue, as a share of the colour circle.
        jittered: share of the images whose colours are changed.
    """
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, hue)], p=jittered)
    return jitter, v2.RandomGrayscale(GREY_SHARE), v2.RandomApply([_blur], p=blurred), v2.RandomHorizontalFlip()


def _blur(image: Image.Image) -> Image.Image:
    """PIL's Gaussian blur. PIL approximates it by repeated box blurs, so torchvision's blur gives other pixels."""
    return image.filter(ImageFilter.GaussianBlur(float(torch.empty(()).uniform_(*BLUR_SIGMAS))))


def cifar_policy() -> Step:
    """AutoAugment with the policy that was found on CIFAR-10 (Cubuk et al. 2019, table 7)."""
    policy: Step = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10, fill=list(GREY))
    return policy


class RandAugment:
    """RandAugment as PaCo's, BalPoE's and LGLA's code has it: two of 15 changes, each made with probability ½.

    Their magnitude is N(10, ½²), at most 10. timm has this code. It draws from the generators of Python and NumPy. So
    they are seeded here for each image, and put back.
    """

    def __init__(self) -> None:
        self.policy = auto_augment.rand_augment_transform("rand-n2-m10-mstd0.5", {"img_mean": IMAGENET_MEAN})

    def __call__(self, image: Image.Image) -> Image.Image:
        """A changed copy of an RGB image, or the image."""
        seed = int(torch.randint(2**32, ()))
        of_python, of_numpy = random.getstate(), np.random.get_state()
        random.seed(seed), np.random.seed(seed)
        try:
            changed: Image.Image = self.policy(image)
        finally:
            random.setstate(of_python), np.random.set_state(of_numpy)
        return changed


class Cutout:
    """A black square around a random pixel, of which a part may lie outside (DeVries and Taylor 2017).

    Args:
        length: side of the square in pixels.
    """

    def __init__(self, length: int) -> None:
        self.half = length // 2

    def __call__(self, image: Image.Image) -> Image.Image:
        """A changed copy of an RGB image."""
        x, y = (int(torch.randint(side, ())) for side in image.size)
        changed = image.copy()
        right, below = min(x + self.half, image.width), min(y + self.half, image.height)
        changed.paste((0, 0, 0), (max(x - self.half, 0), max(y - self.half, 0), right, below))
        return changed
