"""Entries of the feature cache on the disk: damage, kills, full disks and folders that cannot be written."""

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from tailtune.trainers.feature_store import FeatureOptions
from tailtune.trainers.storage.kept_tensors import KeptTensors

FACTS = {"format": 1, "batch_size": 4}


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)


def renamed(path: Path) -> None:
    """The entry of something else."""
    other = KeptTensors(path.parent)
    other.write({"format": 2}, torch.zeros(4, 3))
    other.path({"format": 2}).replace(path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        flipped,
        renamed,
        folder_instead,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(b"\xff" * 200),
    ],
    ids=("flipped", "renamed", "folder", "empty", "cut off", "no tensors"),
)
def test_a_damaged_entry_is_not_used(
    damage: Callable[[Path], object], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept, tensor = KeptTensors(tmp_path), torch.randn(4, 3).bfloat16()
    assert kept.read(FACTS) is None and not caplog.records
    kept.write(FACTS, tensor)
    found = kept.read(FACTS)
    assert found is not None and found.dtype == tensor.dtype and torch.equal(found, tensor)
    damage(kept.path(FACTS))
    with caplog.at_level(logging.WARNING, "tailtune"):
        assert kept.read(FACTS) is None
    assert len(caplog.records) == 1 and str(kept.path(FACTS)) in caplog.text and "\n" not in caplog.messages[0]


def test_a_process_that_is_killed_while_it_writes(tmp_path: Path) -> None:
    kept, tensor = KeptTensors(tmp_path), torch.randn(4, 3)
    child = os.fork()
    if not child:
        with mock.patch.object(Path, "replace", lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
            kept.write(FACTS, tensor)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    (left,) = tmp_path.iterdir()
    assert kept.read(FACTS) is None and left.suffix == ".tmp"
    kept.write(FACTS, tensor)
    found = kept.read(FACTS)
    assert found is not None and torch.equal(found, tensor)
    assert left.exists(), "its process may still write"
    an_hour_ago = time.time() - 3601
    os.utime(left, (an_hour_ago, an_hour_ago))
    kept.write(FACTS, tensor)
    assert list(tmp_path.iterdir()) == [kept.path(FACTS)]


def test_a_folder_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on, with the features that it has computed."""
    (tmp_path / "file").write_text("no folder")
    kept = KeptTensors(tmp_path / "file")
    with caplog.at_level(logging.WARNING, "tailtune"):
        kept.write(FACTS, torch.randn(4, 3))
        assert kept.read(FACTS) is None
    assert len(caplog.records) == 1 and "cannot write" in caplog.text


def test_a_user_without_a_home_folder(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in many containers."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", mock.Mock(side_effect=KeyError))
    with caplog.at_level(logging.WARNING, "tailtune"):
        assert FeatureOptions().kept() is None and FeatureOptions(feature_cache_dir="here").kept() is not None
    assert len(caplog.records) == 1 and "set HOME" in caplog.text


def test_a_disk_that_is_nearly_full(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written, so that other programs keep some space."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: mock.Mock(free=50))
    kept = KeptTensors(tmp_path)
    with caplog.at_level(logging.WARNING, "tailtune"):
        assert not kept.write(FACTS, torch.randn(4, 3))
    assert len(caplog.records) == 1 and "are free" in caplog.text and not any(tmp_path.iterdir())
