"""Measures time and memory of a data set as large as iNaturalist 2018: start, evaluation, `adapt sade`, `target_prior`.

    python benchmarks/scale.py                                     437,513 training images, 24,426 × 8,142 × 3 logits
    python benchmarks/scale.py --preset imagenet_lt                115,846 training images, 50,000 × 1,000 × 3 logits
    python benchmarks/scale.py --classes 500 --train 5000 --test 3000 --dir /data/scale      minutes; keeps the data

The image files are hard links of a few small generated images. The network is the embedded CLIP with three experts,
which is trained for one step. Every command runs in a process of its own, without worker processes, on --threads
threads. "start" is this training, with an evaluation of 256 images. "model" evaluates the same images with `test_only`;
its peak is what the program, the lists and the model take. The other commands evaluate all test images and all 11 test
distributions of `test_dists all`; `adapt sade` and `target_prior estimate` use the logits that "evaluation" has stored.

The peak is the largest resident memory. The cache in which the operating system keeps parts of files is not counted,
because it gives this memory back when a program needs it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

MAIN = Path(__file__).resolve().parent.parent / "main.py"
LINKS = 30_000
"""Number of hard links of one generated image; file systems limit it to 65,000 and less."""
SOME = 256
"""Number of test images of "start" and "model"."""
ALL = ("test_only", "True", "test_dists", "all")
COMMANDS: dict[str, tuple[str, ...]] = {
    "start": ("max_test_images", str(SOME)),
    "model": ("test_only", "True", "max_test_images", str(SOME), "few_below", "21"),
    "evaluation": ALL,
    "adapt sade": (*ALL, "adapt", "sade"),
    "target_prior estimate": (*ALL, "target_prior", "estimate"),
}
"""Name of a row of the table → words of the command."""


@dataclass(frozen=True)
class Size:
    """The size of a data set."""

    train: int
    """Number of training images."""
    test: int
    """Number of test images."""
    classes: int
    options: tuple[str, ...] = ()
    """Further lines of its config."""


INAT = ("adapt_views: sade_inat", "adapt_lr: 0.2", "adapt_weight_decay: 2e-4", "adapt_entropy: 0.01")
PRESETS = {
    "inat2018": Size(437_513, 24_426, 8_142, INAT),
    "imagenet_lt": Size(115_846, 50_000, 1_000, ("adapt_lr: 0.025",)),
}


SPLITS = ("train", "test")


class Cost(NamedTuple):
    """What a command took."""

    seconds: float
    """Wall time."""
    processor: float
    """Processor time in seconds, which other processes hardly change."""
    peak: float
    """Largest resident memory in bytes."""


def make_data(folder: Path, size: Size, seed: int = 0) -> None:
    """Write images, lists and the data config `scale.yaml`.

    The numbers of training images of the classes fall exponentially. Test images are divided evenly among the classes.
    """
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    draws = np.random.default_rng(seed)
    for number in range(-(-(size.train + size.test) // LINKS)):
        pixels = draws.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(images / f"{number}.jpg")
    shares = np.geomspace(1, 1 / 500, size.classes)
    train = np.maximum(1, np.floor(shares / shares.sum() * (size.train - size.classes))).astype(int)
    train[: size.train - train.sum()] += 1
    test = np.bincount(np.arange(size.test) % size.classes, minlength=size.classes)
    written = 0
    for split, counts in zip(SPLITS, (train, test), strict=True):
        lines = []
        for label in np.repeat(np.arange(size.classes), counts).tolist():
            name = f"{split}/{label}/{written}.jpg"
            target = images / name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(images / f"{written // LINKS}.jpg", target)
            lines.append(f"{name} {label}\n")
            written += 1
        (folder / f"{split}.txt").write_text("".join(lines))
    lines = ["dataset: ImageList", "root: images", f"num_classes: {size.classes}"]
    lines += [*(f"{split}_list: {split}.txt" for split in SPLITS), *size.options]
    (folder / "scale.yaml").write_text("\n".join([f"# {size}", *lines, ""]))


def cost_of(words: Sequence[str], folder: Path, threads: int) -> Cost:
    """Run `main.py` and measure it.

    Args:
        words: words of the command.
        folder: the working directory.
        threads: number of threads.

    Raises:
        SystemExit: the command failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    with (folder / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(MAIN), *words], cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        text = (folder / "output.txt").read_text()
        raise SystemExit(f"{' '.join(words)} ended with exit code {process.returncode}:\n{text[-2000:]}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def measure(folder: Path, size: Size, experts: int, threads: int) -> None:
    """Run all commands, and print a line for each as soon as it has ended."""
    shutil.rmtree(folder / "output", ignore_errors=True)
    common = ["-d", "scale.yaml", "-m", "tiny_clip_sade", "num_experts", str(experts), "max_steps", "1"]
    common += ["adapt", "none", "test_dists", "none", "num_workers", "0", "output_dir", "scale"]
    stored = 2 * size.test * size.classes * experts
    print(f"{size.test:,} × {size.classes:,} × {experts} logits: {stored / 1e6:,.0f} MB stored; {threads} threads\n")
    print(f"| {'command':<22} | seconds | processor s | peak MB | above the model MB | of the stored logits |")
    print("|---|---|---|---|---|---|")
    base = 0.0
    for name, words in COMMANDS.items():
        if name == "adapt sade" and experts == 1:
            continue  # it weighs experts
        cost = cost_of([*common, *words], folder, threads)
        base = cost.peak if name == "model" else base
        above = cost.peak - base
        row = [f"{cost.seconds:.0f}", f"{cost.processor:.0f}", f"{cost.peak / 1e6:,.0f}"]
        row += [f"{above / 1e6:,.0f}", f"{above / stored:.2f}"] if name not in ("start", "model") else ["", ""]
        print(f"| {name:<22} | {' | '.join(row)} |", flush=True)


def main() -> None:
    """Read the arguments, make the data, measure, and print the table."""
    args = _parser().parse_args()
    preset = PRESETS[args.preset]
    size = Size(args.train or preset.train, args.test or preset.test, args.classes or preset.classes, preset.options)
    if size.train < 2 * size.classes or size.test < size.classes:
        raise SystemExit("a class needs two training images and a test image: raise --train or --test")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dir or Path(temporary)
        start = time.perf_counter()
        if (folder / "scale.yaml").exists():
            if (folder / "scale.yaml").read_text().splitlines()[0] != f"# {size}":
                raise SystemExit(f"{folder} holds data of another size: name another folder with --dir")
            print(f"data of an earlier call: {folder}")
        else:
            make_data(folder, size)
            print(f"{size.train + size.test:,} image files in {time.perf_counter() - start:.0f} s: {folder}")
        measure(folder, size, args.experts, args.threads)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="inat2018", help="size (default: inat2018)")
    parser.add_argument("--train", type=int, metavar="N", help="number of training images, instead of the preset's")
    parser.add_argument("--test", type=int, metavar="N", help="number of test images, instead of the preset's")
    parser.add_argument("--classes", type=int, metavar="C", help="number of classes, instead of the preset's")
    parser.add_argument("--experts", type=int, default=3, metavar="E", help="number of experts (default: 3)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads of a command (default: 1)")
    parser.add_argument(
        "--dir", type=Path, help="folder for the data and runs, which are kept; data of the same size are used again"
    )
    return parser


if __name__ == "__main__":
    main()
