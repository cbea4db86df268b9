"""Submits commands to SLURM as one array of jobs, through submitit.

Each entry of the array runs one chain of commands. SLURM sends SIGUSR1 before the time limit: the run saves its state,
and submitit puts the job back into the queue. A job that is preempted gets SIGTERM and saves its state too; SLURM puts
it back. In both cases the job finds its run where it stopped.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import tailtune
from tailtune.configs.errors import UserError
from tailtune.scripts._launches import (
    FINISHED,
    INTERRUPTED,
    LAUNCHES,
    Launch,
    Words,
    chains,
    may_start,
    slurm_queue,
    state_of,
)
from tailtune.scripts._packages import required
from tailtune.trainers.processes.last_line import has_ended

FOLDER = LAUNCHES / "slurm"
"""submitit's own files: the sbatch file, and standard output and error of each job."""
SIGNAL = "USR1"
MOST_REQUEUES = 1000
MOST_AT_ONCE = 256
MINUTES = 60
"""Time limit of a job if none is given. A job that reaches it continues in the queue."""
NOTICE = 120
"""Seconds between the signal and the time limit, in which a step has to end and a state has to be written."""


class Chain:
    """What a job does: it runs the commands of a chain, one after another. submitit loads it in the job."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, commands: Sequence[Words]) -> int:
        """Run the commands that are neither finished nor running elsewhere.

        Args:
            commands: the words of each command after `python main.py`.

        Returns:
            The exit code of the first command that failed, otherwise 0.
        """
        signal.signal(signal.SIGTERM, self._pass_on)
        failed = 0
        for launch in map(Launch, commands):
            state = state_of(launch, {})
            if not state.startable:
                print(f"{state.kind} {state.about}: python main.py {shlex.join(launch.words)}", flush=True)
                continue
            self.process = launch.start(os.environ, own_session=False)
            self._wait()
            code = self.process.wait()
            self.process = None
            if launch.is_elsewhere(code):
                continue
            launch.ended(code)
            print(f"exit code {code}: python main.py {shlex.join(launch.words)}", flush=True)
            if code == INTERRUPTED:
                sys.exit(INTERRUPTED)
            failed = failed or code
        return failed

    def checkpoint(self, commands: Sequence[Words]) -> Any:
        """Let the run save its state. submitit calls this when SLURM has sent the signal, and then requeues the job."""
        self._pass_on(signal.SIGUSR1, None)
        self._wait()
        return required("submitit").helpers.DelayedSubmission(Chain(), commands)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        """Give a signal to the run. SLURM may have sent it there too; the run counts both as one."""
        if self.process is not None:
            self.process.send_signal(number)

    def _wait(self) -> None:
        """Wait for the run. A signal handler may call this in the middle of another call, so no lock is taken."""
        while self.process is not None and not has_ended(self.process.pid):
            time.sleep(0.1)


def submit(todo: Sequence[Launch], name: str, jobs: int | None, options: Mapping[str, str]) -> str | None:
    """Submit the commands that are neither finished, nor running, nor waiting in the queue.

    Args:
        todo: the commands.
        name: name of the job.
        jobs: largest number of jobs that run at once.
        options: options of sbatch, such as `partition` and `time`.

    Returns:
        The number of the job; None if there is nothing to submit.

    Raises:
        UserError: submitit or SLURM is missing, or SLURM refuses the job.
    """
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL  # submitit reads it when it is imported; its default is USR2
    submitit = required("submitit")
    queue = slurm_queue(todo)
    busy = {launch for launch in todo if not state_of(launch, queue).startable}
    open_chains = [[launch for launch in chain if launch not in busy] for chain in chains(todo)]
    running = [launch for launch in busy if state_of(launch, queue).kind != FINISHED]
    todo_now = may_start([chain for chain in open_chains if chain], running)
    if held := sum(map(len, open_chains)) - sum(map(len, todo_now)):
        print(f"{held} merge runs that are not finished; when these are, the same command submits them")
    open_chains = todo_now
    if not open_chains:
        return None
    try:
        executor = submitit.SlurmExecutor(FOLDER, max_num_timeout=MOST_REQUEUES)  # it refuses a machine without SLURM
    except RuntimeError as error:
        raise UserError("--launcher slurm: there is no srun here; run this on a machine of the cluster") from error
    executor.update_parameters(**_parameters(name, jobs or MOST_AT_ONCE, options))
    try:
        submitted = executor.map_array(Chain(), [[launch.words for launch in chain] for chain in open_chains])
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refuses the job: {' '.join(str(error).split())}") from error
    for job, chain in zip(submitted, open_chains, strict=True):
        for launch in chain:
            launch.submitted(job.job_id)
    return str(submitted[0].job_id).partition("_")[0]


def _parameters(name: str, jobs: int, options: Mapping[str, str]) -> dict[str, Any]:
    """The settings of submitit. The options of sbatch have priority over those that submitit makes itself."""
    root = shlex.quote(str(tailtune.ROOT))
    setup = [f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}", f"export PYTHONPATH={root}${{PYTHONPATH:+:$PYTHONPATH}}"]
    known = {"job_name": name.replace("/", "-"), "array_parallelism": jobs, "signal_delay_s": NOTICE, "time": MINUTES}
    return {**known, "setup": setup, "additional_parameters": {"requeue": True, **options}}
