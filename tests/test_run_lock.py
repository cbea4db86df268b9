"""The lock of a run folder: who holds it, and where it does not hold between machines."""

import errno
import fcntl
import json
import multiprocessing
import os
import socket
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Cli
from filelock import FileLock
from test_bad_input import RUN, SHORT, one_line

from tailtune.configs.errors import UserError
from tailtune.trainers.runs import run_lock
from tailtune.trainers.runs.run_lock import Holder, RunLock, holder_of, why_only_local
from tailtune.trainers.storage.manifest import HOLDER, LOCK

NODE, NODE_JOB = Holder("node7", 4312, None, "2026-01-01"), Holder("node7", 4312, "12_3", "2026-01-01")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder on a file system whose locks hold between machines."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def local_locks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, on an NFS whose locks do not reach the server."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"40 1 0:40 / {tmp_path} rw - nfs server:/home rw,vers=3,local_lock=all\n")
    monkeypatch.setattr(run_lock, "MOUNTS", mounts)
    return folder


def record(folder: Path, holder: Holder) -> None:
    (folder / HOLDER).write_text(json.dumps(vars(holder)))


def test_the_lock_names_its_holder_while_it_is_held(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert holder_of(folder) is None
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    lock = RunLock(folder)
    lock.acquire()
    found = holder_of(folder)
    assert found is not None
    assert (found.host, found.pid, found.job) == (socket.gethostname(), os.getpid(), "12")
    lock.release()
    assert holder_of(folder) is None
    assert [path.name for path in folder.iterdir()] == [LOCK]


def test_a_second_launch_is_told_who_the_first_one_is(launch: Cli) -> None:
    RUN.mkdir(parents=True)
    record(RUN, NODE_JOB)
    with FileLock(RUN / LOCK):
        one_line(launch(SHORT), "in use", "process 4312 on node7, SLURM job 12_3", "output_dir")


def test_the_record_of_a_launch_that_was_killed_is_no_lock(folder: Path) -> None:
    record(folder, NODE)
    assert holder_of(folder) is None
    RunLock(folder).acquire()


def test_where_locks_are_local_the_record_of_another_machine_counts(
    local_locks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(local_locks, NODE_JOB)
    assert holder_of(local_locks) is None, "nothing was locked here before"
    (local_locks / LOCK).touch()
    assert holder_of(local_locks) == NODE_JOB
    with pytest.raises(UserError, match=r"node7.*do not hold between machines.*local_lock=all.*delete \S*holder"):
        RunLock(local_locks).acquire()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    lock = RunLock(local_locks)
    lock.acquire()  # the same job, which SLURM has requeued
    lock.release()
    assert not (local_locks / HOLDER).exists()


@pytest.mark.parametrize(
    ("mount", "reason"),
    [
        ("/home rw - nfs4 server:/home rw,vers=4.2,local_lock=none", None),
        ("/home rw - nfs server:/home rw,vers=3,local_lock=flock", "/home is nfs with local_lock=flock"),
        ("/home rw,nosuid - lustre mds:/home rw,flock", None),
        ("/home rw,nosuid - lustre mds:/home rw,localflock", "/home is lustre with localflock"),
        ("/home rw shared:1 - fuse.sshfs me@host:/ rw", "/home is fuse.sshfs"),
        ("/home/my\\040own rw - beegfs server rw", "/home/my own is beegfs"),
        ("/home/my rw - beegfs server rw", None),
        ("/home rw - afs #cell:home rw,flock=local", "/home is afs with flock=local"),
    ],
)
def test_mounts_whose_locks_do_not_reach_other_machines(
    mount: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(f"22 1 8:1 / / rw - ext4 /dev/sda rw\n40 22 0:40 / {mount}\n")
    monkeypatch.setattr(run_lock, "MOUNTS", mounts)
    assert why_only_local(Path("/home/my own/output/run")) == reason


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks(code: int, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as NFS 3 without its lock service, and Lustre without its option."""

    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        one_line(launch(SHORT), "output/run has no locks", os.strerror(code), "put output/ on another one")
    assert not (RUN / "config.yaml").exists()


def test_smb_before_linux_5_5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text("40 22 0:40 / /home rw - cifs //server/home rw,vers=3.1.1\n")
    monkeypatch.setattr(run_lock, "MOUNTS", tmp_path / "mountinfo")
    for release, reason in (("5.4.0-150-generic", "whose locks Linux 5.4 keeps"), ("5.5.1", None), ("6.1.0", None)):
        monkeypatch.setattr(os, "uname", lambda release=release: SimpleNamespace(release=release))
        found = why_only_local(Path("/home/output/run"))
        assert (found is None) == (reason is None) and (reason is None or reason in str(found))


def _hold(folder: Path, pipe: Connection) -> None:
    lock = RunLock(folder)
    lock.acquire()
    pipe.send(os.getpid())
    time.sleep(60)


@pytest.mark.skipif(sys.platform == "win32", reason="a process is forked")
def test_another_process_keeps_the_folder_until_it_is_killed(folder: Path) -> None:
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_hold, args=(folder, theirs))
    process.start()
    assert ours.poll(60)
    with pytest.raises(UserError, match=rf"in use by another launch \(process {ours.recv()} on "):
        RunLock(folder).acquire()
    process.kill()
    process.join()
    lock = RunLock(folder)
    lock.acquire()
    lock.release()
