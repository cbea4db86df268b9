"""Training from tar shards: the same batches as from files, from a folder or a server, and what damage ends in."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from conftest import Cli
from PIL import Image
from safetensors.torch import load_file
from shard_server import ShardServer
from test_bad_input import one_line, signal_after
from tiers import slow_except
from yacs.config import CfgNode

from tailtune import main
from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.loading import workers as worker_module
from tailtune.datasets.loading.data_loader import eval_loader, train_loader
from tailtune.datasets.loading.samplers import StepSampler, balanced, shuffle
from tailtune.datasets.sources import shard_store
from tailtune.datasets.sources.path_list import PathList
from tailtune.datasets.sources.shard_index import read_index
from tailtune.datasets.sources.shards import ShardSource, open_shards

Config = Callable[..., CfgNode]
CLASSES = (("ant", 14), ("bee", 10), ("fly", 6))
TRAIN = "-m tiny_clip_peft pretrained none num_epochs 1 batch_size 8 save_every 1 num_workers 0"


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    size = (int(random.integers(30, 60)), int(random.integers(30, 60)), 3)
    Image.fromarray(random.integers(0, 256, size, dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `files` and `shards` copy."""
    folder = tmp_path_factory.mktemp("insects")
    for label, (name, count) in enumerate(CLASSES):
        for index in range(count):
            draw(folder / "pics/train" / name / f"{index:03d}.{'png' if index % 3 else 'jpg'}", 100 * label + index)
        for index in range(4):
            draw(folder / "pics/test" / name / f"{index}.png", 1000 + 100 * label + index)
    (folder / "insects.yaml").write_text("dataset: ImageFolder\nroot: pics\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.main(["data", "shard", "insects.yaml", "--out", "shards", "--max-size", "60KB"]) == 0
    return folder


@pytest.fixture
def files(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders of JPEG and PNG images of different sizes, and their YAML `insects.yaml`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shard_store, "FIRST_WAIT_SECONDS", 0.001)
    shutil.copytree(drawn / "pics", tmp_path / "pics")
    return Path(shutil.copy(drawn / "insects.yaml", tmp_path))


@pytest.fixture
def shards(drawn: Path, files: Path) -> Path:
    """The same images as shards; their YAML."""
    return Path(shutil.copytree(drawn / "shards", files.parent / "shards")) / "insects.yaml"


@pytest.fixture
def server(shards: Path) -> Iterator[ShardServer]:
    server = ShardServer(shards.parent)
    yield server
    server.close()


def digests(batches: object) -> list[str]:
    """A digest of everything in each batch."""
    found = []
    for batch in batches:  # type: ignore[attr-defined]
        digest = hashlib.sha256()
        for name in ("image", "partner", "label", "index", "weight"):
            for tensor in batch[name] if isinstance(batch.get(name), list) else [batch.get(name)]:
                digest.update(b"" if tensor is None else tensor.contiguous().numpy().tobytes())
        found.append(digest.hexdigest())
    return found


def epochs(cfg: CfgNode, workers: int, pair: bool = False) -> list[str]:
    """Digests of the training batches of two epochs, and of the test batches."""
    data = build_data(cfg)
    order = {"order": balanced, "pair": shuffle} if pair else {}
    sampler = StepSampler(data.train.labels, 8, 4, seed=3, **order)
    found = []
    for epoch in range(2):
        sampler.set_position(epoch, 0)
        found += digests(train_loader(data.train, sampler, workers))
    return found + digests(eval_loader(data.test, 5, workers))


# --- the same batches ----------------------------------------------------------------------------------------------


WAYS = [(False, 0), (False, 1), (False, 4), (True, 0), (True, 2)]


@pytest.mark.parametrize(("pair", "workers"), slow_except([(False, 0), (True, 2)], WAYS))
def test_files_and_shards_give_the_same_batches(
    files: Path, shards: Path, config: Config, monkeypatch: pytest.MonkeyPatch, pair: bool, workers: int
) -> None:
    monkeypatch.setattr(worker_module, "available_processors", lambda: 4)
    expected = epochs(config("insects.yaml", "tiny_clip_peft", "pretrained", "none"), 0, pair)
    assert len(expected) == len(set(expected)) == 8 + 8 + 3
    cfg = config("shards/insects.yaml", "tiny_clip_peft", "pretrained", "none")
    assert epochs(cfg, workers, pair) == expected


def test_the_ranks_of_a_run_share_each_batch(files: Path, shards: Path, config: Config) -> None:
    data = build_data(config("shards/insects.yaml", "tiny_clip_peft", "pretrained", "none"))
    whole = torch.cat(
        [batch["index"] for batch in train_loader(data.train, StepSampler(data.train.labels, 8, 8, 0), 0)]
    )
    parts = [
        [batch["index"] for batch in train_loader(data.train, StepSampler(data.train.labels, 8, 8, 0, rank, 2), 0)]
        for rank in range(2)
    ]
    assert torch.equal(torch.cat([torch.cat(pair) for pair in zip(*parts, strict=True)]), whole)


def checkpoint(name: str) -> dict[str, torch.Tensor]:
    return load_file(Path("output") / name / "checkpoint/tensors.safetensors")


def test_a_run_killed_in_an_epoch_ends_as_one_on_files(launch: Cli, shards: Path) -> None:
    assert launch(f"-d insects.yaml {TRAIN} output_dir files").returncode == 0
    words = f"-d shards/insects.yaml {TRAIN} output_dir shards"
    with signal_after(2):
        assert launch(words).returncode == 130
    done = launch(words)
    assert done.returncode == 0 and "resuming after step 2" in done.stdout
    whole, killed = checkpoint("files"), checkpoint("shards")
    assert whole.keys() == killed.keys() and all(torch.equal(whole[name], killed[name]) for name in whole)


def test_a_run_on_files_is_evaluated_on_shards(launch: Cli, shards: Path) -> None:
    """The index has the paths of the files, so the images are known again."""
    assert launch(f"-d insects.yaml {TRAIN} max_steps 1 output_dir files").returncode == 0
    done = launch(f"-d shards/insects.yaml {TRAIN} max_steps 1 output_dir shards test_only True model_dir output/files")
    assert done.returncode == 0 and "12 test images" in done.stdout
    assert not any(word in done.stdout for word in ("are new", "are gone", "trained on"))


def test_subsets_and_held_out_images_are_those_of_the_files(launch: Cli, files: Path, config: Config) -> None:
    (files.parent / "insects.yaml").write_text("dataset: ImageFolder\nroot: pics\nimb_factor: 0.3\nval_per_class: 2\n")
    (files.parent / "pics/test").rename(files.parent / "away")
    with files.open("a") as file:
        file.write("test_per_class: 1\n")
    assert launch("data shard insects.yaml --out shards").returncode == 0
    found = [build_data(config(f"{folder}insects.yaml", "tiny_clip_peft")) for folder in ("", "shards/")]
    assert found[0].records == found[1].records and set(found[0].records) == {"train", "test", "val"}
    assert found[0].info.class_counts.tolist() == found[1].info.class_counts.tolist()
    assert json.loads(json.dumps(found[1].info.class_names)) == ["ant", "bee", "fly"]


def test_a_dry_run_reads_no_shard(launch: Cli, shards: Path) -> None:
    for tar in shards.parent.glob("*.tar"):
        tar.unlink()
    done = launch(f"-d shards/insects.yaml {TRAIN} --dry-run")
    assert done.returncode == 0 and "classes     3 with 14 … 6 training images, 30 in all" in done.stdout


# --- servers -------------------------------------------------------------------------------------------------------


def test_a_server_gives_the_same_batches(files: Path, server: ShardServer, config: Config) -> None:
    expected = epochs(config("insects.yaml", "tiny_clip_peft", "pretrained", "none"), 0)
    cfg = config("shards/insects.yaml", "tiny_clip_peft", "pretrained", "none", "root", server.url)
    assert build_info(cfg).class_counts.tolist() == [14, 10, 6] and not server.parts
    for workers in (0, 2):
        assert epochs(cfg, workers) == expected
    assert {stop - start for _, start, stop in server.parts} == {
        path.stat().st_size for path in Path("pics").rglob("*.*g")
    }, "only the bytes of images are asked for"
    assert len(server.parts) == 2 * (2 * 30 + 12), "and each once in an epoch"


def test_a_file_system_in_memory(files: Path, shards: Path, config: Config) -> None:
    memory = fsspec.filesystem("memory")
    for path in shards.parent.iterdir():
        memory.pipe_file(f"/insects/{path.name}", path.read_bytes())
    expected = epochs(config("insects.yaml", "tiny_clip_peft", "pretrained", "none"), 0)
    assert epochs(config("shards/insects.yaml", "tiny_clip_peft", "root", "memory://insects/"), 2) == expected
    memory.rm("/insects", recursive=True)


def test_a_connection_that_breaks_in_training_ends_in_one_line(
    launch: Cli, server: ShardServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_module, "available_processors", lambda: 4)
    words = f"-d shards/insects.yaml {TRAIN} max_test_images 4 init_head none root {server.url}"
    assert launch(f"{words} output_dir whole").returncode == 0
    whole = checkpoint("whole")
    for workers in (0, 2):
        command = f"{words} num_workers {workers} output_dir broken_{workers}"
        server.answers_left = 20
        line = one_line(launch(command), "cannot read http://127.0.0.1", "the same command continues")
        assert "train-0000" in line and "(4 attempts)" in line
        server.answers_left = None
        done = launch(command)
        assert done.returncode == 0 and ("resuming after step" in done.stdout or workers)
        broken = checkpoint(f"broken_{workers}")
        assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_an_answer_that_fails_once_is_asked_for_again(server: ShardServer) -> None:
    source = open_shards(server.url).by_split["train"]
    server.answers_left = 0
    source.prefetch([3, 4])
    server.answers_left = 1
    assert source.load(3).mode == "RGB"
    with pytest.raises(UserError, match="cannot read http.*4 attempts"):
        source.load(4)


def test_a_finished_run_is_shown_without_its_server(launch: Cli, server: ShardServer) -> None:
    words = f"-d shards/insects.yaml {TRAIN} max_steps 1 init_head none root {server.url} output_dir run"
    assert launch(words).returncode == 0
    assert "finished before" in launch(words).stdout
    server.is_down = True
    done = launch(words)
    assert done.returncode == 0 and "the data are not there to be compared" in done.stdout, done.stderr
    assert "finished before" in done.stdout


def test_a_server_without_ranges(launch: Cli, server: ShardServer) -> None:
    server.knows_ranges = False
    one_line(launch(f"-d shards/insects.yaml {TRAIN} root {server.url}"), "the server sends the whole file")


@pytest.mark.parametrize(
    ("root", "parts"),
    [
        ("zip://insects::file:///nowhere.zip", ("root zip://insects::file:///nowhere.zip: ", "/nowhere.zip")),
        ("nowhere://bucket/insects", ("root nowhere://bucket/insects", "nowhere", "give a folder, or an address")),
        ("http://127.0.0.1:9/insects", ("cannot read http://127.0.0.1:9/insects/train.index.safetensors", "attempts")),
        ("elsewhere", ("index of the train shards not found: ", "elsewhere/train.index.safetensors (set `root`")),
    ],
)
def test_addresses_that_lead_nowhere(launch: Cli, shards: Path, root: str, parts: tuple[str, ...]) -> None:
    one_line(launch(f"-d shards/insects.yaml {TRAIN} root {root}"), *parts)


def test_a_package_that_is_missing_is_named(launch: Cli, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    one_line(launch(f"-d shards/insects.yaml {TRAIN} root s3://bucket/insects"), "Install s3fs to access S3")


def test_only_shards_have_addresses(launch: Cli, files: Path) -> None:
    one_line(launch(f"-d insects.yaml {TRAIN} root https://host/pics"), "only `dataset: Shards` reads from an address")


# --- damage --------------------------------------------------------------------------------------------------------


def spoil(shards: Path, path: str) -> str:
    """Change one byte of an image; the name of its shard."""
    source = open_shards(shards.parent).by_split["train"]
    index, position = source.index, list(source.paths).index(path)
    name = index.shards[index.shard[position]].name
    content = bytearray((shards.parent / name).read_bytes())
    content[index.offset[position] + index.size[position] // 2] ^= 1
    (shards.parent / name).write_bytes(content)
    return name


def test_a_flipped_bit_is_found(launch: Cli, shards: Path) -> None:
    name = spoil(shards, "train/bee/004.png")
    where = f"shards/{name}: train/bee/004.png: its bytes are not those that were indexed"
    one_line(launch(f"-d shards/insects.yaml {TRAIN}"), f"{where}: {name} is damaged or of another set")
    done = launch(f"-d shards/insects.yaml {TRAIN} max_steps 1 on_bad_image skip output_dir skips")
    assert done.returncode == 0 and "1 of 30 training images cannot be read and are left out" in done.stdout
    found = launch("data verify shards/insects.yaml --decode")
    assert found.returncode == 1 and "train/bee/004.png: its bytes are not those" in found.stdout
    assert launch("data verify shards/insects.yaml").returncode == 0, "without --decode, no image is read"


def test_verify_finds_copies_in_other_splits(launch: Cli, files: Path) -> None:
    copies = Path("pics/test/ant")
    (copies / "same.png").write_bytes(Path("pics/train/ant/001.png").read_bytes())
    smooth = Image.effect_mandelbrot((64, 64), (-2, -1, 1, 1), 20).convert("RGB")
    smooth.save("pics/train/fly/smooth.png")
    smooth.point(lambda value: value * 7 // 8).save("pics/test/fly/darker.png")
    assert launch("data shard insects.yaml --out shards").returncode == 0
    found = launch("data verify shards/insects.yaml --near --report report.json")
    assert found.returncode == 1 and found.stdout.endswith("problems: 1 image is in several splits\n")
    report = json.loads(Path("report.json").read_text())
    assert report["root"] == str(Path("shards").absolute()) and report["decoded"]
    same = [{"split": "train", "path": "train/ant/001.png"}, {"split": "test", "path": "test/ant/same.png"}]
    assert report["duplicates"]["exact"] == [same]
    near = {(pair["a"], pair["b"]) for pair in report["duplicates"]["near"]}
    assert near == {("train: train/fly/smooth.png", "test: test/fly/darker.png")}


@pytest.mark.parametrize(
    ("harm", "said", "verified"),
    [
        (lambda tar: tar.unlink(), "not found: its shard is missing", "test images are missing"),
        (lambda tar: tar.write_bytes(tar.read_bytes()[:-900]), "it is cut short or of another set", "are unreadable"),
    ],
    ids=["missing", "cut"],
)
def test_a_shard_that_is_missing_or_cut(
    launch: Cli, shards: Path, server: ShardServer, harm: Callable[[Path], None], said: str, verified: str
) -> None:
    harm(shards.parent / "test-00000.tar")
    for root in ("shards", server.url):
        line = one_line(launch(f"-d shards/insects.yaml {TRAIN} root {root}"), "test-00000.tar: test/ant/0.png: ")
        assert said in line
        done = launch(f"data verify shards/insects.yaml root {root}")
        assert done.returncode == 1 and verified in done.stdout and "/test-00000.tar: " in done.stdout


def test_a_shard_that_is_cut_while_it_is_read(shards: Path) -> None:
    source = open_shards(shards.parent).by_split["test"]
    (shards.parent / "test-00000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="test-00000.tar ends before the image does"):
        source.load(0)
    (shards.parent / "test-00000.tar").unlink()
    with pytest.raises(UserError, match="cannot read image .*test/ant/0.png: not found"):
        open_shards(shards.parent).by_split["test"].load(0)


def index_file(shards: Path, split: str = "train") -> Path:
    return shards.parent / f"{split}.index.safetensors"


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: f("test").unlink(), "index of the test shards not found: .*/shards/test.index"),
        (lambda f: f("test").write_bytes(f("train").read_bytes()), "is the index of the split train: rename it"),
        (
            lambda f: f().write_bytes(f().read_bytes().replace(b'\\"version\\": 1', b'\\"version\\": 7')),
            "has version 7",
        ),
        (lambda f: f().write_bytes(f().read_bytes()[:-5]), "is damaged or no index of shards"),
        (lambda f: f().write_bytes(b""), "is damaged or no index of shards"),
        (
            lambda f: f().write_bytes(f().read_bytes().replace(b"train-00000.tar", b"../in-00000.tar")),
            "cannot be called",
        ),
        (lambda f: f("test").write_bytes(f("test").read_bytes().replace(b"ant", b"cat", 1)), "it is of another set"),
    ],
)
def test_an_index_that_is_wrong(launch: Cli, shards: Path, harm: Callable[..., None], said: str) -> None:
    import re

    harm(lambda split="train": index_file(shards, split))
    line = one_line(launch(f"-d shards/insects.yaml {TRAIN} --dry-run"))
    assert re.search(said, line), line


def test_no_damaged_index_does_anything_else(shards: Path) -> None:
    content, random = index_file(shards).read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(content)
        for place in random.integers(0, len(content), 3):
            changed[place] = int(random.integers(0, 256))
        try:
            source = read_index(bytes(changed), "train.index.safetensors", "train")
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert len(list(source.paths)) == len(source.labels) == 30


# --- parts ---------------------------------------------------------------------------------------------------------


def test_a_source_of_shards(shards: Path) -> None:
    source = open_shards(shards.parent).by_split["train"]
    assert isinstance(source, ShardSource) and len(source) == 30 and len(source.index.shards) > 1
    path = Path("pics") / source.paths[3]
    assert source.encoded(3) == path.read_bytes() == source.read(source.paths[3])
    assert source.sha256(3) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert source.location(3) == f"{shards.parent}/train-00000.tar: train/ant/003.jpg"
    assert source.has("train/ant/003.jpg") and not source.has("train/ant/003.jp") and not source.has("")


def test_few_bytes_an_image(shards: Path) -> None:
    index = open_shards(shards.parent).by_split["train"].index
    columns = (index.labels, index.shard, index.offset, index.size, index.crc32, index.paths.packed()[1])
    assert sum(column.itemsize for column in columns) <= 30


def test_many_shards_need_few_open_files(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, open_regular = [], shard_store.open_regular
    monkeypatch.setattr(shard_store, "MAX_OPEN_FILES", 1)
    monkeypatch.setattr(shard_store, "open_regular", lambda path: opened.append(path.name) or open_regular(path))
    source = open_shards(shards.parent).by_split["train"]
    for index, path in enumerate(source.paths):
        assert source.encoded(index) == (Path("pics") / path).read_bytes()
    first = source.index.shards[0].name
    assert opened.count(first) == 1, "the first shard stays open"
    assert len(opened) - opened.count(first) - 2 == (source.index.shard > 0).sum(), "and the two indexes were read"


def test_paths_are_found_in_a_block() -> None:
    paths = PathList(["a/b", "a/bc", "", "c", "b"])
    assert [paths.position(path) for path in ("a/b", "a/bc", "c", "b", "bc", "", "/")] == [0, 1, 3, 4, None, None, None]
    assert PathList.of_block(*paths.packed()) == paths
    assert paths.at(np.array([3, 1])).position("a/bc") == 1
