"""Measures how fast images are loaded. Alternates between our loader and the pipelines of the original codes.

    python benchmarks/input.py --images photographs.tar
    python benchmarks/input.py                            # with generated JPEG files of 500 × 375 pixels

Rows: LIFT's training crops (decode, random crop to 224 pixels, flip, normalise), LIFT's five crops of a test image, the
crops with the colour jitter of RIDE and SADE, and CIFAR's augmentation of RIDE and SADE. The originals' side uses the
same torchvision transforms as their code, and ends with a batch of normalised float images. Ours ends with a batch of
uint8 images, because the network normalises them on its device, where five crops are also cut out of the resized image.
The last column is what that takes on this CPU.
Everything runs in one process and one thread; its processor time is measured. The last line is the share of the time of
ResNet-32 on images of 32 pixels, batch 128, that goes by in loading. The exit code is 1 if a target is missed.
"""

import argparse
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as v1

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.configs import load_configs
from tailtune.datasets.build_data import build_info
from tailtune.datasets.images.fixed_crops import five_crop
from tailtune.datasets.images.tensor_transforms import TENSOR_AUGMENTS, resize_for_crops
from tailtune.datasets.loading.data_loader import train_loader
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.datasets.sources.image_sources import ArraySource, FileSource
from tailtune.datasets.view import View
from tailtune.models import build_model, resolve
from tailtune.trainers.methods import build_method
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer
from tailtune.trainers.option_schema import declared
from tailtune.trainers.runs.metrics_file import hardware

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 128
INPUT_TARGET = 0.03
"""Largest share of an epoch that loading may take."""
BICUBIC = v1.InterpolationMode.BICUBIC

Batch = Tensor | list[Tensor]
Side = Callable[[], Batch]
"""Loads all images of a row once; the last batch is returned."""


def normalised(images: Batch) -> Tensor:
    """The network's input, as `ClassificationModel.normalised` makes it."""
    assert isinstance(images, Tensor)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return images.float().div_(255).sub_(mean).div_(std)


def main() -> None:
    """Print a row for each pipeline."""
    args = _parser().parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = unpacked(args.images, Path(folder)) if args.images else generated(Path(folder), 64)
        photographs = FileSource(Path(folder), [file.name for file in files], np.zeros(len(files)))
        print(
            f"{hardware()} · {len(files)} files of {np.mean([f.stat().st_size for f in files]) / 1e3:.0f} kB on average"
        )
        print(
            f"{'pipeline':<28}{'original':>12}{'ours':>10}{'ratio':>8}{'of minima':>11}{'target':>8}{'on device':>16}"
        )
        missed = [
            compare("training crops", crops_before(files), loads(photographs, "lift"), len(files), 1.9, args.rounds),
            compare(
                "five crops of a test image",
                five_before(files),
                whole(photographs),
                len(files),
                3.3,
                args.rounds,
                lambda images: normalised(five_crop(images, 224)),
            ),
            compare(
                "crops and colour jitter",
                jitter_before(files),
                loads(photographs, "imagenet"),
                len(files),
                1.0,
                args.rounds,
            ),
        ]
    small = np.random.default_rng(0).integers(0, 256, (1024, 32, 32, 3), dtype=np.uint8)
    cifar = ArraySource(small, np.arange(1024) % 10, "generated")
    missed.append(compare("CIFAR", cifar_before(small), loads(cifar, "cifar", 32), len(small), 10.0, args.rounds))
    share = input_share(cifar, args.steps)
    print(f"loading takes {share:.2%} of the steps of ResNet-32 (target: at most {INPUT_TARGET:.0%})")
    sys.exit(any(missed) or share > INPUT_TARGET)


def compare(
    name: str,
    before: Side,
    now: Side,
    images: int,
    target: float,
    rounds: int,
    on_device: Callable[[Batch], Tensor] = normalised,
) -> bool:
    """Print the processor time of both sides for one image, and that of what is left to the device.

    Returns:
        Whether the ratio of the medians misses the target.
    """
    times: tuple[list[float], list[float]] = ([], [])
    before()
    last = now()
    start = time.process_time()
    on_device(last)
    later = (time.process_time() - start) / len(last)
    for _ in range(rounds):
        for seconds, side in zip(times, (before, now), strict=True):
            start = time.process_time()
            side()
            seconds.append((time.process_time() - start) / images)
    (old, new), (least_old, least_new) = map(statistics.median, times), map(min, times)
    ratios = f"{old / new:>8.2f}{least_old / least_new:>11.2f}{target:>8.1f}"
    print(f"{name:<28}{1e3 * old:>9.3f} ms{1e3 * new:>7.3f} ms{ratios}{1e3 * later:>13.3f} ms", flush=True)
    return old / new < target


def loads(source: ArraySource | FileSource, augment: str, resolution: int = 224) -> Side:
    """Our loader with an augmentation, in this process."""
    transform = TENSOR_AUGMENTS[augment](resolution, "bicubic" if resolution == 224 else "bilinear")
    view = View(source, np.arange(len(source)), transform)

    def load() -> Tensor:
        for start in range(0, len(view), BATCH):
            batch = view.finish(view.batch([(i, 0, 0) for i in range(start, min(start + BATCH, len(view)))]))
        return batch["image"]

    return load


