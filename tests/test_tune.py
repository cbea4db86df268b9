"""scripts/tune.py: ranges, what is refused, trials that are runs, pruning, interruption, and PostgreSQL."""

import csv
import io
import shlex
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from conftest import ROOT, offline
from services import postgres, postgres_programs
from test_bad_input import signal_after

from tailtune import main as tailtune
from tailtune.configs.errors import UserError
from tailtune.scripts import tune
from tailtune.scripts._search import Search
from tailtune.scripts._search_space import Range, split_space
from tailtune.trainers.runs.result_table import read_result

BASE = "-d fake_lt -m tiny_clip_peft pretrained none subset_cap 8 batch_size 32 max_test_images 8 num_epochs 2"
SPLIT = f"{BASE} val_per_class 1"
Tune = Callable[..., tuple[int, str, str]]


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tune:
    """`search("-d fake_lt …", "--trials", 2)` in a scratch folder → exit code, what it printed, its error line."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = tune.main([part for word in words for part in str(word).split()])
        AcceleratorState._reset_state(reset_partial_state=True)
        return (code, *capsys.readouterr())

    return call


def trials(study: str = "fake_lt_tiny_clip_peft") -> list[dict[str, str]]:
    with Path(f"output/tables/{study}.csv").open() as file:
        return list(csv.DictReader(file))


class Fixed:
    """A trial that takes the largest value, or the last choice."""

    def suggest_float(self, key: str, least: float, most: float, log: bool) -> float:
        return most

    def suggest_int(self, key: str, least: int, most: int) -> int:
        return most

    def suggest_categorical(self, key: str, values: Sequence[str]) -> str:
        return values[-1]


def test_ranges_are_told_from_values() -> None:
    pairs, space = split_space(
        shlex.split("seed 3 'lr=log(1e-3, 0.123456)' r 'int(1,8)' peft_args={r:8} loss=choice(LA,CE)")
    )
    assert pairs == ["seed", "3", "peft_args", "{r:8}"]
    assert {key: (found.kind, found.values) for key, found in space.items()} == {
        "lr": ("log", ("1e-3", "0.123456")),
        "r": ("int", ("1", "8")),
        "loss": ("choice", ("LA", "CE")),
    }
    assert {key: found.suggest(Fixed(), key) for key, found in space.items()} == {
        "lr": "0.123456",
        "r": "8",
        "loss": "CE",
    }
    assert Range.parse("lr", "uniform(-1,2)") == Range("uniform", ("-1", "2"))


@pytest.mark.parametrize(
    ("text", "drawn", "value"),
    [
        ("uniform(0.9,0.99999)", 0.999987, "0.99999"),
        ("uniform(20000,20010)", 20001.23456, "20001.23"),
        ("uniform(0,1)", 0.123456, "0.1235"),
        ("log(1e-5,1)", 0.000123456, "0.0001235"),
    ],
)
def test_a_number_is_rounded_within_its_range(text: str, drawn: float, value: str) -> None:
    """A momentum of 1 was drawn from `uniform(0.9,0.99999)`, and one value from a narrow range of large numbers."""

    class Drawn(Fixed):
        def suggest_float(self, *_: object, **__: object) -> float:
            return drawn

    found = Range.parse("lr", text)
    assert found is not None and found.suggest(Drawn(), "lr") == value


@pytest.mark.parametrize(
    "text",
    [
        *("log(0,1)", "log(-1,1)", "log(1,0.1)", "log(1)", "log(1,2,3)", "log(a,b)", "log()", "uniform(1,1)"),
        *("uniform(0,inf)", "uniform(-inf,1)", "uniform(nan,1)", "uniform(0,nan)", "int(1,2.5)", "int(3,1)"),
        *("choice(a)", "choice(a,a)", "choice(a,)", "choice()"),
    ],
)
def test_a_wrong_range(text: str) -> None:
    with pytest.raises(UserError, match="^lr="):
        Range.parse("lr", text)


def test_code_is_no_range() -> None:
    assert Range.parse("lr", "__import__('os').getpid()") is None
    with pytest.raises(UserError, match="two numbers"):
        Range.parse("lr", "log(1,__import__('os').getpid())")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (f"{BASE} lr=log(1e-3,1)", ("fake_lt has none", "test images must not choose", "val_per_class")),
        (SPLIT, ("nothing to search", "'lr=log(1e-3,1e-1)'")),
        (f"{SPLIT} lrr=log(1e-3,1)", ("unknown option 'lrr'", "'lr'")),
        (f"{SPLIT} lr=log(1e-3,1) lr=log(1e-3,1)", ("lr is given twice",)),
        (f"{SPLIT} lr=0.1 lr=log(1e-3,1)", ("lr is given twice",)),
        (f"{SPLIT} lr=log(1e-3,1) output_dir run", ("output_dir", "leave it out")),
        (f"{SPLIT} lr=log(1e-3,1) --trials 0", ("--trials 0",)),
        (f"{SPLIT} lr=log(1e-3,1) --startup -1", ("--startup -1",)),
        (f"{SPLIT} lr=log(1e-3,1) --study ../a", ("--study ../a", "a name without /")),
        (f"{SPLIT} lr=log(1e-3,1) --tirals 3", ("--tirals",)),
        (f"{SPLIT} lr=log(1e-3,1) --metric few_acc", ("few_acc",)),
        (f"{SPLIT} lr=log(1e-3,1) --storage nosuch://", ("--storage", "nosuch")),
        (f"{SPLIT} lr=log(1e-3,1) --storage postgresql://me:secret@localhost:1/x", ("me:***@localhost", "refused")),
        (f"{SPLIT} loss_type=choice(LA,Hinge)", ("Hinge",)),
        (f"{SPLIT} tte=choice(True,False)", ("tte changes nothing that is trained", "give it one value")),
        (f"{SPLIT} num_workers=int(0,2)", ("num_workers changes nothing that is trained",)),
        (f"{BASE} val_per_class=int(1,2)", ("val_per_class changes the validation images",)),
        (f"{SPLIT} loss_type CE tau=uniform(0,2)", ("tau 0.0 does nothing without loss_type LA",)),
        (f"{SPLIT.replace(' num_epochs 2', '')} num_epochs=int(0,3)", ("val_every 1 is above num_epochs 0",)),
    ],
)
def test_what_cannot_be_searched_is_one_line(search: Tune, words: str, parts: Sequence[str]) -> None:
    pytest.importorskip("optuna")
    code, _, error = search(words)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert "secret" not in error and not list(Path().glob("output/fake_lt*"))


@pytest.mark.parametrize(("loss", "read"), [("LA", True), ("CE", False)])
def test_a_trial_leaves_out_what_nothing_reads(loss: str, read: bool) -> None:
    pairs, space = split_space(
        [*SPLIT.split()[4:], "loss_type=choice(LA,CE)", "la.tau=uniform(0.5,2)", "lr=log(1e-3,1)"]
    )
    search = Search("fake_lt", "tiny_clip_peft", pairs, space, "mean_acc")
    search.check()
    words = search.words_of_trial({"loss_type": loss, "la.tau": "0.7", "lr": "0.1"})
    assert ("la.tau" in words, words[-2:]) == (read, ["lr", "0.1"])


def test_tables_leave_out_values_that_a_trial_did_not_use() -> None:
    """A value beside a result looks as if the result were of it."""
    command = "python main.py -d fake_lt -m tiny_clip_peft loss_type CE lr 0.1"
    params = {"loss_type": "CE", "la.tau": 0.7, "lr": 0.1}
    trial = SimpleNamespace(
        number=0,
        value=50.0,
        params=params,
        user_attrs={"command": command},
        state=SimpleNamespace(name="COMPLETE"),
        intermediate_values={},
    )
    search = Search("fake_lt", "tiny_clip_peft", [], dict.fromkeys(params, Range("choice", ("a", "b"))), "mean_acc")
    (row,) = csv.DictReader(io.StringIO(tune.table([trial], search)))
    assert {key: row[key] for key in params} == {"loss_type": "CE", "la.tau": "", "lr": "0.1"}


@pytest.mark.parametrize(("metric", "best"), [("mean_acc", 60.0), ("nll", 40.0)])
def test_a_pruned_trial_has_its_best_validation(metric: str, best: float) -> None:
    """The others have theirs, and Optuna's value of a pruned trial is the last one."""
    trial = SimpleNamespace(
        number=0,
        value=50.0,
        params={},
        user_attrs={},
        state=SimpleNamespace(name="PRUNED"),
        intermediate_values={1: 40.0, 2: 60.0, 3: 50.0},
    )
    search = Search("fake_lt", "tiny_clip_peft", [], {}, metric)
    (row,) = csv.DictReader(io.StringIO(tune.table([trial], search)))
    assert (float(row[metric]), row["epochs"]) == (best, "3")


