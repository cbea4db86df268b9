"""benchmarks/gpu.py: every row in small on the CPU, what is a miss, and files that are complete at any time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, offline

from tailtune.benchmarks import gpu
from tailtune.benchmarks.gpu_checks import judged, outcomes
from tailtune.benchmarks.gpu_report import Report
from tailtune.benchmarks.gpu_steps import GIB, Bench, missed
from tailtune.benchmarks.steps.device import peak_flops

FACTS = {"command": "", "commit": "abc", "hardware": "a GPU", "torch": "2"}


@pytest.mark.slow
def test_every_row_in_small(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--size", "toy", "--minutes", "25", "--json", str(tmp_path / "gpu.json")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/gpu.py"), *words], env=offline(), capture_output=True, timeout=1600
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert list(found) == [name for row in gpu.rows(True, tmp_path / "gpu.json", "") for name in row.names]
    page = (tmp_path / "gpu.md").read_text()
    for name, facts in found.items():
        assert facts["status"] == ("skipped" if "zstiny" in name else "measured"), (name, facts)
        assert f"| {name} | " in page
    for name in ("ViT-B/16 bf16", "SADE ResNet-32 ×3 fp32"):
        assert found[name]["images_per_second"] > 0 and found[name]["flops"] > 0 and found[name]["waits"] == []
    assert found["one trajectory"]["passed"] > 5 and not found["one trajectory"]["failed"]
    assert found["default tests"]["passed"] > 50 and found["default tests"]["complete"]


def test_what_misses_a_target() -> None:
    targets = {"ratio": 2.0, "mfu": 0.5, "GiB": 6.0}
    assert missed({"ratio": 2.1, "mfu": 0.6, "allocated": 6 * GIB}, targets) == []
    assert missed({"mfu": None, "allocated": None}, targets) == [], "what was not measured misses nothing"
    found = missed({"ratio": 1.9, "mfu": 0.4, "allocated": 7 * GIB}, targets)
    assert found == ["ratio 1.90 (target 2)", "mfu 0.40 (target 0.5)", "GiB 7.00 (target 6)"]


def test_what_fits_the_card() -> None:
    bench = Bench("NVIDIA H200", False, {}, 0.0)
    assert judged({"reserved": 19e9}, bench)["missed"] == [] and judged({"reserved": 21e9}, bench)["missed"]
    assert judged({"why": "out of memory"}, bench)["status"] == "failed"
    assert judged({"why": "nothing trains"}, bench)["status"] == "skipped"


def test_peaks_are_of_the_device_that_is_named() -> None:
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12 and peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989.4e12
    assert peak_flops("NVIDIA L4", "fp16") == 121e12 and peak_flops("NVIDIA L40S", "fp16") == 362e12
    assert peak_flops("Tesla V100-SXM2-16GB", "bf16") is None and peak_flops("", "fp32") is None


@pytest.mark.parametrize("before", [True, False], ids=["pytest-xdist", "alone"])
def test_outcomes_are_counted_while_pytest_runs(before: bool) -> None:
    lines = [("tests/test_a.py::test_one[x y]", "PASSED"), ("tests/test_a.py::test_two", "FAILED")]
    lines += [("tests/test_b.py::test_three", "SKIPPED"), ("tests/test_b.py::test_four", "ERROR")]
    shown = [f"[gw0] [ 1%] {outcome} {name} " if before else f"{name} {outcome} [ 1%]" for name, outcome in lines]
    output = "\n".join([*shown, "tests/test_b.py::test_five ", "FAILED tests/test_a.py::test_two - assert 1 == 2"])
    failed = ["tests/test_a.py::test_two", "tests/test_b.py::test_four"]
    assert outcomes(output) == {"passed": 1, "skipped": 1, "failed": failed}


def test_the_files_are_complete_after_each_row(tmp_path: Path) -> None:
    report = Report(tmp_path / "new" / "gpu.json", FACTS, ["fast", "slow"])
    assert report.page.read_text().count("| not run |") == 2 and not report.misses()
    report.add("fast", {"status": "measured", "batch": 8, "seconds": 0.5, "waits": ["a.py:3 step"], "missed": []})
    assert not report.misses() and "- `a.py:3 step`" in report.page.read_text()
    assert json.loads(report.path.read_text())["rows"]["slow"] == {"status": "not run"}
    report.add("slow", {"status": "failed", "why": "ours stopped"})
    assert report.misses() and "failed; ours stopped" in report.page.read_text()


def test_wrong_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, says in ((["--lift", "/nowhere"], "git clone https://github.com/shijxcs/LIFT"), ([], "no CUDA GPU")):
        assert gpu.main([*words, *(["--device", "cpu"] if words else []), "--json", str(tmp_path / "gpu.json")]) == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