def whole(source: FileSource) -> Side:
    """Our images for five crops: resized, and not cut yet."""
    view = View(source, np.arange(len(source)), resize_for_crops(224, 24, "bicubic"))

    def load() -> Batch:
        for start in range(0, len(view), 16):
            images = view.batch(range(start, min(start + 16, len(view))))["image"]
        return images

    return load


def crops_before(files: Sequence[Path]) -> Side:
    """LIFT's transform of training images."""
    return batches_of(files, [v1.RandomResizedCrop(224, interpolation=BICUBIC), v1.RandomHorizontalFlip()])


def jitter_before(files: Sequence[Path]) -> Side:
    """The transform of training images of RIDE and SADE on ImageNet-LT."""
    jitter = v1.ColorJitter(0.4, 0.4, 0.4, hue=0)
    return batches_of(files, [v1.RandomResizedCrop(224, interpolation=BICUBIC), v1.RandomHorizontalFlip(), jitter])


def five_before(files: Sequence[Path]) -> Side:
    """LIFT's five crops of test images, which are normalised one by one."""
    resize, crop = v1.Resize(248, interpolation=BICUBIC), v1.FiveCrop(224)
    tensor, normalise = v1.ToTensor(), v1.Normalize(MEAN, STD)

    def load() -> Tensor:
        for file in files:
            image = Image.open(file).convert("RGB")
            crops = torch.stack([normalise(tensor(part)) for part in crop(resize(image))])
        return crops

    return load


def cifar_before(images: np.ndarray) -> Side:
    """The transform of training images of RIDE and SADE on CIFAR."""
    steps = [v1.RandomCrop(32, padding=4), v1.RandomHorizontalFlip(), v1.RandomRotation(15)]
    transform = v1.Compose([*steps, v1.ToTensor(), v1.Normalize(MEAN, STD)])

    def load() -> Tensor:
        for start in range(0, len(images), BATCH):
            batch = torch.stack([transform(Image.fromarray(image)) for image in images[start : start + BATCH]])
        return batch

    return load


def batches_of(files: Sequence[Path], steps: Sequence[Callable[[Image.Image], Image.Image]]) -> Side:
    """Decode files with Pillow, apply torchvision's transforms, and join the images to batches."""
    transform = v1.Compose([*steps, v1.ToTensor(), v1.Normalize(MEAN, STD)])

    def load() -> Tensor:
        for start in range(0, len(files), BATCH):
            images = [transform(Image.open(file).convert("RGB")) for file in files[start : start + BATCH]]
            batch = torch.stack(images)
        return batch

    return load


def input_share(source: ArraySource, steps: int) -> float:
    """The share of the processor time of training ResNet-32 that is spent in the loader."""
    cfg = resolve(load_configs("cifar10_ir100", "resnet32_ce", [], declared())[-1])
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, info.class_names), info).train()
    optimizer = build_optimizer(method.param_groups(), Plan.of(cfg, BATCH))
    view = View(
        source,
        np.tile(np.arange(len(source)), steps * BATCH // len(source) + 1),
        TENSOR_AUGMENTS["cifar"](32, "bilinear"),
    )
    batches = iter(train_loader(view, StepSampler(view.labels, BATCH, BATCH, seed=0), None))
    loading = 0.0
    begun = time.process_time()
    for _ in range(steps):
        start = time.process_time()
        batch = next(batches)
        loading += time.process_time() - start
        outcome = method(batch)
        (outcome.loss_sum / outcome.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return loading / (time.process_time() - begun)


def unpacked(images: Path, folder: Path) -> list[Path]:
    """Link the JPEG files of a folder, or unpack those of a tar file, into one folder."""
    if images.is_dir():
        found = sorted(path for path in images.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        links = [folder / f"{number}{path.suffix}" for number, path in enumerate(found)]
        for link, path in zip(links, found, strict=True):
            link.symlink_to(path.absolute())
        return links
    with tarfile.open(images) as archive:
        members = [each for each in archive if each.isfile() and each.name.lower().endswith((".jpg", ".jpeg"))]
        for number, member in enumerate(members):
            member.name = f"{number}.jpg"
            archive.extract(member, folder, filter="data")
    return [folder / f"{number}.jpg" for number in range(len(members))]


def generated(folder: Path, count: int) -> list[Path]:
    """Write JPEG files of smooth random shapes with some noise."""
    random, files = np.random.default_rng(0), []
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (500, 375), Image.Resampling.BICUBIC
        )
        noise = random.normal(0, 8, (375, 500, 3))
        pixels = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
        files.append(folder / f"{number}.jpg")
        Image.fromarray(pixels).save(files[-1], quality=90)
    return files


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=Path, help="folder or tar file of JPEG photographs (default: generated images)"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="measured repetitions of each side (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps of the last row (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
