"""What a console of 80 columns shows: tables with long names and many columns, and what their columns are."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import Cli

from tailtune.configs.console_text import WIDTH, Column, shortened, table_lines, wrapped
from tailtune.trainers.comparison.paired_tests import Interval, McNemar, Paired
from tailtune.trainers.comparison.rows import Row
from tailtune.trainers.comparison.tables import Table
from tailtune.trainers.comparison.text_format import as_text
from tailtune.trainers.runs.metrics_file import RunLabel, headline
from tailtune.trainers.runs.result_table import COLUMNS, read_result, table

LONG = "a_config_of_mine_whose_name_says_everything_that_it_was_ever_trained_with"
RATIOS = (50, 25, 10, 5, 2)
ELEVEN = [f"forward{r}" for r in RATIOS] + ["uniform"] + [f"backward{r}" for r in RATIOS[::-1]]


def widest(text: str) -> int:
    return max(map(len, text.splitlines()))


def metrics(**more: Any) -> dict[str, Any]:
    return {**dict.fromkeys(COLUMNS, 100.0), **more}


def wide_result(experts: int) -> dict[str, Any]:
    """The widest result: long names, 8,142 classes, all distributions and draws, adapted and with a target prior."""
    predictors = {
        "plain": metrics(),
        "sade_online": metrics(gain=-100.0, weights=[1 / experts] * experts),
        "target_prior": metrics(gain=-100.0, kind=f"{LONG}.json", kl=12.3456),
    }
    draws = [f"dirichlet-backward{k}" for k in (1, 2, 100)]
    spread = {name: {"mean": 100.0, "std": 57.74} for name in COLUMNS}
    part = {"draws": 1000, "predictors": dict.fromkeys(predictors, spread)}
    entry = {"n": 1_234_567, "expected_accuracy": 100.0, "predictors": predictors}
    used = {"all": [100 / experts] * experts, "gflops_per_image": 1.5, "gflops_all_experts": 17.58}
    return {
        "data": f"{LONG}_data",
        "model": f"{LONG}_model",
        "backbone": f"open_clip:{LONG}",
        "seed": 2**63 - 1,
        "class_counts": [1] * 8142,
        "test": metrics(experts_used=used | {"saved_percent": 91.2}, per_class_acc=[0.0] * 8142),
        "val": metrics(few_acc=None),
        "distributions": dict.fromkeys([*ELEVEN, *draws, LONG], entry),
        "dirichlet": {"backward": part, "uniform": part, "all": part},
    }


@pytest.mark.parametrize("experts", [3, 20])
def test_the_widest_result_has_80_columns(experts: int) -> None:
    text = table(wide_result(experts))
    assert widest(text) <= WIDTH
    for name in [*ELEVEN, "val", "100.00 ± 57.74", "1,234,567", f"w{experts}", "…"]:
        assert name in text
    legend = " ".join(text.split())
    for explained in ("ECE: ", "expected: ", "sade_online: ", "gain: ", "KL: ", "standard deviation over"):
        assert legend.count(explained) == 1, explained


def test_the_title_names_the_backbone_if_it_is_known() -> None:
    result = {"data": "digits_lt", "model": "mine", "backbone": "CLIP-ViT-B/16", "seed": 3, "test": metrics()}
    assert table(result).startswith("digits_lt · mine · CLIP-ViT-B/16 · seed 3\n")
    result.pop("backbone")
    assert table(result).startswith("digits_lt · mine · seed 3\n"), "a result of a version before this entry"


def test_a_result_says_its_backbone(launch: Cli) -> None:
    words = "-d fake_lt -m tiny_clip pretrained none max_steps 1 batch_size 16 num_workers 0 report none output_dir run"
    done = launch(words)
    assert done.returncode == 0, done.stderr
    assert "\nfake_lt · tiny_clip · TinyCLIP · seed 0\n" in done.stdout
    assert read_result(Path("output/run/metrics.json"))["backbone"] == "TinyCLIP"
    again = launch(words, "test_only True test_dists uniform")
    assert "\nfake_lt · tiny_clip · TinyCLIP · seed 0\n" in again.stdout


def test_a_run_on_a_terminal(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and evaluation: no line is wider, paths aside, and each epoch has one line."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    words = "-d fake_lt -m tiny_clip_peft pretrained none num_epochs 3 batch_size 16 max_test_images 20 output_dir run"
    done = launch(words, "test_dists all target_prior estimate")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("epoch ")] == ["1/3", "2/3", "3/3"]
    assert not [line for line in lines if len(line) > WIDTH and "/" not in line]
    whole = Path("output/run/log.txt").read_text().splitlines()
    assert any("target_prior: uncalibrated" in line and line.endswith("(train with val_per_class)") for line in whole)


def test_what_a_run_begins_with() -> None:
    info = SimpleNamespace(class_counts=np.array([118_800] * 8142))
    data: Any = SimpleNamespace(info=info, train=range(437_513), test=range(24_426))
    params = {"tuner": 12_345_678_901, "trainable": 22_345_678_901, "total": 123_456_789_012}
    method: Any = SimpleNamespace(counts=lambda: params)
    lines = headline(RunLabel(f"{LONG}_data", LONG, f"timm:{LONG}", 0, 1), data, method).splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert lines[0].startswith(LONG) and any(line.startswith(f"{LONG}:") for line in lines)
    short = headline(RunLabel("digits_lt", "mine", "ResNet-32", 0, 1), data, method)
    assert "118,800 … 118,800 each" in " ".join(short.split())


def test_a_table_with_more_columns_than_fit_is_several_tables() -> None:
    def group(name: str, count: int) -> list[Column]:
        return [Column(f"{name}{number}", ["1.00", "22.00"]) for number in range(count)]

    names = Column("row", ["one", "two"])
    together = table_lines(names, [group("a", 5), group("b", 5)])
    assert len(together) == 4 and together[0].split() == ["row", *(f"{n}{k}" for n in "ab" for k in range(5))]
    apart = table_lines(names, [group("a", 6), group("b", 6)])
    assert len(apart) == 9 and apart[4] == "" and apart[5].split() == ["row", *(f"b{k}" for k in range(6))]
    broken = table_lines(names, [group("a", 30)])
    assert max(map(len, broken)) <= WIDTH and "\n".join(broken).count("two") == 3


def test_texts_are_cut_in_the_middle_and_wrapped() -> None:
    assert shortened("forward50", 9) == "forward50" and shortened("run_1_of_many_seed_17", 12) == "run_…seed_17"
    assert wrapped("x " * 100, "  ")[1].startswith("  x") and max(map(len, wrapped("y" * 200))) == WIDTH


def test_paths_are_whole_and_stay_where_they_are() -> None:
    path = "output/" + "x" * 70 + "/report.html"
    assert wrapped(f"report {path}", "  ", whole=True) == [f"report {path}"]
    text = f"warning: {'words ' * 14}end, and {path} is where it is, {'words ' * 14}end"
    lines = wrapped(text, "  ", whole=True)
    assert sum(path in line for line in lines) == 1 and " ".join(map(str.strip, lines)) == text
    assert all(len(line) <= WIDTH for line in lines if path not in line)


def compared() -> Table:
    result = {"seed": 0, "commit": "f" * 40, "hardware": "CPU", "packages": {"torch": "2"}, "notes": ["a note " * 20]}
    result |= {"test": metrics(), "params": {"trainable": 123_456_789}}
    rows = [Row("inat2018", f"{LONG}_{number}", 1, [result]) for number in range(2)]
    interval = Interval(-100.0, -100.0, 100.0)
    paired = Paired(
        rows[1].name,
        differences=dict.fromkeys(("accuracy", "many_acc", "med_acc", "few_acc"), interval),
        mcnemar=McNemar(24_000, 24_000, 0.0),
        by_class=np.array([1.0] * 8000 + [-1.0] * 142),
    )
    return Table(rows, ("accuracy", "many_acc", "med_acc", "few_acc"), paired=[paired])


def test_a_comparison_has_80_columns() -> None:
    text = as_text(compared())
    assert widest(text) <= WIDTH
    whole = " ".join(text.split())
    for part in (f"1 {LONG}_0", f"2 {LONG}_1", "-100.0 [-100.0, +100.0]", "8000 / 142 / 0", "trained: ", "McNemar"):
        assert part in whole, part
