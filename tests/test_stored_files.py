"""Stored files are believed only while they are what the run wrote: else they are made again, or one line says so."""

import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file, save_file
from test_bad_input import RUN, SHORT, interrupted, one_line, states, unfinished  # noqa: F401
from tiers import slow_except

from tailtune import main
from tailtune.trainers.storage.atomic_io import Damaged, new_folder
from tailtune.trainers.storage.manifest import MARKER, Manifest, read_json
from tailtune.trainers.storage.tensor_files import read_folder, write_folder

FILES = (
    *("config.yaml", "metrics.json", "logits.safetensors", "splits/splits.json"),
    *("checkpoint/facts.json", "checkpoint/tensors.safetensors"),
)

EACH_FILE = [*zip(FILES, ("flipped", "gone") * 3, strict=True)]


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.unlink() if how == "gone" else path.write_bytes(content[:-3] if how == "cut" else content)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of four steps, not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.main(SHORT.split()) == 0
    return folder / RUN


@pytest.fixture
def own_run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy of it in this test's scratch folder."""
    shutil.copytree(whole_run, tmp_path / RUN)
    return tmp_path / RUN


@pytest.mark.parametrize(("name", "how"), slow_except(EACH_FILE, product(FILES, ("flipped", "cut", "gone"))))
def test_a_damaged_file_changes_no_number(launch: Cli, own_run: Path, name: str, how: str) -> None:
    """The command that trained the run, and one that answers from what it stored."""
    whole = json.loads((own_run / "metrics.json").read_text())["test"]
    spoil(own_run / name, how)
    for words, home in (
        (f"{SHORT} test_only True many_above 5", own_run / "tests/many_above_5_max_test_images_20"),
        (SHORT, own_run),
    ):
        ended = launch(words)
        if ended.returncode:
            one_line(ended, "output/run")
        else:
            result = json.loads((home / "metrics.json").read_text())["test"]
            assert result["per_class_acc"] == whole["per_class_acc"]


def test_rows_that_were_swapped(launch: Cli, own_run: Path) -> None:
    path = own_run / "logits.safetensors"
    tensors = load_file(path)
    tensors["logits"] = tensors["logits"].flip(0)
    save_file(tensors, path)
    done = launch(f"{SHORT} test_only True many_above 5")
    assert done.returncode == 0 and "using the logits" not in done.stdout


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"steps": 3', '"steps": 9'),
        ('"steps": 3', '"steps": 1'),
        ('"epochs"', '"epoch5"'),
        ('"threads": 1', '"threads": 0'),
    ],
)
def test_an_edited_state_gives_way_to_the_one_before(
    launch: Cli,
    whole_run: Path,
    unfinished: Path,  # noqa: F811
    before: str,
    after: str,
) -> None:
    facts = states(unfinished)[-1] / "facts.json"
    assert before in facts.read_text()
    facts.write_text(facts.read_text().replace(before, after))
    done = launch(SHORT)
    assert done.returncode == 0 and "going back to the state before it" in done.stdout
    assert "resuming after step 2" in done.stdout
    ours, whole = (read_folder(run / "checkpoint")[0] for run in (unfinished, whole_run))
    assert all(torch.equal(ours[name], each) for name, each in whole.items())


def test_a_state_that_was_not_taken_down_is_not_used(launch: Cli, unfinished: Path) -> None:  # noqa: F811
    """A kill came between the state and the list of checksums, or someone copied it in."""
    shutil.copytree(states(unfinished)[-1], unfinished / "state" / "00000004")
    assert "resuming after step 3" in launch(SHORT).stdout


def test_nothing_is_read_before_its_size_is_known(tmp_path: Path) -> None:
    """A header may ask for more than any memory; the file's size says so first."""
    marker = Manifest.new(tmp_path)
    marker.own("checkpoint")
    marker.seal(write_folder(tmp_path / "checkpoint", {"a": torch.zeros(3)}, {}))
    path = tmp_path / "checkpoint" / "tensors.safetensors"
    with path.open("r+b") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(Damaged, match="1000000000000 bytes instead of"):
        read_folder(tmp_path / "checkpoint")


def test_a_folder_that_is_replaced_keeps_what_it_did_not_write(tmp_path: Path) -> None:
    write_folder(tmp_path / "x", {"a": torch.zeros(3)}, {})
    (tmp_path / "x" / "notes.txt").write_text("mine")
    write_folder(tmp_path / "x", {"a": torch.ones(3)}, {})
    assert (tmp_path / "x" / "notes.txt").read_text() == "mine"
    (tmp_path / "x").rename(tmp_path / ".x.0123abcd.old.tmp")  # killed between the two renames
    with new_folder(tmp_path / "x") as folder:
        (folder / "other.txt").write_text("new")
    assert {each.name for each in (tmp_path / "x").iterdir()} >= {"notes.txt", "other.txt"}


def test_the_marker(tmp_path: Path) -> None:
    assert Manifest.read(tmp_path) is None
    marker = Manifest.new(tmp_path)
    (tmp_path / "mine").write_text("x")
    with pytest.raises(Exception, match="mine was not made by the run"):
        marker.own("mine")
    assert not (tmp_path / MARKER).exists()
    marker.own("facts.json")
    again = Manifest.read(tmp_path)
    assert again is not None and (again.run, again.made) == (marker.run, ["facts.json"])
    (tmp_path / "facts.json").write_text("{}")
    with pytest.raises(Damaged, match="did not finish writing it"):
        read_json(tmp_path / "facts.json")
    assert read_json(Path(__file__).parents[1] / "docs" / "parity.json"), "files in no run have no checksum"
