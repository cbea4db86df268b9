"""The lock of a run folder, which keeps two launches apart, and a record of the launch that holds it.

The lock is `flock` on the file `.tailtune.lock`. The operating system releases it when the process ends, however it
ends. Between machines it holds where the file system passes locks on to a server: NFS (Linux turns `flock` into a lock
of the server), SMB since Linux 5.5, CephFS, Lustre with the mount option `flock`. `why_only_local` recognises mounts
that keep locks within one machine. There, a record of another machine counts as a lock too, and a warning says so.
"""

import errno
import json
import logging
import os
import re
import socket
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from filelock import FileLock, SoftFileLock, Timeout

from tailtune.configs.errors import UserError
from tailtune.trainers.storage.manifest import HOLDER, LOCK

PATIENCE = 0.5
"""Seconds for which a launch tries to get the lock. `holder_of` takes it for an instant, which must end no launch."""
MOUNTS = Path("/proc/self/mountinfo")
LOCAL = ("beegfs", "fuse.sshfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.rclone", "fuse.mount-s3", "fuse.goofys")
"""File systems that, as they are usually mounted, keep `flock` within one machine."""
LOCAL_BY_OPTION = {
    "nfs": {"local_lock=all", "local_lock=flock"},  # `nolock` is shown as the former
    "nfs4": {"local_lock=all", "local_lock=flock"},
    "lustre": {"localflock"},
    "cifs": {"nobrl"},
    "smb3": {"nobrl"},
    "afs": {"flock=local"},
}
"""File system → mount options with which it keeps `flock` within one machine."""
SMB, SMB_LOCKS = ("cifs", "smb3"), (5, 5)
"""Names of SMB mounts, and the version of Linux since which they pass `flock` on to the server."""

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # the last one is of Lustre without the option `flock`

log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class Holder:
    """The launch that holds, or held, the lock of a run folder."""

    host: str
    pid: int
    job: str | None
    """Job of the scheduler SLURM, `12` or `12_3`; None: there is none."""
    since: str

    @classmethod
    def here(cls) -> "Holder":
        """The record of this process."""
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(socket.gethostname(), os.getpid(), slurm_job(), since)

    @classmethod
    def read(cls, folder: Path) -> "Holder | None":
        """The record in a run folder; None if there is none, or if it is not complete."""
        try:
            return cls(**json.loads((folder / HOLDER).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """The lock of a run folder. One launch at a time works in the folder.

    Args:
        folder: the folder; it must exist when the lock is acquired.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = FileLock(folder / LOCK, timeout=PATIENCE)

    @property
    def is_locked(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock.is_locked

    def acquire(self) -> None:
        """Lock the folder, and write the record.

        Raises:
            UserError: another launch holds the lock, or the file system has no locks.
            OSError: the file system cannot write.
        """
        try:
            self._acquire()
        except Timeout:
            holder = Holder.read(self.folder)
            raise UserError(
                f"{self.folder} is in use by another launch{f' ({holder})' if holder else ''}; wait for it or choose "
                "another output_dir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            raise UserError(
                f"the file system of {self.folder} has no locks ({error.strerror}), so two launches could not be kept "
                "apart; put output/ on another one, or let its server lock files (NFS: rpc.statd, or version 4; "
                "Lustre: the mount option flock)"
            ) from error
        here, local = Holder.here(), why_only_local(self.folder)
        if local is not None:
            self._ask_record(here, local)
        try:
            (self.folder / HOLDER).write_text(json.dumps(asdict(here)) + "\n")
        except OSError:  # where the lock itself holds, the record only informs
            if local is not None:
                raise

    def _acquire(self) -> None:
        """Take the lock of the operating system. Where there is none, filelock would take a file's existence for one.

        Such a lock would outlive a process that is killed.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._lock.acquire()
        except NotImplementedError:  # versions before 3.24
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
        if isinstance(self._lock, SoftFileLock):
            self._lock.release()
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def _ask_record(self, here: Holder, why: str) -> None:
        """Refuse the folder if its record is of another machine. A job that SLURM has requeued may take it over."""
        other = Holder.read(self.folder)
        if other is not None and other.host != here.host and (other.job is None or other.job != here.job):
            self._lock.release()
            raise UserError(
                f"{self.folder} is in use by another launch ({other}), or that launch was killed; locks do not hold "
                f"between machines here ({why}), so if it has ended, delete {self.folder / HOLDER}"
            )
        log.warning(
            "warning: the lock of %s does not hold between machines (%s); a launch is kept apart from those of other "
            "machines by its record only, unless both start within the same second",
            self.folder,
            why,
        )

    def release(self) -> None:
        """Remove the record, and unlock the folder. Nothing happens if this process does not hold the lock."""
        if self.is_locked:
            with suppress(OSError):  # the folder may be gone; an old record does no harm where locks hold
                (self.folder / HOLDER).unlink(missing_ok=True)
        self._lock.release()


def holder_of(folder: Path) -> Holder | None:
    """The launch that works in a run folder at present, on this machine or another one.

    Returns:
        Its record; None if nobody holds the lock. The fields are unknown (`?`) if the launch has not written a record.
    """
    if not (folder / LOCK).exists():
        return None
    record = Holder.read(folder)
    try:
        with FileLock(folder / LOCK, timeout=0):
            elsewhere = record is not None and record.host != socket.gethostname()
            return record if elsewhere and why_only_local(folder) else None
    except (Timeout, OSError):  # OSError: the folder is another user's
        return Holder.read(folder) or Holder("?", 0, None, "?")


def why_only_local(folder: Path) -> str | None:
    """Why locks in a folder hold within one machine only, in words; None if nothing speaks against them (Linux)."""
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return None
    path, found = folder.resolve(), (Path("/"), "", "")
    for line in lines:  # `… mount-point options … - type source options`
        left, _, right = line.partition(" - ")
        fields, (kind, _, options) = left.split(), right.split(" ", 2)
        point = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]))  # \040 is a blank
        if path.is_relative_to(point) and len(point.parts) >= len(found[0].parts):
            found = (point, kind, f"{fields[5]},{options}")
    point, kind, text = found
    if kind in LOCAL:
        return f"{point} is {kind}"
    version = tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])
    if kind in SMB and version < SMB_LOCKS:
        return f"{point} is {kind}, whose locks Linux {version[0]}.{version[1]} keeps for itself"
    bad = LOCAL_BY_OPTION.get(kind, set()) & set(text.split(","))
    return f"{point} is {kind} with {min(bad)}" if bad else None


def slurm_job() -> str | None:
    """The SLURM job of this process, `12`, or `12_3` for an entry of an array; None: there is none."""
    array, entry = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{entry}" if array and entry else os.environ.get("SLURM_JOB_ID")
