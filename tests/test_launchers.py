"""Grids whose runs are processes: what is started and what is not, shares of the machine, states, and SLURM's array."""

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from conftest import ROOT, Cli
from test_bad_input import signal_after
from test_scripts import grid, script  # noqa: F401

from tailtune.configs.machine import available_processors
from tailtune.scripts import reproduce
from tailtune.scripts._grid import config, read
from tailtune.scripts._launch_local import run_local, slots
from tailtune.scripts._launches import NARROWEST, Launch, chains, may_start, state_of, table
from tailtune.trainers.runs.run_folder import RunFolder, folder_of
from tailtune.trainers.runs.run_lock import RunLock

TINY = "pretrained none batch_size 8 max_steps 3 save_every 1 max_test_images 20"
GRID = f"""# Small
metrics: [accuracy]
axes: {{lr: [0.1, 0.2, 0.3, 0.4]}}
rows: {{"lr {{lr}}": "-d fake_lt -m tiny_clip {TINY} lr {{lr}}"}}
"""
Words = Callable[..., tuple[int, str, str]]


def launch_of(words: str) -> Launch:
    return Launch(tuple(words.split()))


def launches(count: int) -> list[Launch]:
    return [launch_of(f"-d fake_lt -m tiny_clip lr 0.{number}") for number in range(1, count + 1)]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """`program(code)`: this code, instead of main.py, is what launches start. Its files are in the scratch folder."""
    monkeypatch.chdir(tmp_path)

    def use(code: str) -> None:
        (tmp_path / "fake").mkdir(exist_ok=True)
        (tmp_path / "fake" / "main.py").write_text(code)
        monkeypatch.setattr("tailtune.ROOT", tmp_path / "fake")

    yield use


# --- which commands may run at once ----------------------------------------------------------------------------------


def test_commands_that_use_one_folder_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, after = "-d fake_lt -m tiny_clip_peft", "method crt after tiny_clip_peft after.loss_type CE"
    words = [
        run,
        f"{run} loss_type CE",
        f"{run} test_only True tte True",
        f"{run} {after}",
        f"{run} lr 0.3",
        f"{run} lr 0.4 test_only True model_dir {RunFolder(config(f'{run} lr 0.3'.split())).path.name}",
        f"{run} lr wrong",
    ]
    found = chains([launch_of(each) for each in words])
    assert [[words.index(" ".join(launch.words)) for launch in chain] for chain in found] == [
        [0, 2],
        [1, 3],
        [4, 5],
        [6],
    ]


def test_two_rows_that_link_two_groups_join_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["-d fake_lt -m tiny_clip lr 0.1", "-d fake_lt -m tiny_clip lr 0.2"]
    names = [folder_of(config(each.split())).name for each in words]
    words.append(f"-d fake_lt -m tiny_clip test_only True model_dir {names[0]} ensemble_runs [{names[1]}]")
    assert [len(chain) for chain in chains([launch_of(each) for each in words])] == [3]


def test_a_merge_waits_for_the_runs_that_it_merges(program: Callable[[str], None]) -> None:
    """It would be refused without them. Other commands need not wait, so the three are three chains."""
    program(
        "import os, sys, time\nprint(sorted(name for name in os.listdir() if name.endswith('.done')))\n"
        "time.sleep(0.4)\nopen(f'{sys.argv[-1]}.done', 'w')"
    )
    runs = [launch_of(f"-d fake_lt -m tiny_clip lr 0.1 output_dir {name}") for name in ("one", "two")]
    merge = launch_of("-d fake_lt -m tiny_clip_h2t merge_runs [one,two] output_dir merged")
    assert chains([merge, *runs]) == [[merge], *([run] for run in runs)]
    assert may_start([[merge], runs[:1]], runs[1:]) == [runs[:1]] and may_start([[merge]], []) == [[merge]]
    assert run_local([merge, *runs], slots(2, []), keep_going=False) == 0
    assert merge.last_line() == "['one.done', 'two.done']"


# --- processes on this machine ---------------------------------------------------------------------------------------


