"""Real servers for the slow tier, each in a folder of its own: SLURM of one node, and PostgreSQL.

They come from Debian's packages (`apt-get install slurm-wlm munge postgresql`), are started with own settings on free
ports of this machine, and end with the test. Nothing of the system's own settings is used or changed.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conftest import free_port

from tailtune.configs.machine import available_processors

SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
START = 60
"""Seconds that a server may take to start."""


def has_slurm() -> bool:
    """Whether a SLURM of one node can be started here: its programs are installed, and this user is root."""
    return os.getuid() == 0 and all(shutil.which(program) for program in SLURM_PROGRAMS)


def postgres_programs() -> Path | None:
    """Folder of Debian's programs of PostgreSQL, the newest version; None: it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found and shutil.which("runuser") and os.getuid() == 0 else None


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """A SLURM of this machine, with the partitions `low` and `high`: a job in `high` preempts those in `low`.

    Args:
        folder: an empty folder for all its files.

    Yields:
        The environment variables with which SLURM's commands find it.
    """
    host = socket.gethostname()
    key, munge = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(
        f"""ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={munge}
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
KillWait=20
MinJobAge=600
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={available_processors()} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=high Nodes={host} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""
    )
    environment = {"SLURM_CONF": str(folder / "slurm.conf")}
    files = [f"--{option}={folder}/munge.{end}" for option, end in (("key-file", "key"), ("socket", "socket"))]
    files += [f"--{option}={folder}/munge.{end}" for option, end in (("pid-file", "pid"), ("log-file", "log"))]
    with ExitStack() as stack:
        stack.enter_context(_server(["munged", "--foreground", "--force", *files, f"--seed-file={folder}/seed"], {}))
        _wait(munge.exists, folder / "munge.log")
        stack.enter_context(_server(["slurmctld", "-D"], environment))
        stack.enter_context(_server(["slurmd", "-D", "-N", host], environment))
        asked = ["sinfo", "--noheader", "--format", "%T"]
        _wait(lambda: "idle" in _answer(asked, environment), folder / "slurmctld.log")
        yield environment


@contextmanager
def postgres(folder: Path) -> Iterator[str]:
    """A PostgreSQL with an empty data base.

    Args:
        folder: an empty folder for all its files.

    Yields:
        Its address, as SQLAlchemy takes it.
    """
    programs = postgres_programs()
    assert programs is not None
    port = free_port()
    shutil.chown(folder, "postgres")
    for parent in folder.parents:  # pytest's folders are closed to other users
        if parent.owner() == "root" and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    as_postgres = ["runuser", "-u", "postgres", "--"]
    made = [*as_postgres, str(programs / "initdb"), "-D", str(folder / "data"), "--auth=trust", "--no-sync"]
    subprocess.run(made, check=True, capture_output=True, cwd="/")
    command = [str(programs / "postgres"), "-D", str(folder / "data"), "-h", "127.0.0.1", "-p", str(port)]
    with _server([*as_postgres, *command, "-k", str(folder), "-c", "fsync=off"], {}):
        ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        _wait(lambda: subprocess.run(ready).returncode == 0, folder)
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"


@contextmanager
def _server(command: Sequence[str], environment: dict[str, str]) -> Iterator[None]:
    """A program that runs during the block."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answer(command: Sequence[str], environment: dict[str, str]) -> str:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True).stdout


def _wait(there: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + START
    while not there():
        assert time.monotonic() < end, f"a server did not start: {log.read_text()[-2000:] if log.is_file() else log}"
        time.sleep(0.1)
