"""benchmarks/compare.py: the two sides that need no checkout, and what is said where one is missing."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, offline

from tailtune.benchmarks import compare, limits, step
from tailtune.benchmarks.steps import clock
from tailtune.benchmarks.steps.products import products_of
from tailtune.benchmarks.steps.side import Side
from tailtune.configs.errors import UserError

TINY = {"name": "tiny", "data": "fake_lt", "model": "tiny_clip_peft", "pairs": [], "prec": "fp32", "batch": 4}


def test_our_side_trains_one_step_for_each_command() -> None:
    with Side("ours", TINY, ROOT, threads=1) as side:
        assert all(side.step()[kind] > 0 for kind in ("processor", "wall") for _ in range(2))


@pytest.mark.slow
def test_a_side_that_cannot_start_is_named() -> None:
    with pytest.raises(UserError, match="ours of tiny stopped"):
        Side("ours", {**TINY, "model": "no_model"}, ROOT, threads=1)


def test_the_memory_is_the_peak_since_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, whose counters are numbers here; the second step needs less than the first one."""
    used, answers = {"now": 100, "peak": 900}, []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: used["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: used["peak"])
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 2 * used["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: used.update(peak=used["now"]))
    monkeypatch.setattr(clock.device, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(clock.device, "finish", lambda: None)
    watch = object.__new__(clock.Clock)  # its constructor takes the standard output of the process
    monkeypatch.setattr(watch, "commands", lambda: iter(["", ""]), raising=False)
    monkeypatch.setattr(watch, "answer", answers.append, raising=False)
    for needed, _ in zip((500, 300, 0), watch.batches(None), strict=False):
        used["peak"] = max(used["peak"], needed)
    assert [each["memory"] for each in answers] == [400, 400]


def test_two_configs_are_measured_by_turns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each with its own name, in milliseconds an image, and the ratio of the medians."""
    seconds = iter([0.01, 0.05, 0.02, 0.06, 0.09, 0.07])
    monkeypatch.setattr(step, "measure", lambda *_: next(seconds))
    words = ["-d", "digits_lt", "-m", "tiny_clip_peft", "--batch", "2", "--rounds", "3", "--beside"]
    assert step.main([*words, "tiny_clip_text_peft"]) == 0
    first, *lines, ratio = capsys.readouterr().out.splitlines()
    assert first.startswith("digits_lt tiny_clip_peft tiny_clip_text_peft batch 2 on ")
    found = [re.fullmatch(r" fp32 (\w+) +([\d.]+) ms/image \(least ([\d.]+)\) .*", line).groups() for line in lines]
    assert found == [("tiny_clip_peft", "10.0", "5.0"), ("tiny_clip_text_peft", "30.0", "25.0")]
    assert ratio == " fp32 tiny_clip_text_peft / tiny_clip_peft = 3.00"
    assert step.main([*words, "tiny_clip_peft"]) == 2 and "name another one" in capsys.readouterr().err


def test_the_products_are_those_of_the_step() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    inputs, seen = torch.randn(2, 4), []

    def step() -> None:
        seen.append(len(seen))
        torch.nn.functional.gelu(torch.nn.functional.linear(inputs, weight)).sum().backward()

    replay = products_of(step)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        replay()
    names = [event.key for event in profile.key_averages() if event.key.startswith("aten::")]
    assert len(seen) == 2 and "aten::mm" in names and not any("gelu" in name for name in names)


def test_rows_without_a_checkout_are_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--only", "LoRA bf16"]) == 0
    assert "skipped: no --lift" in capsys.readouterr().out
    assert compare.main(["--lift", "/nowhere"]) == 2
    assert "git clone https://github.com/shijxcs/LIFT" in capsys.readouterr().err


@pytest.mark.slow
def test_the_help() -> None:
    """Of the file itself, in a process that does not know the package yet."""
    command = [sys.executable, str(Path(ROOT, "benchmarks/compare.py")), "--help"]
    done = subprocess.run(command, env=offline(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--dirmixe DIR" in done.stdout


@pytest.mark.slow
def test_memory_is_measured_above_the_model() -> None:
    """More images need more memory."""
    needed = []
    for batch in (8, 64):
        with Side("ours", {**TINY, "batch": batch}, ROOT, threads=1) as side:
            needed.append(side.step()["memory"])
    assert 0 < needed[0] < needed[1]


@pytest.mark.slow
def test_limits_prints_a_step_and_its_floor(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = compare.Row("tiny", "lift", {}, "tiny_clip_peft", size=("fake_lt", 4), targets={"fp32": (None, 2.0)})
    monkeypatch.setattr(limits, "ROWS", (row,))
    assert limits.main(["--rounds", "1"]) == 1  # no floor is above the step
    assert re.search(r"tiny +fp32 +[\d.]+ ms +[\d.]+ ms +[01]\.\d\d +2\.00", capsys.readouterr().out)
