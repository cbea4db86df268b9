"""A real SLURM of one node: an array of runs that is preempted, and the batch file of docs/clusters.md."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, offline
from services import has_slurm, slurm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not has_slurm(), reason="slurm-wlm and munge of Debian's packages are needed, and root"),
    pytest.mark.xdist_group("slurm"),
]
GRID = """# Four demo runs
metrics: [accuracy]
axes: {lr: [0.05, 0.1, 0.2, 0.3]}
rows: {"lr {lr}": "-d digits_lt -m tiny_clip_peft num_epochs 12 lr {lr}"}
"""
LONGEST = 600
Call = Callable[..., str]
Wait = Callable[[Callable[[], bool]], None]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of a SLURM."""
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield offline(**environment)


@pytest.fixture
def call(cluster: dict[str, str], tmp_path: Path) -> Call:
    """`call("squeue", "-r")` in the scratch folder → what it printed; a failure is an error."""

    def run(*words: object) -> str:
        done = subprocess.run(
            [*map(str, words)], env=cluster, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout

    return run


@pytest.fixture
def wait_for(cluster: dict[str, str], call: Call) -> Wait:
    """`wait_for(condition)`; the error has what SLURM knows of its jobs."""

    def wait(there: Callable[[], bool]) -> None:
        end = time.monotonic() + LONGEST
        while not there():
            log = Path(cluster["SLURM_CONF"]).with_name("slurmctld.log").read_text()
            assert time.monotonic() < end, f"{call('scontrol', 'show', 'job')}\n{log[-4000:]}"
            time.sleep(0.3)

    return wait


@pytest.fixture
def hurry(call: Call) -> Callable[[], None]:
    """SLURM lets a requeued job wait for two minutes. `hurry()` makes it ten seconds, after which the node is ready."""
    hurried: set[str] = set()

    def hurry() -> None:
        for line in call("squeue", "--noheader", "--array", "--states", "PENDING", "--format", "%i %r").splitlines():
            job, reason = line.split(maxsplit=1)
            if reason == "BeginTime" and job not in hurried:
                hurried.add(job)
                call("scontrol", "update", f"JobId={job}", "StartTime=now+10")

    return hurry


def test_a_grid_as_an_array_is_preempted_and_finishes(
    call: Call, wait_for: Wait, hurry: Callable[[], None], tmp_path: Path
) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "grid.yaml"]
    printed = call(*command, "--launcher", "slurm", "--slurm", "partition=low")
    assert "submitted as job" in printed and "4 queued" in printed
    output = tmp_path / "output"
    wait_for(lambda: bool(list(output.glob("*/state/0*"))))
    print(call(*command, "--status"))
    again = call(*command, "--launcher", "slurm")
    assert "submitted" not in again, "nothing is started twice"

    (tmp_path / "first.sh").write_text("#!/bin/sh\nsleep 3\n")
    call("sbatch", "--partition", "high", "--exclusive", "--output", "/dev/null", "first.sh")
    logs = output / "launches"
    wait_for(lambda: any("interrupted" in log.read_text() for log in logs.glob("*.log")))
    print("after the preemption:\n" + call(*command, "--status"))
    assert not list(output.glob("*/metrics.json")), "it was in the middle"

    def finished() -> bool:
        hurry()
        return "4 finished" in call(*command, "--status")

    wait_for(finished)
    texts = [log.read_text() for log in sorted(logs.glob("*.log"))]
    assert len(texts) == 4 and sum("resuming after step" in text for text in texts) >= 1
    assert "| digits_lt | lr 0.3 |" in (printed := call(*command, "--launcher", "slurm"))
    print(printed)


def test_a_job_of_a_grid_that_reaches_its_time_limit_continues(
    call: Call, wait_for: Wait, hurry: Callable[[], None], tmp_path: Path
) -> None:
    """SIGUSR1, as SLURM sends it before the time limit."""
    (tmp_path / "grid.yaml").write_text(GRID)
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "grid.yaml", "--where", "lr", "0.1"]
    (job,) = re.findall(r"submitted as job (\d+)", call(*command, "--launcher", "slurm"))
    wait_for(lambda: bool(list(tmp_path.glob("output/*/state/0*"))))
    call("scancel", "--signal=USR1", job)

    def finished() -> bool:
        hurry()
        return "1 finished" in call(*command, "--status")

    wait_for(finished)
    (log,) = tmp_path.glob("output/launches/*.log")
    assert "interrupted; the same command continues" in log.read_text() and "resuming after step" in log.read_text()
    print("\n".join(line for line in log.read_text().splitlines() if not line.startswith("epoch [")))
    wait_for(lambda: "COMPLETED" in call("scontrol", "show", "job", job))
    assert "Restarts=1" in call("scontrol", "show", "job", job)


def batch_file(words: str) -> str:
    """The file of the docs with another command, for two processes on this machine, without GPUs."""
    page = (ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```bash\n(#!/bin/bash\n#SBATCH.*?)^```", page, re.S | re.M)
    text, number = re.subn(r"python main\.py [^'\n]*", f"{sys.executable} {ROOT / 'main.py'} {words}", text)
    assert number == 1
    size = r"--nodes=\d+ --ntasks-per-node=\d+ --gpus-per-node=\d+ --cpus-per-task=\d+"
    text, number = re.subn(size, "--ntasks=2", text)
    assert number == 1
    return text


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two processors are needed")
def test_the_batch_file_of_the_docs_requeues_itself(
    call: Call, wait_for: Wait, hurry: Callable[[], None], tmp_path: Path
) -> None:
    """SIGUSR1, as SLURM sends it before the time limit, saves the state; the same job continues."""
    words = "-d digits_lt -m tiny_clip_peft num_epochs 12 output_dir run"
    (tmp_path / "job.sh").write_text(batch_file(words).replace("--output=%x-%j.log", "--output=job.log"))
    job = call("sbatch", "--parsable", "--partition", "low", "job.sh").strip()
    run, log = tmp_path / "output" / "run", tmp_path / "job.log"
    wait_for(lambda: bool(list(run.glob("state/0*"))))
    call("scancel", "--signal=USR1", job)

    def finished() -> bool:
        hurry()
        return (run / "metrics.json").exists()

    wait_for(finished)
    text = log.read_text()
    print("\n".join(line for line in text.splitlines() if not line.startswith("epoch [")))
    assert "interrupted; the same command continues" in text and "resuming after step" in text
    wait_for(lambda: "COMPLETED" in call("scontrol", "show", "job", job))
    assert "Restarts=1" in call("scontrol", "show", "job", job)
