"""The campaign for a minute; and that a broken promise is seen at all."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import psutil
import pytest
import torch
from conftest import ROOT
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiers import slow_except

from tailtune.tests.fuzz import bench, runner
from tailtune.tests.fuzz.bench import Bench
from tailtune.tests.fuzz.damage import DAMAGES, fits
from tailtune.tests.fuzz.decoding import DECODERS, LOOK, case, group
from tailtune.tests.fuzz.hard_pictures import HARD
from tailtune.tests.fuzz.options import WILD, hostile, schema
from tailtune.tests.fuzz.promises import broken, lost, snapshot
from tailtune.tests.fuzz.runner import Limits, Outcome, run


@pytest.mark.slow
def test_a_minute_of_the_campaign() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--minutes", "1", "--seed", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("program", "promise", "what"),
    [
        ("pass", "", ""),
        ("sys.exit('error: a is not b') or 1", "d", "exit code 1"),
        ("print('error: a is not b', file=sys.stderr); sys.exit(2)", "", ""),
        ("print('warning\\nerror: a is not b', file=sys.stderr); sys.exit(2)", "d", "not one line"),
        ("sys.exit(2)", "d", "not one line"),
        ("sys.exit(3)", "d", "exit code 3"),
        ("os.kill(os.getpid(), 11)", "d", "exit code -11"),
        ("int('x')", "d", "traceback: ValueError"),
        ("time.sleep(60)", "c", "hangs"),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", "c", "hangs"),
        ("b'x' * MUCH", "c", "gigabyte"),
        ("subprocess.Popen(['sleep', '60'])", "c", "leaves processes behind"),
    ],
)
def test_broken_promises_are_seen(
    program: str, promise: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "GRACE", 0.2)
    (cwd := tmp_path / "cwd").mkdir()
    limits = Limits(seconds=2.0 if "60" in program else 200.0, memory=2**28)
    much = psutil.Process().memory_info().rss + 2**29  # what a process is forked from counts as its own
    program = program.replace("MUCH", str(much))
    outcome = run([], cwd, limits, program=["-c", f"import os, signal, subprocess, sys, time; {program}"])
    found = broken(outcome, limits=limits)
    assert (found.promise if found else "") == promise, outcome
    assert what in (found.what if found else "")


def test_lost_files_are_seen(tmp_path: Path) -> None:
    for name in ("a", "b", "c/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    before = snapshot(tmp_path)
    (tmp_path / "new").touch()
    assert lost(before, snapshot(tmp_path), "") is None
    (tmp_path / "a").write_text("b")
    assert "changed" in lost(before, snapshot(tmp_path), "").what
    (tmp_path / "c" / "d").unlink()
    assert "gone" in lost(before, snapshot(tmp_path), "").what


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("suffix", [".json", ".yaml", ".safetensors"])
def test_damage_changes_a_file(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / "output" / "run" / f"facts{suffix}"
    path.parent.mkdir(parents=True)
    path.with_name(f"other{suffix}").write_text("{}")
    if suffix == ".safetensors":
        save_file({"a": torch.arange(6.0).view(3, 2)}, path)
    else:
        path.write_text('{"steps": 6, "name": 1.5}' if suffix == ".json" else "lr: 0.1\nseed: 1\n")
    before = snapshot(tmp_path)
    if fits(kind, path):
        assert DAMAGES[kind](path, Random(1))
        assert snapshot(tmp_path) != before


def test_every_kind_of_option_is_drawn() -> None:
    assert {entry.parse for entry in schema().values()} <= WILD.keys()
    assert all(not hostile(key).is_empty for key in schema())


def test_a_seed_names_the_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "BATCH", 5)

    def drawn(name: str, seed: int) -> list[str]:
        values = Bench("values", seed, tmp_path / name, Limits()).draws(st.text())
        return [next(values) for _ in range(8)]

    assert drawn("a", 1) == drawn("b", 1) != drawn("c", 2)


# --- pictures --------------------------------------------------------------------------------------------------------

QUICK = [kind for kind in HARD if not kind.startswith(("largest", "many_scans", "text_", "sparse_"))]
"""Kinds that take no time. `test_pictures.py` has sparse files."""


def started(script: str, argv: Sequence[str], cwd: Path) -> Outcome:
    """A new Python, because this process has threads and must not be forked."""
    return run(argv, cwd, Limits(120), program=[script])


@pytest.mark.parametrize("decoder", slow_except(DECODERS[:1], DECODERS), ids=" ".join)
def test_verify_and_the_loader_agree_on_damaged_pictures(decoder: Sequence[str], tmp_path: Path) -> None:
    (folder := tmp_path / "case").mkdir()
    pictures = group(3, [*QUICK, "sparse_jpeg_marker"], 22)
    assert case(folder, pictures, [*decoder, "num_workers", "0"], 3, started, Limits(120)) is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, ""),
        ({"skipped": []}, "`on_bad_image skip` differ"),
        ({"skipped": ["test/bad.png", "test/good1.png"]}, "`on_bad_image skip` differ"),
        ({"raised": {}}, "`on_bad_image raise` differ"),
        ({"raised": {"test/bad.png": "an image is damaged"}}, "does not name the path"),
        ({"stopped": ""}, "does not stop at a bad image"),
        ({"train": ["train/good1.png"]}, "images that are left out differ"),
        ({"missing": ["test/bad.png", "test/good1.png"]}, "refuses what can be decoded"),
        ({"missing": []}, "accepts what cannot be decoded"),
    ],
)
def test_disagreement_about_a_picture_is_seen(change: dict, what: str, tmp_path: Path) -> None:
    bad, text = "test/bad.png", "cannot read test/bad.png: not found"
    seen = {"train": [], "skipped": [bad], "raised": {bad: text}, "stopped": text, "missing": [bad], **change}
    missing = {"train": [], "test": seen["missing"]}
    report = {split: {"missing": paths, "unreadable": {}} for split, paths in missing.items()}

    def pretended(script: str, argv: Sequence[str], cwd: Path) -> Outcome:
        (cwd / "report.json").write_text(json.dumps({"splits": report}))
        return Outcome("", 0, json.dumps(seen) if script == LOOK else "", "", 0.0, 0, False, 0)

    # With seed 0, the picture is a test image.
    found = case(tmp_path, {"bad.png": lambda path, draw: False}, [], 0, pretended, Limits())
    assert what in (found.what if found else "") and bool(found) == bool(what)
