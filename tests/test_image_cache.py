"""`cache`, `num_workers` and `profile_data`: the same batches, read in another way."""

import hashlib
import logging
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import Cli
from PIL import Image
from safetensors.torch import load_file
from test_bad_input import signal_after
from yacs.config import CfgNode

from tailtune.configs import machine
from tailtune.configs.atomic_file import temporary_path
from tailtune.configs.errors import UserError
from tailtune.datasets import image_cache
from tailtune.datasets.build_data import build_data
from tailtune.datasets.image_cache import keep_images
from tailtune.datasets.images.ordered_map import ordered_map
from tailtune.datasets.loading import workers as worker_module
from tailtune.datasets.loading.data_loader import FEWEST_IMAGES, chosen_workers, eval_loader, train_loader
from tailtune.datasets.loading.input_times import InputTimes
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.datasets.view import View
from tailtune.trainers.micro_batch_probe import budget_of

Config = Callable[..., CfgNode]
WORDS = ("mine.yaml", "tiny_clip_peft", "pretrained", "none")
Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """JPEG files of different sizes in class folders, and a YAML; the working directory is their folder."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "images" / "train" / ("bee", "ant")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = draw.integers(36, 60, 2)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    Path("mine.yaml").write_text("dataset: ImageFolder\nroot: images\ntest_per_class: 3\n")
    return tmp_path


def train_view(config: Config, *words: object, cache: str | None = None, folder: str = "cache") -> View:
    view = build_data(config(*WORDS, *words)).train
    if cache:
        keep_images(view, cache, Path(folder))
    return view


def digest(view: View, workers: int | None = 0) -> str:
    """Of all training batches of two epochs."""
    found, sampler = hashlib.sha256(), StepSampler(view.labels, 8, 4, seed=3)
    for epoch in range(2):
        sampler.set_position(epoch, 0)
        for batch in train_loader(view, sampler, workers):
            for name in ("image", "label", "index", "weight"):
                found.update(batch[name].contiguous().numpy().tobytes())
    return found.hexdigest()


PLANS = ("lift", "cifar", "digits", "imagenet")
WAYS: list[tuple[str | None, int]] = [("ram", 0), ("disk", 0), ("disk", 0)]
"""Cache and number of workers. The second `disk` reads what the first one wrote."""
EVERY_WAY = [*product((None, "ram", "disk", "disk"), (0, 1, 2, 4))]


@pytest.mark.parametrize(
    ("augment", "ways"),
    [
        *((augment, [(None, 2), ("ram", 1), ("disk", 2), *WAYS] if augment == "lift" else WAYS) for augment in PLANS),
        *(pytest.param(augment, EVERY_WAY, marks=pytest.mark.slow) for augment in PLANS),
    ],
)
def test_the_same_batches_with_a_cache_and_without(
    photographs: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    augment: str,
    ways: list[tuple[str | None, int]],
) -> None:
    monkeypatch.setattr(worker_module, "available_processors", lambda: 4)
    expected = digest(train_view(config, "augment", augment))
    for cache, workers in ways:
        view = train_view(config, "augment", augment, cache=cache)
        assert (view.prepared is not None) == (cache is not None)
        assert digest(view, workers) == expected, (cache, workers)
    assert len(list(Path("cache").glob("*.pixels"))) == 1, "the second run reads the cache of the first"


def test_a_run_killed_with_a_cache_ends_as_one_without(photographs: Path, launch: Cli) -> None:
    words = "-d mine.yaml -m tiny_clip_peft pretrained none num_epochs 1 batch_size 8 save_every 1 max_test_images 4"
    assert launch(f"{words} output_dir plain num_workers 0").returncode == 0
    for cache in ("ram", "disk"):
        run = f"{words} output_dir {cache} cache {cache} cache_dir kept"
        with signal_after(2):
            assert launch(run).returncode == 130
        done = launch(f"{run} num_workers 2")
        assert (
            done.returncode == 0 and "resuming after step" in done.stdout and f"cache {cache}: 24 images" in done.stdout
        )
        plain, cached = (load_file(f"output/{name}/checkpoint/tensors.safetensors") for name in ("plain", cache))
        assert all(torch.equal(plain[name], cached[name]) for name in plain)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_an_unreadable_image_is_reported_as_without_a_cache(photographs: Path, config: Config, cache: str) -> None:
    view = train_view(config, "on_bad_image", "skip")
    bad = Path(view.source.location(int(view.indices[5])))
    bad.write_bytes(bad.read_bytes()[:-200])
    plain = digest(view)
    keep_images(view, cache, Path("cache"))
    assert digest(view) == plain
    view.skip_bad = False
    with pytest.raises(UserError, match=rf"cannot read image .*{bad.name}: image file is truncated"):
        digest(view)


def test_another_cache_for_other_images_or_another_size(photographs: Path, config: Config) -> None:
    words = ("augment", "cifar")
    first = train_view(config, *words, cache="disk")
    path = Path(first.source.location(0))
    smaller = train_view(config, *words, "resolution", 48, cache="disk")
    assert smaller.prepared and smaller.prepared.image(0).shape[-1] >= 48  # type: ignore[union-attr]
    Image.new("RGB", (50, 50), "red").save(path)
    changed = train_view(config, *words, cache="disk")
    assert changed.prepared and (changed.prepared.image(0)[0] > 200).all()  # type: ignore[index]
    assert len(list(Path("cache").glob("*.pixels"))) == 3


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_images_that_do_not_fit_are_not_kept(
    photographs: Path, config: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cache: str
) -> None:
    monkeypatch.setattr(image_cache, "free_memory", lambda: 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(2000, 1000, 1000))
    with caplog.at_level(logging.WARNING, "tailtune"):
        view = train_view(config, cache=cache)
    assert view.prepared is None and f"cache {cache}: the decoded training images take about" in caplog.text
    assert not list(Path("cache").glob("*.pixels"))


def test_a_damaged_cache_and_a_folder_that_cannot_be_written(photographs: Path, launch: Cli) -> None:
    words = "-d mine.yaml -m tiny_clip_peft pretrained none max_steps 1 max_test_images 4 resume False cache disk"
    assert launch(f"{words} cache_dir kept").returncode == 0
    (kept,) = Path("kept").glob("*.pixels")
    kept.write_bytes(kept.read_bytes()[:-1])
    Path("file").write_text("no folder")
    for folder, said in (
        ("kept", f"error: cache disk: {kept} or its .npy file is damaged: delete both"),
        ("file", "choose another `cache_dir`"),
    ):
        done = launch(f"{words} cache_dir {folder}")
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_full_disk_leaves_no_cache(photographs: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match="cache disk: cannot write to cache .No space left on device"):
        train_view(config, cache="disk")
    assert not list(Path("cache").glob("*.npy")) and not list(Path("cache").glob("*.tmp"))


def test_a_cache_may_be_larger_than_the_memory(tmp_path: Path) -> None:
    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    with (tmp_path / "pixels").open("wb") as file:
        file.truncate(size)  # takes no room on the disk
    assert len(image_cache.mapped_file(tmp_path / "pixels")) == size


def test_a_damaged_index(photographs: Path, config: Config) -> None:
    train_view(config, cache="disk")
    (index,) = Path("cache").glob("*.npy")
    for content in (index.read_bytes()[:-1], index.read_bytes()[:20], b"no index", b""):
        index.write_bytes(content)
        with pytest.raises(UserError, match=r"cache disk: .*\.pixels or its \.npy file is damaged: delete both"):
            train_view(config, cache="disk")


def test_what_a_killed_process_left_is_removed(photographs: Path, config: Config) -> None:
    train_view(config, cache="disk")
    (pixels,) = Path("cache").glob("*.pixels")
    left, other = temporary_path(pixels), temporary_path(pixels.with_name("other.pixels"))
    for path in (left, other):
        path.write_bytes(b"half an image")
    pixels.unlink()
    assert train_view(config, cache="disk").prepared and not left.exists()
    assert other.exists(), "another process may be writing it"


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_few_decoded_images_wait_for_the_cache(
    photographs: Path, config: Config, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setattr("tailtune.datasets.images.ordered_map.available_processors", lambda: 1)
    made = used = most = 0

    def counted(function: Callable[[int], object], *rest: Any, **named: Any) -> Iterator[object]:
        def one(item: int) -> object:
            nonlocal made, most
            made += 1
            most = max(most, made - used)
            return function(item)

        nonlocal used
        for result in ordered_map(one, *rest, **named):
            used += 1
            yield result

    monkeypatch.setattr(image_cache, "ordered_map", counted)
    view = train_view(config)
    view = view.take(np.arange(len(view)).repeat(20))
    keep_images(view, cache, Path("cache"))
    assert view.prepared and used == made == len(view) and most <= 5


# --- workers and times -----------------------------------------------------------------------------------------------


def test_a_view_without_images_starts_no_workers(config: Config) -> None:
    view = build_data(config("digits_lt", "tiny_clip_peft", "pretrained", "none")).train.take(np.arange(0))
    for workers in (None, 0, 2):
        loader = eval_loader(view, 4, workers)
        assert list(loader) == [] and loader.num_workers == 0


def test_workers_are_started_for_files_only(photographs: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailtune.datasets.loading.data_loader.available_processors", lambda: 6)
    files = train_view(config, "augment", "cifar")
    assert chosen_workers(files) == 0 and len(files) < FEWEST_IMAGES, "so few images do not need them"
    many = files.take(np.zeros(FEWEST_IMAGES, dtype=np.int64))
    for processes, workers in (("1", 6), ("4", 1), ("8", 0)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert chosen_workers(many) == workers
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    keep_images(many, "ram", Path())
    assert chosen_workers(many) == 0
    crops = train_view(config, "augment", "lift").take(np.zeros(FEWEST_IMAGES, dtype=np.int64))
    keep_images(crops, "ram", Path())
    assert chosen_workers(crops) == 6, "a random crop is resized for each image"
    built_in = build_data(config("digits_lt", "tiny_clip_peft", "pretrained", "none"))
    assert chosen_workers(built_in.train) == 0


def test_memory_is_that_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def group(path: str, limit: object, used: int, cached: int) -> None:
        folder = tmp_path / "groups" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")

    (tmp_path / "own").write_text("1:name=old:/\n0::/job/step\n")
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "missing")
    whole = machine.free_memory()
    assert whole > 10**7
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    assert machine.free_memory() > 10**7, "no such group"
    group("job/step", "max", 5, 0)
    group("job", 9000, 5000, 1000)
    assert machine.free_memory() == 5000
    assert machine.total_memory() == 9000
    assert budget_of(None, torch.device("cpu")) == 9000, "micro_batch_size auto"
    group("job/step", 100, 500, 0)
    assert machine.free_memory() == 0 and machine.total_memory() == 100


@pytest.mark.parametrize(
    ("times", "advice"),
    [
        (InputTimes(2, 4, 100, waited=0.1), "faster loading would hardly help"),
        (InputTimes(2, 4, 100, 5.0, 0, np.array([1.0, 3, 2])), "try num_workers 4"),
        (InputTimes(4, 4, 100, 5.0, 0, np.array([1.0, 3, 2])), "to decode takes longest: try cache ram or cache disk"),
        (InputTimes(2, 4, 100, 5.0, 0, np.array([4.0, 3, 2])), "to read takes longest: try cache ram or cache disk"),
        (InputTimes(0, 4, 100, 0.1, 5.0, np.array([0.0, 0, 2])), "the augmentation takes longest"),
    ],
)
def test_what_the_profile_advises(times: InputTimes, advice: str) -> None:
    text = times.report(3, 10.0)
    assert text.startswith("data of epoch 3: ") and text.endswith(f": {advice}")
    assert times.images == times.waited == times.finished == 0 and not times.stages.any()


def test_the_profile_of_a_run(photographs: Path, launch: Cli) -> None:
    words = "-d mine.yaml -m tiny_clip_peft pretrained none num_epochs 2 max_test_images 4 profile_data True"
    for workers, where in ((0, "in the main process"), (2, "in 2 worker processes")):
        done = launch(f"{words} num_workers {workers} resume False")
        lines = [line for line in done.stdout.splitlines() if "data of epoch" in line]
        assert len(lines) == 2 and all("read " in line and "decode " in line and where in line for line in lines)
