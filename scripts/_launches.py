"""Commands that are launched as processes: their files, which of them may run at once, and how far they are."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from getpass import getuser
from pathlib import Path

import tailtune
from tailtune.configs.errors import UserError
from tailtune.scripts._grid import config, result, stages
from tailtune.trainers.runs.run_folder import OUTPUT, RunFolder, folder_of
from tailtune.trainers.runs.run_lock import holder_of

LAUNCHES = OUTPUT / "launches"
NARROWEST = 80
"""Columns of the table of states, unless the terminal has more."""
INTERRUPTED = 130
FINISHED, RUNNING, QUEUED, FAILED = "finished", "running", "queued", "failed"
UNFINISHED, NOT_STARTED, REFUSED = "unfinished", "not started", "refused"

Words = tuple[str, ...]


@dataclass(frozen=True)
class Launch:
    """A command that runs as a process of its own, and the files in `output/launches` that its launches leave."""

    words: Words
    """The words after `python main.py`."""

    @property
    def name(self) -> str:
        """Name of the files: the words, and a digest, because long commands are cut."""
        readable = re.sub(r"[^\w.=-]+", "_", "_".join(self.words[1:2] + self.words[3:]))[:80]
        return f"{readable}-{hashlib.sha256(shlex.join(self.words).encode()).hexdigest()[:8]}"

    @property
    def log(self) -> Path:
        """What all launches of the command have printed, one after another."""
        return LAUNCHES / f"{self.name}.log"

    @property
    def _exit(self) -> Path:
        return LAUNCHES / f"{self.name}.exit"

    @property
    def _job(self) -> Path:
        return LAUNCHES / f"{self.name}.job"

    @property
    def code(self) -> int | None:
        """Exit code of the last launch; None if it runs, was killed, or if there was none."""
        return int(text) if (text := _text(self._exit)) else None

    @property
    def job(self) -> str | None:
        """The SLURM job to which the command was submitted last; None: it was submitted to none."""
        return _text(self._job) or None

    def submitted(self, job: str) -> None:
        """Note the SLURM job to which the command was submitted."""
        self._job.write_text(job)

    def start(self, environment: Mapping[str, str], own_session: bool) -> "subprocess.Popen[bytes]":
        """Start the command.

        Args:
            environment: environment variables of the process.
            own_session: whether Ctrl-C of this terminal shall not reach the process.
        """
        LAUNCHES.mkdir(parents=True, exist_ok=True)
        self._exit.unlink(missing_ok=True)
        with self.log.open("ab") as log:
            log.write(f"$ python main.py {shlex.join(self.words)}\n".encode())
            log.flush()
            command = [sys.executable, str(tailtune.ROOT / "main.py"), *self.words]
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=own_session,
            )

    def ended(self, code: int) -> None:
        """Note the exit code of the process."""
        self._exit.write_text(str(code))

    def is_elsewhere(self, code: int) -> bool:
        """Whether the process was refused because another machine has begun the same run in the same moment."""
        return code == 2 and state_of(self, {}).kind in (RUNNING, FINISHED)

    def last_line(self) -> str:
        """The last line that the command has printed, empty lines left out."""
        with suppress(OSError), self.log.open("rb") as log:
            log.seek(max(0, self.log.stat().st_size - 20_000))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines()]
            return next((line for line in reversed(lines) if line), "")
        return ""


@dataclass(frozen=True)
class State:
    """How far a command is."""

    kind: str
    about: str = ""
    """Where it runs, what it has reached, or why it failed."""
    folder: str = ""
    """Its run folder, or the folder of its evaluation, below `output/`."""

    @property
    def startable(self) -> bool:
        """Whether the command may be started now. One that is refused says so itself, perhaps only at present."""
        return self.kind not in (FINISHED, RUNNING, QUEUED)


def state_of(launch: Launch, queue: Mapping[str, str]) -> State:
    """How far a command is: its run folder, the lock of this folder, SLURM's queue and the last launch say it.

    Args:
        launch: the command.
        queue: what `slurm_queue` returned.
    """
    try:
        all_stages = stages(launch.words)
        folder = RunFolder(config(launch.words))
        below = folder.target().relative_to(OUTPUT).as_posix()
        if result(launch.words) is not None:
            return State(FINISHED, folder=below)
    except UserError as error:
        return State(REFUSED, f"error: {error}", shlex.join(launch.words))
    homes = [folder.path, *map(folder_of, all_stages[:-1])]
    for home, holder in zip(homes, map(holder_of, homes), strict=True):
        if holder is not None:
            stage = "" if home == folder.path else "first stage, "
            return State(RUNNING, f"{stage}{holder.host} {holder.job or holder.pid}", below)
    if launch.job in queue:
        return State(QUEUED, f"job {launch.job}", below)
    if launch.code not in (None, 0, INTERRUPTED):
        return State(FAILED, launch.last_line(), below)
    steps = [int(path.name) for path in folder.states.glob("[0-9]*") if path.name.isdigit()]
    if steps or folder.config.exists():
        return State(UNFINISHED, f"step {max(steps)}" if steps else "", below)
    return State(NOT_STARTED, folder=below)


def slurm_queue(launches: Iterable[Launch]) -> dict[str, str]:
    """The jobs of this user that wait or run in SLURM: job (`12`, or `12_3` of an array) → SLURM's state.

    SLURM is asked only if one of the commands was submitted to it.

    Raises:
        UserError: SLURM does not answer.
    """
    if shutil.which("squeue") is None or all(launch.job is None for launch in launches):
        return {}
    asked = ["squeue", "--noheader", "--array", "--user", getuser(), "--format", "%i %T"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"squeue does not say which jobs wait: {' '.join(done.stderr.split())}")
    return dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.strip())


def table(launches: Sequence[Launch]) -> str:
    """The states of commands as a table as wide as the terminal. Below a failed one is the last line of its log."""
    queue = slurm_queue(launches)
    states = [state_of(launch, queue) for launch in launches]
    counts = {kind: sum(state.kind == kind for state in states) for kind in dict.fromkeys(s.kind for s in states)}
    return "\n".join([*_rows(states), "", ", ".join(f"{number} {kind}" for kind, number in counts.items())])


def _rows(states: Sequence[State]) -> Iterator[str]:
    explained = (FAILED, REFUSED)
    where = [state.about if state.kind not in explained else "" for state in states]
    width = min(28, max(map(len, ["where", *where])))
    columns = max(NARROWEST, shutil.get_terminal_size().columns)
    room = columns - width - 15
    yield f"{'state':<11}  {'where':<{width}}  run"
    for state, about, name in zip(states, where, _short([state.folder for state in states], room), strict=True):
        yield f"{state.kind:<11}  {cut(about, width):<{width}}  {cut(name, room)}"
        if state.kind in explained:
            yield textwrap.fill(cut(state.about, 5 * columns), columns, initial_indent="  ", subsequent_indent="  ")


def _short(names: Sequence[str], room: int) -> list[str]:
    """Names without the words that all begin and end with, if one of them has more than `room` characters."""
    if len(names) < 2 or max(map(len, names)) <= room:
        return list(names)
    first = os.path.commonprefix(names).rpartition("_")[0]
    rest = [name[len(first) :] for name in names]
    last = os.path.commonprefix([name[::-1] for name in rest]).rpartition("_")[0]
    return [f"{'…' * bool(first)}{name[: len(name) - len(last)]}{'…' * bool(last)}" for name in rest]


def cut(text: str, width: int) -> str:
    """A text of at most `width` characters; of a longer one the middle is left out."""
    if len(text) <= width:
        return text
    left = (width - 1) // 3
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"


def chains(launches: Sequence[Launch]) -> list[list[Launch]]:
    """Group commands that must not run at the same time, because they use the same run folder.

    That is so for a run and its evaluations, and for runs that continue the same first stage.

    Returns:
        The groups, and the commands of each group, in the order of `launches`.
    """
    groups: list[tuple[set[Path], list[Launch]]] = []
    for launch in launches:
        used, members = _folders(launch), [launch]
        apart = []
        for folders, others in groups:
            if folders & used:
                used, members = used | folders, others + members
            else:
                apart.append((folders, others))
        groups = [*apart, (used, members)]
    order = {launch: number for number, launch in enumerate(launches)}
    sorted_groups = (sorted(members, key=order.__getitem__) for _, members in groups)
    return sorted(sorted_groups, key=lambda members: order[members[0]])


def may_start(waiting: Sequence[list[Launch]], busy: Iterable[Launch]) -> list[list[Launch]]:
    """The groups of `waiting` that merge no runs (`merge_runs`) of other groups, or of commands that run at present.

    Args:
        waiting: groups of `chains` that have not begun.
        busy: further commands that are not finished.
    """
    owner = {folder: number for number, chain in enumerate(waiting) for launch in chain for folder in _folders(launch)}
    owner |= {folder: -1 for launch in busy for folder in _folders(launch)}
    return [
        chain
        for number, chain in enumerate(waiting)
        if all(owner.get(folder, number) == number for launch in chain for folder in _merged(launch))
    ]


@cache
def _merged(launch: Launch) -> frozenset[Path]:
    """The folders of the runs that a command merges."""
    with suppress(UserError):
        names = stages(launch.words)[-1].merge_runs or ()
        return frozenset(path for name in names for path in (Path(name), OUTPUT / name))
    return frozenset()


@cache
def _folders(launch: Launch) -> set[Path]:
    """The run folders that a command writes into or reads; none for a command that will be refused."""
    with suppress(UserError):
        all_stages = stages(launch.words)
        last = all_stages[-1]
        read = [OUTPUT / name for name in (last.model_dir, *(last.ensemble_runs or ())) if name]
        return {*map(folder_of, all_stages), *read}
    return set()


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text().strip()
    return ""
