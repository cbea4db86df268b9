"""Logits that are larger than memory: files give the same results, in bounded memory, and nothing is left of them."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Cli, offline
from safetensors.torch import load_file, save
from torch import Tensor

from tailtune.benchmarks import scale
from tailtune.trainers.evaluation import rows as row_module
from tailtune.trainers.evaluation.inference import CollectedLogits, Logits
from tailtune.trainers.evaluation.label_shift import black_box, maximum_likelihood, temperature
from tailtune.trainers.evaluation.logit_files import UNREAD, save_logits, stored_logits
from tailtune.trainers.evaluation.rows import HalfRows, MadeRows
from tailtune.trainers.evaluation.zero_shot_ensembles import pretraining_prior
from tailtune.trainers.option_schema import declared
from tailtune.trainers.storage import large_tensors
from tailtune.trainers.storage.large_tensors import FileTensor, Scratch

N, E, C = 50, 3, 7
RUN = "-d fake_lt -m tiny_clip pretrained none num_experts 3 max_steps 2 batch_size 16 num_workers 0 output_dir run"
DISTS = "test_dists forward10,uniform,backward10"


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every array is large: it lies in a file and is read a few rows at a time."""
    monkeypatch.setattr(large_tensors, "IN_MEMORY", 0)
    monkeypatch.setattr(row_module, "CHUNK_ELEMENTS", 50)


def some_logits(*shape: int) -> Tensor:
    return 5 * torch.randn(*(shape or (N, E, C)), generator=torch.Generator().manual_seed(0))


def collected(logits: Tensor, kept: Tensor, scratch: Scratch) -> Logits:
    """Logits that arrive in batches, of which some images are unreadable."""
    found = CollectedLogits(len(logits), scratch, summarised=True)
    found.reserve(logits.shape[1:])
    for batch in torch.arange(len(logits)).flip(0).split(8):  # several processes do not give them in order
        batch = batch[torch.isin(batch, kept)]
        found.add(logits[batch], batch % C, batch)
    result = found.all()
    assert result is not None
    return result


def test_logits_in_files_are_those_in_memory(files: None, tmp_path: Path) -> None:
    logits, kept = some_logits(), torch.tensor([each for each in range(N) if each % 6])
    found = collected(logits, kept, Scratch(tmp_path))
    assert isinstance(found.logits, HalfRows) and not list(tmp_path.iterdir()), "the file has no name"
    assert found.index.tolist() == kept.tolist() and found.bad_images == N - len(kept)
    assert torch.allclose(found.logits[:], logits[kept], atol=0.01)
    assert torch.equal(found.logits[torch.tensor([3, 3, 0])], found.logits[:][[3, 3, 0]])
    exact = Logits(logits[kept], found.labels, found.index).summary
    for name in ("classes", "confidence", "nll", "labels"):  # measured before the logits are rounded
        assert torch.equal(getattr(found.summary.predictions, name), getattr(exact.predictions, name))
    assert found.summary.finite.all() and found.summary.asked.all()


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_logits_that_are_not_finite_are_found_in_files(bad: float, files: None, tmp_path: Path) -> None:
    logits = some_logits()
    logits[20, 1, 3] = bad
    finite = collected(logits, torch.arange(N), Scratch(tmp_path)).summary.finite
    assert (~finite).nonzero().tolist() == [[20, 1]]