def test_processors_and_gpus_are_shared(
    program: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    program("import os, sys\nprint(os.environ['OMP_NUM_THREADS'], os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[-1])")
    todo, before = launches(4), os.sched_getaffinity(0)
    assert run_local(todo, slots(2, ["3", "5"]), keep_going=False) == 0
    printed = {launch.words[-1]: launch.last_line().split() for launch in todo}
    assert {gpu for _, gpu, _ in printed.values()} == {"3", "5"}
    threads = str(max(1, available_processors() // 2))
    assert all(found == [threads, found[1], lr] for lr, found in printed.items())
    assert os.sched_getaffinity(0) == before
    lines = capfd.readouterr().out.splitlines()
    assert sum("started" in line for line in lines) == sum("finished" in line for line in lines) == 4


def test_more_runs_than_processors_share_them() -> None:
    places = slots(3 * available_processors(), [])
    assert all(len(place.processors) == 1 and place.gpu is None for place in places)
    assert {place.processors[0] for place in places} == set(os.sched_getaffinity(0))


def test_as_many_at_once_as_asked(program: Callable[[str], None]) -> None:
    code = "import os, sys, time\nopen(f'{os.getpid()}.runs', 'w')\ntime.sleep(0.5)\n"
    program(code + "print(len([n for n in os.listdir() if n.endswith('.runs')]))\nos.remove(f'{os.getpid()}.runs')")
    todo = launches(4)
    assert run_local(todo, slots(2, []), keep_going=False) == 0
    assert max(int(launch.last_line()) for launch in todo) == 2


@pytest.mark.parametrize("keep_going", [False, True])
def test_a_failure_stops_what_has_not_begun(
    keep_going: bool, program: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    program("import sys\nif sys.argv[-1] == '0.2': sys.exit('error: no disk')\nprint('done')")
    todo = launches(3)
    assert run_local(todo, slots(1, []), keep_going) == 1
    assert [launch.code for launch in todo] == [0, 1, 0 if keep_going else None]
    assert "[2/3] failed in 0 s (exit code 1): error: no disk; log: output/launches/" in capfd.readouterr().out
    assert "error: no disk" in table(todo)


def test_a_killed_process_is_a_failure(program: Callable[[str], None]) -> None:
    program("import os\nprint('epoch 1', flush=True)\nos.kill(os.getpid(), 9)")
    (launch,) = launches(1)
    assert run_local([launch], slots(1, []), keep_going=False) == 1
    assert (state_of(launch, {}).kind, state_of(launch, {}).about) == ("failed", "epoch 1")


def test_ctrl_c_lets_every_process_save(program: Callable[[str], None]) -> None:
    program(
        "import signal, sys, time\nsignal.signal(15, lambda *_: (print('saved', flush=True), sys.exit(130)))\n"
        "print('ready', flush=True)\ntime.sleep(60)"
    )
    todo = launches(3)

    def interrupt() -> None:
        while [launch.last_line() for launch in todo[:2]] != ["ready", "ready"]:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run_local(todo, slots(2, []), keep_going=True) == 130
    thread.join()
    assert [(launch.code, launch.last_line()) for launch in todo] == [(130, "saved"), (130, "saved"), (None, "")]


def test_what_runs_elsewhere_is_not_started(program: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    program("print('it ran')")
    first, second = launches(2)
    folder = folder_of(config(first.words))
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    lock.acquire()
    assert run_local([first, second], slots(1, []), keep_going=False) == 0
    lock.release()
    assert [launch.last_line() for launch in (first, second)] == ["", "it ran"]
    assert "[1/2] running elsewhere" in capfd.readouterr().out


def test_a_run_that_another_machine_has_just_begun_is_no_failure(program: Callable[[str], None]) -> None:
    """Both have seen that nobody works on it; this process is refused."""
    program("import sys\nsys.exit(2)")
    (launch,) = launches(1)
    lock = RunLock(folder_of(config(launch.words)))
    lock.folder.mkdir(parents=True)
    (place,) = slots(1, [])
    place.start(launch)
    lock.acquire()
    assert run_local([launch], [place], keep_going=False) == 0
    assert launch.code is None and state_of(launch, {}).kind == "running"
    lock.release()


@pytest.mark.slow
def test_a_grid_of_processes_and_its_table(grid: Callable[[str], str], script: Words) -> None:  # noqa: F811
    name = grid(GRID)
    assert script(reproduce, f"{name} --where lr 0.1")[0] == 0
    code, printed, error = script(reproduce, f"{name} --jobs 2")
    assert (code, error) == (0, "")
    assert "[1/4] finished before" in printed and "| fake_lt | lr 0.4 |" in printed
    assert "4 finished" in script(reproduce, f"{name} --status")[1]


# --- states ----------------------------------------------------------------------------------------------------------


def test_the_table_of_states(
    launch: Cli,
    grid: Callable[[str], str],  # noqa: F811
    script: Words,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    name = grid(GRID.replace("0.4]", "0.4, 0.5 test_only True model_dir gone]"))
    todo = [Launch(tuple(cell.command(0))) for cell in read(name).cells]
    assert launch(*todo[0].words).returncode == 0
    with signal_after(2):
        assert launch(*todo[1].words).returncode == 130
    holder = RunLock(folder_of(config(todo[2].words)))
    holder.folder.mkdir(parents=True)
    holder.acquire()
    Path("output/launches").mkdir()
    todo[3].log.write_text("epoch 1\nerror: the disk is full " + "and full " * 30 + "\n\n")
    todo[3].ended(2)
    code, printed, error = script(reproduce, f"{name} --status")
    holder.release()
    assert (code, error) == (0, "")
    rows = [line.split("  ")[0] for line in printed.splitlines() if line[:1] not in ("", " ")]
    assert rows == [
        *("state", "finished", "unfinished", "running", "failed", "not started", "refused"),
        "1 finished, 1 unfinished, 1 running, 1 failed, 1 not started, 1 refused",
    ]
    assert "step 2" in printed and f" {os.getpid()} " in printed and "error: the disk is full and" in printed
    assert max(map(len, printed.splitlines())) <= NARROWEST


def test_long_names_are_told_apart(
    grid: Callable[[str], str],  # noqa: F811
    script: Words,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    name = grid(GRID.replace("tiny_clip ", "tiny_clip_peft adapter_dim 3 num_epochs 7 weight_decay 0.25 momentum 0.5 "))
    printed = script(reproduce, f"{name} --status")[1]
    assert all(f"lr_{lr}" in printed for lr in (0.1, 0.3, 0.4)), printed
    assert max(map(len, printed.splitlines())) <= NARROWEST
    monkeypatch.setenv("COLUMNS", "200")
    assert "fake_lt_tiny_clip_peft_adapter_dim_3" in script(reproduce, f"{name} --status")[1]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("--jobs 0", "--jobs 0"),
        ("--slurm partition=gpu", "--launcher slurm"),
        ("--launcher slurm --slurm gpu", "KEY=VALUE"),
        ("--launcher slurm --gpus 0", "gpus-per-node=1"),
        ("--launcher pbs", "local"),
    ],
)
def test_wrong_words_for_a_launcher(grid: Callable[[str], str], script: Words, words: str, part: str) -> None:  # noqa: F811
    code, printed, error = script(reproduce, f"{grid(GRID)} {words}")
    assert (code, printed, error.count("\n")) == (2, "", 1) and part in error


def test_a_launch_of_several_processes_has_no_launcher(
    grid: Callable[[str], str],  # noqa: F811
    script: Words,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    code, _, error = script(reproduce, f"{grid(GRID)} --jobs 2")
    assert code == 2 and "leave out accelerate launch" in error


# --- SLURM, without SLURM --------------------------------------------------------------------------------------------

SBATCH = """#!/bin/sh
cp "$1" {folder}/sbatch.sh
echo Submitted batch job 77
"""


@pytest.fixture
def pretended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    """`pretended({"squeue": script, …})`: programs of SLURM that only do what the scripts say."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")

    def make(programs: Mapping[str, str]) -> None:
        for name, text in programs.items():
            (tmp_path / "bin" / name).write_text(text)
            (tmp_path / "bin" / name).chmod(0o755)

    return make


def test_one_array_for_a_grid_and_nothing_twice(
    grid: Callable[[str], str],  # noqa: F811
    script: Words,  # noqa: F811
    pretended: Callable[[Mapping[str, str]], None],
    tmp_path: Path,
) -> None:
    pytest.importorskip("submitit")
    pretended({"sbatch": SBATCH.format(folder=tmp_path), "srun": "", "squeue": "#!/bin/sh\nexit 0\n"})
    name = grid(GRID)
    assert script(reproduce, f"{name} --where lr 0.1")[0] == 0
    code, printed, error = script(reproduce, f"{name} --launcher slurm --jobs 2 --slurm partition=gpu time=240 mem=8G")
    assert (code, error) == (0, "") and "submitted as job 77" in printed
    text = (tmp_path / "sbatch.sh").read_text()
    for option in (
        "array=0-2%2",
        "partition=gpu",
        "time=240",
        "mem=8G",
        "requeue",
        "signal=USR1@120",
        "job-name=small",
    ):
        assert f"#SBATCH --{option}\n" in text, option
    assert f"export PYTHONPATH={shlex.quote(str(ROOT))}" in text
    queue = "".join(f"echo 77_{number} PENDING\n" for number in (0, 1))
    pretended({"squeue": f"#!/bin/sh\n{queue}"})
    assert "1 finished, 2 queued, 1 not started" in script(reproduce, f"{name} --status")[1]
    assert script(reproduce, f"{name} --launcher slurm")[0] == 0
    assert "#SBATCH --array" not in (tmp_path / "sbatch.sh").read_text(), "one command is left"
    assert "[1/1] queued elsewhere: job 77_0" in script(reproduce, f"{name} --launcher local --where lr 0.2")[1]


def test_slurm_says_why_it_refuses(
    grid: Callable[[str], str],  # noqa: F811
    script: Words,  # noqa: F811
    pretended: Callable[[Mapping[str, str]], None],
) -> None:
    pytest.importorskip("submitit")
    pretended({"sbatch": "#!/bin/sh\necho 'sbatch: error: no such partition' >&2\nexit 1\n", "srun": ""})
    code, _, error = script(reproduce, f"{grid(GRID)} --launcher slurm")
    assert code == 2 and error.splitlines()[-1].startswith("error: SLURM refuses") and "no such partition" in error


def test_without_submitit_one_line_says_what_to_install(
    grid: Callable[[str], str],  # noqa: F811
    script: Words,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    code, _, error = script(reproduce, f"{grid(GRID)} --launcher slurm")
    assert (code, error) == (2, "error: submitit is not installed; run `pip install -r requirements-sweep.txt`\n")