def test_without_optuna_one_line_says_what_to_install(search: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    code, _, error = search(f"{SPLIT} lr=log(1e-3,1)")
    assert (code, error) == (2, "error: optuna is not installed; run `pip install -r requirements-sweep.txt`\n")


def test_a_search_is_interrupted_and_goes_on(search: Tune) -> None:
    """Trials are runs of main.py. The interrupted one continues with its values, and does not count twice."""
    pytest.importorskip("optuna")
    words = f"{SPLIT} lr=log(1e-3,1) --no-pruning"
    with signal_after(3):
        code, printed, error = search(words, "--trials 2")
    assert (code, error) == (130, "interrupted; the same command continues\n")
    begun = printed.splitlines()[0].partition(": ")[2]
    code, printed, error = search(words, "--trials 2")
    assert (code, error) == (0, "")
    assert printed.splitlines()[0].partition(": ")[2] == begun and "resuming after step 3" in printed
    rows = trials()
    assert [row["state"] for row in rows] == ["complete", "complete"]
    for row in rows:
        history = read_result(Path(row["folder"]) / "metrics.json")["train"]["validations"]
        assert float(row["mean_acc"]) == max(validated["mean_acc"] for validated in history)
    best = max(rows, key=lambda row: float(row["mean_acc"]))
    assert f"best: trial {best['trial']}" in printed and best["command"] in printed
    assert tailtune.main(shlex.split(best["command"])[2:]) == 0, "the command is as it can be copied"
    code, _, error = search(words.replace("log(1e-3,1)", "log(1e-2,1)"))
    assert code == 2 and "another search" in error and "--study" in error


def test_the_test_images_decide_nothing(search: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller value is better for nll, and the choice is that of the validations."""
    pytest.importorskip("optuna")
    code, _, error = search(f"{SPLIT} lr=log(1e-3,1) --no-pruning --metric nll --trials 2")
    assert (code, error) == (0, "")
    for row in trials():
        result = read_result(Path(row["folder"]) / "metrics.json")
        assert float(row["nll"]) == min(validated["nll"] for validated in result["train"]["validations"])
        assert result["test"]["nll"] != float(row["nll"])
        assert "keep best:nll" in row["command"]


def pruned_after(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    """Every trial from this one on is behind all others."""
    import optuna

    monkeypatch.setattr(optuna.pruners.MedianPruner, "prune", lambda self, study, trial: trial.number >= first)


def test_a_pruned_trial_ends_early_and_can_be_continued(search: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")
    with monkeypatch.context() as patch:
        pruned_after(patch, 1)
        code, printed, error = search(f"{SPLIT} lr=log(1e-3,1) --trials 2")
    assert (code, error) == (0, "") and "trial 1: pruned" in printed
    complete, pruned = trials()
    assert (complete["epochs"], pruned["state"], pruned["epochs"]) == ("2", "pruned", "1")
    assert not (Path(pruned["folder"]) / "metrics.json").exists()
    assert tailtune.main(shlex.split(pruned["command"])[2:]) == 0
    assert (Path(pruned["folder"]) / "metrics.json").exists()


def test_trials_that_fail_end_the_search_at_last(search: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")

    def fails(*_: Any) -> None:
        raise UserError("no weights")

    monkeypatch.setattr("tailtune.trainers.stages.run_stages", fails)
    code, printed, error = search(f"{SPLIT} lr=log(1e-3,1)")
    assert code == 2 and "5 trials failed one after another; the last one: no weights" in error
    assert "trial 4: failed: no weights" in printed and "trial 5" not in printed


def test_a_trial_of_a_worker_that_died_is_run_again(search: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optuna")

    class Killed(BaseException):
        """Nothing is told to the storage, as after SIGKILL."""

    def dies(*_: Any) -> None:
        raise Killed

    words = f"{SPLIT} lr=log(1e-3,1) --no-pruning"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("tailtune.trainers.stages.run_stages", dies)
        search(words)
    AcceleratorState._reset_state(reset_partial_state=True)
    with sqlite3.connect("output/tune/fake_lt_tiny_clip_peft.db") as storage:
        storage.execute("UPDATE trial_heartbeats SET heartbeat = '2020-01-01 00:00:00'")
        storage.execute("UPDATE trials SET state = 'RUNNING'")
    code, _, error = search(words, "--trials 1")
    assert (code, error) == (0, "")
    assert [(row["trial"], row["state"]) for row in trials()] == [("1", "complete")]


@pytest.mark.slow
@pytest.mark.skipif(postgres_programs() is None, reason="PostgreSQL of Debian's package is needed, and root")
def test_two_workers_share_a_search_in_postgresql(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    folder = tmp_path / "server"
    folder.mkdir()
    words = ["-d", "digits_lt", "-m", "tiny_clip_peft", "val_per_class", "1", "num_epochs", "3", "lr=log(1e-3,1)"]
    command = [sys.executable, str(ROOT / "scripts" / "tune.py"), *words, "--trials", "8", "--startup", "2"]
    with postgres(folder) as address:
        workers = [
            subprocess.Popen(
                [*command, "--storage", address], cwd=tmp_path, env=offline(), stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        printed = [worker.communicate(timeout=600)[0] for worker in workers]
        again = subprocess.run(
            [*command, "--storage", address], cwd=tmp_path, env=offline(), capture_output=True, text=True, timeout=100
        )
    print("\n".join(line for text in printed for line in text.splitlines() if line.startswith("trial ")), again.stdout)
    assert [worker.returncode for worker in workers] == [0, 0]
    of_each = [{line.split()[1] for line in text.splitlines() if line.startswith("trial ")} for text in printed]
    assert of_each[0] and of_each[1] and not of_each[0] & of_each[1]
    assert len(of_each[0] | of_each[1]) in (8, 9), "two may begin the last one at the same time"
    assert again.returncode == 0 and "trial 1:" not in again.stdout and "best: trial" in again.stdout