@pytest.mark.parametrize("in_files", [False, True])
def test_the_format_of_the_file_is_that_of_the_library(
    in_files: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if in_files:
        request.getfixturevalue("files")
    found = collected(some_logits(), torch.arange(N), Scratch(tmp_path))
    digest = save_logits(tmp_path / "logits.safetensors", found, {"key": "ä"})
    written = (tmp_path / "logits.safetensors").read_bytes()
    about = json.dumps({"key": {"key": "ä"}, "bad_images": 0, "left_out": 0})
    assert written == save(load_file(tmp_path / "logits.safetensors"), {"about": about})
    digest.check(tmp_path / "logits.safetensors")
    stored = stored_logits(tmp_path, {"key": "ä"})
    assert stored is not None and torch.allclose(stored[1].logits[:], some_logits(), atol=0.01)
    again = save_logits(tmp_path / "copy" / "logits.safetensors", stored[1], {"key": "ä"})
    assert again == digest, "a copy of stored logits is not rounded again"


def test_options_that_change_no_logits_do_not_count(tmp_path: Path) -> None:
    """The views of `tte` without it, and the margin of the one crop with it."""
    for tte, names in UNREAD.items():
        assert all(declared().readers[name] in (["tte"], ["tte False"]) for name in names)
        found = Logits(some_logits(), torch.arange(N) % C, torch.arange(N))
        save_logits(tmp_path / "logits.safetensors", found, {"tte": tte, "other": 1, **dict.fromkeys(names, 3)})
        assert stored_logits(tmp_path, {"tte": tte, "other": 1, **dict.fromkeys(names, 4)}) is not None
        assert stored_logits(tmp_path, {"tte": not tte, "other": 1, **dict.fromkeys(names, 3)}) is None
        for name in UNREAD[not tte]:
            assert stored_logits(tmp_path, {"tte": tte, "other": 1, name: 3}) is None
    read_by_tte = {key for key, readers in declared().readers.items() if {*readers} & {"tte", "tte False"}}
    assert read_by_tte == {name for names in UNREAD.values() for name in names}


def test_stored_logits_outlive_a_file_that_replaces_theirs(tmp_path: Path) -> None:
    path, found = tmp_path / "logits.safetensors", Logits(some_logits(), torch.arange(N) % C, torch.arange(N))
    save_logits(path, found, {})
    stored = stored_logits(tmp_path, {})
    save_logits(path, Logits(torch.zeros(1, 1, 2), torch.zeros(1), torch.zeros(1)), {})
    assert stored is not None and torch.allclose(stored[1].logits[:], some_logits(), atol=0.01)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: (2).to_bytes(8, "little") + b"[]",
        lambda content: content.replace(b"I64", b"I32"),
        lambda content: content.replace(b"row_max", b"row_min"),
        lambda content: content.replace(b"about", b"above"),
    ],
)
def test_a_file_that_holds_something_else_is_ignored(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    """It lies in no run's folder, so no checksum is known."""
    path, found = tmp_path / "logits.safetensors", Logits(some_logits(), torch.arange(N) % C, torch.arange(N))
    save_logits(path, found, {})
    assert stored_logits(tmp_path, {}) is not None and stored_logits(tmp_path, {"other": 1}) is None
    path.write_bytes(damage(path.read_bytes()))
    assert stored_logits(tmp_path, {}) is None


def test_estimates_do_not_depend_on_where_the_scores_lie(files: None, tmp_path: Path) -> None:
    scores, labels, scratch = some_logits(N, C), torch.arange(N) % C, Scratch(tmp_path)
    read = MadeRows((N, C), lambda rows: scores[rows])
    streamed = (
        maximum_likelihood(read, scratch),
        black_box(read, read, labels),
        torch.tensor(temperature(read, torch.zeros(C), labels)),
        pretraining_prior(read, labels, scratch),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(large_tensors, "IN_MEMORY", 10**6)
        patch.setattr(row_module, "CHUNK_ELEMENTS", 10**6)
        whole = (
            maximum_likelihood(scores),
            black_box(scores, scores, labels),
            torch.tensor(temperature(scores, torch.zeros(C), labels)),
            pretraining_prior(scores, labels),
        )
    for one, other in zip(streamed, whole, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)
    assert not list(tmp_path.iterdir())


def results(launch: Cli, words: str) -> dict[str, Any]:
    done = launch(RUN, DISTS, words)
    assert done.returncode == 0, done.stderr
    names = [path.name for path in Path("output/run").iterdir()]
    assert not [name for name in names if "tmp" in name]
    content: dict[str, Any] = json.loads(Path("output/run/metrics.json").read_text())
    return content


@pytest.mark.parametrize("predictor", ["adapt sade", "adapt sade_online", "target_prior estimate"])
def test_an_evaluation_with_files_has_the_same_result(
    predictor: str, launch: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"{predictor} adapt_epochs 2 adapt_batch_size 8" if "adapt" in predictor else predictor
    whole = results(launch, words)
    monkeypatch.setattr(large_tensors, "IN_MEMORY", 0)
    streamed = results(launch, f"{words} resume False")
    assert streamed["test"] == whole["test"]
    for name, found in streamed["distributions"].items():
        wanted = whole["distributions"][name]["predictors"]
        assert found["predictors"]["plain"] == wanted["plain"]
        entry = "target_prior" if "estimate" in predictor else predictor.split()[1]
        own, other = found["predictors"][entry], wanted[entry]
        for key in ("weights", "similarity", "nll", "prior"):
            assert own.get(key) == pytest.approx(other.get(key), abs=2e-4)


def test_a_full_disk_is_one_line_before_the_views_are_read(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    results(launch, "")
    before = {path: path.read_bytes() for path in Path("output/run").rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(large_tensors, "IN_MEMORY", 0)
    monkeypatch.setattr(os, "posix_fallocate", full)
    done = launch(RUN, DISTS, "test_only True adapt sade")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "No space left" in done.stderr and "output_dir" in done.stderr and "output/run" in done.stderr
    after = {path: path.read_bytes() for path in Path("output/run").rglob("*") if path.is_file()}
    changed = {path.name for path in after if before.get(path) != after[path]}
    assert changed == {"log.txt", "tailtune.json", "logits.safetensors"}, "whole logits of the images, and no result"


def test_a_tensor_in_a_file_is_read_and_written_as_one_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(large_tensors, "IN_MEMORY", 0)
    tensor, wanted = Scratch(tmp_path).empty((100, 2, 5)), torch.randn(100, 2, 5)
    assert isinstance(tensor, FileTensor)
    for rows in torch.randperm(100).split(7):
        tensor[rows] = wanted[rows]
    for part in (slice(None), slice(3, 5), slice(90, 300), torch.tensor([5, 0, 1, 2, 2]), torch.tensor([], dtype=int)):
        assert torch.equal(tensor[part], wanted[part])
    tensor[2:4] = wanted[:2].double()  # it is converted, as in memory
    assert torch.equal(tensor[0:5], wanted[[0, 1, 0, 1, 4]])


PEAK = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
import tailtune
import torch
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.trainers.evaluation.distributions import plain_results
from tailtune.trainers.evaluation.expert_weights import Learner, Recipe
from tailtune.trainers.evaluation.inference import CollectedLogits
from tailtune.trainers.evaluation.label_shift import maximum_likelihood
from tailtune.trainers.evaluation.logit_files import save_logits, stored_logits
from tailtune.trainers.evaluation.metrics import evaluate
from tailtune.trainers.evaluation.scores import scores_of, shifted
from tailtune.trainers.storage.large_tensors import Scratch

torch.set_num_threads(1)
N, E, C = 10_000, 3, 2000
GROUPS = dict(zip(("many", "med", "few"), torch.arange(C).chunk(3)))


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def collect(*views):
    found = CollectedLogits(N, Scratch(Path()), not views)
    found.reserve((*views, E, C))
    for batch in torch.arange(N).split(100):
        found.add(torch.randn(len(batch), *views, E, C), batch % C, batch)
    return found.all()


def work(name):
    global logits
    if name == "evaluation":
        logits = collect()
        shifts = [TestDistribution("all", torch.ones(C), torch.arange(N), "")]
        plain_results(logits, shifts, GROUPS)
        save_logits(Path("logits.safetensors"), logits, {{}})
    if name == "stored":
        logits = stored_logits(Path(), {{}})[1]
        assert logits.summary.finite.all()
        save_logits(Path("copy.safetensors"), logits, {{}})
    if name == "sade":
        learner = Learner("all", logits, torch.arange(N), Recipe(epochs=1))
        learner.learn(collect(2))
        evaluate(learner.predictions()[0], logits.labels, GROUPS)
    if name == "estimate":
        scores = scores_of(logits, 1.0, torch.zeros(C))
        prior = maximum_likelihood(scores, Scratch(Path()))
        evaluate(shifted(scores, prior.unsqueeze(0)), logits.labels, GROUPS)


torch.optim.SGD([torch.randn(100, 2, E, C).softmax(-1)], 0.1)  # this imports much
for name in ("evaluation", "stored", "sade", "estimate"):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is measured from here on
    before = peak()
    work(name)
    print(name, (peak() - before) / (N * E * C))
"""
"""Prints the growth of the peak in bytes for each of the stored logits, which take two bytes."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_logits(tmp_path: Path) -> None:
    """The growth in bytes for each of 60 million logits; in fp32, these and their views would take 4 and 8 bytes."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=tmp_path, env=offline(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    grown = {name: float(number) for name, number in (line.split() for line in done.stdout.splitlines())}
    assert grown.keys() == {"evaluation", "stored", "sade", "estimate"} and max(grown.values()) < 1, grown


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_benchmark_makes_data_of_a_size(tmp_path: Path) -> None:
    scale.make_data(tmp_path, scale.Size(70, 25, 10, ("adapt_lr: 0.2",)))
    labels = {
        split: torch.tensor([int(line.split()[1]) for line in (tmp_path / f"{split}.txt").read_text().splitlines()])
        for split in ("train", "test")
    }
    counts = {split: found.bincount().tolist() for split, found in labels.items()}
    assert sum(counts["train"]) == 70 and sorted(counts["train"], reverse=True) == counts["train"]
    assert min(counts["train"]) >= 1 and counts["test"] == [3] * 5 + [2] * 5
    assert (tmp_path / "images/0.jpg").stat().st_nlink == 96 and "adapt_lr: 0.2" in (
        tmp_path / "scale.yaml"
    ).read_text()


@pytest.mark.slow
def test_the_benchmark_prints_a_row_for_each_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/scale.py"), "--dir", str(tmp_path), "--classes", "10"]
    for words, code in ((["--train", "70", "--test", "20"], 0), (["--train", "71", "--test", "20"], 1)):
        done = subprocess.run([*command, *words], env=offline(), capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stderr
        if not code:
            assert [line.split("|")[1].strip() for line in done.stdout.splitlines()[5:]] == list(scale.COMMANDS)
    assert "another size" in done.stderr and done.stderr.count("\n") == 1
