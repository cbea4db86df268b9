"""scripts/reproduce.py and scripts/collect.py: grids, what is run, skipped and resumed, and the tables."""

import csv
import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT, offline
from small import LIFT_TUNERS
from test_bad_input import signal_after
from tiers import slow_except

from tailtune.configs import values_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import TEST, TRAIN
from tailtune.scripts import _grid, collect, reproduce
from tailtune.trainers.comparison.rows import ALL_METRICS, Row, number
from tailtune.trainers.comparison.tables import Table, footnotes
from tailtune.trainers.config_checks import check
from tailtune.trainers.evaluation.metrics import evaluate

TINY = "pretrained none max_steps 4 batch_size 8 max_test_images 20"
SMALL = f"""# Two losses on gratings
paper: Nobody, Table 0
metrics: [accuracy, few_acc]
axes:
  loss: [CE, LA]
rows:
  "{{loss}}, 50 % & more":
    run: -d fake_lt -m tiny_clip loss_type {{loss}} {TINY}
    published: {{fake_lt: [50.0, (40.0)]}}
"""

EXPERTS = ("ride", "sade", "batchformer")
Words = Callable[..., tuple[int, str, str]]


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """`grid(text)` → the path of a grid with this text, in the scratch folder that is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(text: str = SMALL) -> str:
        (tmp_path / "small.yaml").write_text(text)
        return "small.yaml"

    return write


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str]) -> Words:
    """`script(reproduce, "small.yaml --print")` → exit code, what it printed, its error line."""

    def call(module: Any, words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = module.main(words.split())
        AcceleratorState._reset_state(reset_partial_state=True)
        return (code, *capsys.readouterr())

    return call


def fake_result(words: str, seed: int = 0, **changes: Any) -> Path:
    """A finished run's files, with made-up numbers."""
    cfg = _grid.config([*words.split(), "seed", str(seed)])
    path = Path("output") / (cfg.output_dir or cfg.run_name)
    path.mkdir(parents=True, exist_ok=True)
    evaluation = values_of(cfg, TEST) | {"checkpoint": None, "of": str(path)}
    result = {"data": cfg.data, "model": cfg.model, "seed": seed, "commit": "0123456789abcdef-dirty", "notes": []}
    result |= {"hardware": "CPU", "packages": {"torch": "2.12.1"}, "evaluation": evaluation}
    result |= {"params": {"trainable": 1280}, "stopped_early": False}
    result |= {"test": {"accuracy": 90.0 + seed, "many_acc": 95.0, "med_acc": None, "few_acc": 80.0 + 2 * seed}}
    (path / "metrics.json").write_text(json.dumps(result | changes))
    (path / "config.yaml").write_text(yaml.safe_dump(values_of(cfg, TRAIN, TEST)))
    return path


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if line[:1] == "|"]


# --- grids -----------------------------------------------------------------------------------------------------------


def test_a_row_is_crossed_with_the_axes_that_it_mentions(grid: Callable[[str], str]) -> None:
    text = """# What it is
axes:
  data: {fake_lt, digits_lt: {more: num_epochs 20}}
  lr: [0.1, 0.0005]
rows:
  head only: -d {data} -m tiny_clip {more}
  lr {lr}:
    run:
      - -d {data} -m tiny_clip {more} lr {lr}
      - "-d cifar10 -m tiny_clip lr {lr} peft_args '{{r: 8}}'"
"""
    read = _grid.read(grid(text))
    assert (read.name, read.title, read.paper, read.seeds) == ("small", "What it is", None, (0,))
    assert [(cell.row, " ".join(cell.words[1:])) for cell in read.cells[:4]] == [
        ("head only", "fake_lt -m tiny_clip"),
        ("lr 0.1", "fake_lt -m tiny_clip lr 0.1"),
        ("lr 0.0005", "fake_lt -m tiny_clip lr 0.0005"),
        ("head only", "digits_lt -m tiny_clip num_epochs 20"),
    ]
    assert read.cells[-1].words[4:] == ("lr", "0.0005", "peft_args", "{r: 8}")


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("rows: {a: -d {data} -m tiny_clip}", "YAML"),
        ('rows: {a: "-d {data} -m tiny_clip"}', "{data}"),
        ("rows: {a: -m tiny_clip -d fake_lt}", "row 'a'"),
        ("rows: {a: {run: x}}", "row 'a'"),
        ("rows: {a: {run: [{x: 1}]}}", "'x'"),
        ("rows: {a: -d fake_lt -m tiny_clip lr}", "row 'a'"),
        ("axes: {}", "rows"),
        ("rows: {}", "no rows"),
        ("seeds: []\nrows: {a: -d fake_lt -m tiny_clip}", "no seeds"),
        ("seeds: 3\nrows: {a: -d fake_lt -m tiny_clip}", "no grid"),
        ("axes: [1]\nrows: {a: -d fake_lt -m tiny_clip}", "no grid"),
        ('rows: {a: "-d fake_lt -m tiny_clip lr {r"}', "expected '}'"),
        ("rows: {a: {run: -d fake_lt -m tiny_clip, published: {fake_lt: 3}}}", "no grid"),
        ("metrics: [uniform.speed]\nrows: {a: -d fake_lt -m tiny_clip}", "unknown metric 'uniform.speed'"),
        ("metrics: [speed]\nrows: {a: -d fake_lt -m tiny_clip}", "unknown metric 'speed'"),
        ("seed: [0, 1]\nrows: {a: -d fake_lt -m tiny_clip}", "did you mean 'seeds'"),
        ("rows: {a: {run: -d fake_lt -m tiny_clip, publish: {}}}", "row 'a' 'publish'"),
        ("axes: {lr: [1, 2]}\nrows: {a: -d fake_lt -m tiny_clip}", "no command mentions the axis lr"),
        (
            "axes: {lr: [1, 2]}\nrows: {a: '-d fake_lt -m tiny_clip lr {lr}'}",
            "two commands for fake_lt are the row 'a'",
        ),
        ("rows: {a: {run: -d fake_lt -m tiny_clip, published: {fakelt: [3]}}}", "fakelt, which no command uses"),
        ("rows: {a: {run: -d fake_lt -m tiny_clip, published: {fake_lt: [1, 2, 3, 4, 5]}}}", "than there are metrics"),
    ],
)
def test_a_bad_grid_is_one_line(grid: Callable[[str], str], script: Words, text: str, culprit: str) -> None:
    code, _, error = script(reproduce, f"{grid(text)} --print")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and culprit in error


def test_the_metrics_of_a_grid_are_those_of_a_result() -> None:
    metrics = evaluate(torch.eye(2), torch.tensor([0, 1]), {g: torch.tensor([0]) for g in ("many", "med", "few")})
    assert {*ALL_METRICS} == {*metrics, "bad_images"} - {"per_class_acc", "calibration"}


@pytest.mark.parametrize("words", ["lift/tab6", "none.yaml", "", "small.yaml --where data cifar10"])
def test_a_grid_that_is_not_there_is_one_line(grid: Callable[[str], str], script: Words, words: str) -> None:
    grid(SMALL)
    code, _, error = script(reproduce, words)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("name", _grid.names())
def test_every_shipped_grid_says_what_it_is_and_has_commands(name: str) -> None:
    grid = _grid.read(name)
    assert len(grid.title) > 5 and grid.cells
    assert all(cell.row == cell.row.strip() for cell in grid.cells)
    rows = [(cell.words[1], cell.row) for cell in grid.cells]
    assert len(rows) == len(set(rows)), "two rows of the same name"


def test_published_numbers_are_numbers_of_the_paper() -> None:
    """What could not be verified stands in brackets; nothing of our own claims to be published."""
    for grid in map(_grid.read, _grid.names()):
        numbers = [value for cell in grid.cells for value in cell.published.values()]
        assert grid.paper or not numbers
        assert all(0 < float(value.strip("()")) < 100 for value in numbers)


def test_the_grid_of_tuners_has_them_all_and_they_fit() -> None:
    cells = _grid.read("digits_tuners").cells
    assert {key for cell in cells for key in cell.facts} >= set(LIFT_TUNERS) - {"bn_tuning"}  # there is none in a ViT
    for cell in cells:
        if cell.facts["loss_type"] == "CE":  # the loss changes nothing of the model
            assert check(_grid.config(cell.words)).counts()["head"] == 1280


@pytest.mark.parametrize(
    "name",
    slow_except(
        ["sade/cifar100_lt", "batchformer/ride"],
        [name for name in _grid.names() if name.split("/")[0] in ("ride", "sade", "batchformer")],
    ),
)
def test_the_grids_of_experts_pass_the_dry_run(name: str) -> None:
    cells = {
        (*cell.words[2:], cell.words[1].rpartition("_ir")[0] or cell.words[1]): cell for cell in _grid.read(name).cells
    }
    for cell in cells.values():  # of several imbalance ratios one
        cfg = _grid.config(cell.words)
        assert check(cfg).num_experts == cfg.num_experts


def test_a_number_is_of_the_test_set_or_of_a_distribution() -> None:
    uniform = {"n": 9, "predictors": {"plain": {"accuracy": 3.0}}}
    adapted = {"n": 9, "predictors": {"plain": {"accuracy": 1.0}, "sade": {"accuracy": 2.0, "path": [[1.0]]}}}
    result = {"test": {"accuracy": 4.0}, "distributions": {"uniform": uniform, "backward50": adapted}}
    wanted = {"accuracy": 4.0, "uniform.accuracy": 3.0, "backward50.accuracy": 2.0, "backward50.plain.accuracy": 1.0}
    wanted |= {"uniform.sade.accuracy": None, "forward50.accuracy": None}
    assert {metric: number(result, metric) for metric in wanted} == wanted
    assert number({"test": {"accuracy": 4.0}}, "backward50.accuracy") is None, "a run without distributions"
    with pytest.raises(UserError, match="unknown metric"):
        number(result, "backward50.path")


def test_a_table_says_which_numbers_are_not_adapted() -> None:
    said = []
    for names in (["plain"], ["plain", "target_prior"]):
        lines = footnotes(Table([predicted("row", names)], ["accuracy"]))
        said.append(any("plain predictions" in line for line in lines))
    assert said == [False, True]


def test_a_table_of_single_runs_has_no_deviation() -> None:
    one = predicted("one", ["plain"])
    assert footnotes(Table([one], ["accuracy"]))[0].startswith("Seed 0; ")
    two = Row("data", "two", 2, one.results * 2)
    assert footnotes(Table([one, two], ["accuracy"]))[0].startswith("Mean ± standard deviation over seed 0; ")


def test_a_table_says_whose_numbers_a_distribution_has() -> None:
    """A run with `adapt sade` and a target prior has SADE's, and one without both the plain ones."""
    rows = [predicted("ce", ["plain"]), predicted("sade", ["plain", "sade"])]
    both = predicted("both", ["plain", "sade", "target_prior"])
    lines = footnotes(Table([*rows, both], ["backward50.accuracy"]))
    assert "plain: ce; sade: sade; sade (not target_prior): both" in lines[-1]
    for table in (Table(rows[:1], ["backward50.accuracy"]), Table([both], ["backward50.sade.accuracy"])):
        assert not any("predictors of the columns" in line for line in footnotes(table))


def predicted(name: str, predictors: list[str]) -> Row:
    """A row of a run with these predictors on a test distribution."""
    entry = {"n": 9, "predictors": {predictor: {"accuracy": 1.0} for predictor in predictors}}
    return Row("fake", name, 1, [{"seed": 0, "test": {"accuracy": 4.0}, "distributions": {"backward50": entry}}])


def test_columns_of_distributions_have_short_titles(half_run: str, script: Words) -> None:
    printed = script(collect, f"{half_run} --metrics accuracy backward50.accuracy backward50.plain.accuracy")[1]
    assert cells(printed)[0][4:] == [
        f"{title}, {whose}" for title in ("all", "backward50", "backward50.plain") for whose in ("published", "ours")
    ]
    assert cells(printed)[2][-1] == "n/a"


# --- reproduce -------------------------------------------------------------------------------------------------------


def test_print_shows_commands_once_and_runs_nothing(grid: Callable[[str], str], script: Words) -> None:
    text = """# Evaluations of two runs
seeds: [0, 1]
axes: {expand: [4, 8]}
rows:
  zero-shot: -d fake_lt -m zstiny_clip
  "expand {expand}": -d fake_lt -m tiny_clip test_only True tte True expand {expand}
"""
    code, printed, _ = script(reproduce, f"{grid(text)} --print -- root /data")
    assert code == 0 and not Path("output").exists()
    assert [line.removeprefix("python main.py -d fake_lt -m ") for line in printed.splitlines()] == [
        "zstiny_clip root /data",
        "tiny_clip root /data",
        "tiny_clip test_only True tte True expand 4 root /data",
        "tiny_clip root /data seed 1",
        "tiny_clip test_only True tte True expand 4 root /data seed 1",
        "tiny_clip test_only True tte True expand 8 root /data",
        "tiny_clip test_only True tte True expand 8 root /data seed 1",
    ]
    assert len(script(reproduce, "small.yaml --print --where expand 8 --seeds 3")[1].splitlines()) == 2


def test_a_grid_is_interrupted_and_resumed(grid: Callable[[str], str], script: Words) -> None:
    name = grid(SMALL)
    assert script(reproduce, f"{name} --where loss_type CE --seeds 1")[0] == 0
    with signal_after(2):
        code, _, error = script(reproduce, f"{name} --seeds 1")
    assert (code, error) == (130, "interrupted; the same command continues\n")
    planned = script(reproduce, f"{name} --seeds 1 --print")[1].splitlines()
    assert [line.endswith("# finished") for line in planned] == [True, False]

    code, printed, error = script(reproduce, f"{name} --seeds 1")
    assert (code, error) == (0, "")
    assert "finished before" in printed and "resuming after step 2" in printed
    table = cells(Path("output/tables/small.md").read_text())
    assert [row[:4] for row in table[2:]] == [
        ["fake_lt", f"{loss}, 50 % & more", "1,280", "1"] for loss in ("CE", "LA")
    ]
    assert "stopped before its last epoch (max_steps or patience) (2 of 2 runs)" in printed
    assert Path("output/tables/small.tex").exists() and Path("output/tables/small.csv").exists()


def test_a_failing_run_stops_the_grid_unless_told_otherwise(grid: Callable[[str], str], script: Words) -> None:
    bad = SMALL.replace("[CE, LA]", "[Hinge, LA]")
    code, printed, error = script(reproduce, grid(bad))
    assert code == 2 and "Hinge" in error and "[2/2]" not in printed and not Path("output/tables").exists()
    code, printed, error = script(reproduce, f"{grid(bad)} --keep-going")
    assert code == 2 and "Hinge" in error and "[2/2]" in printed
    assert [row[5] for row in cells(Path("output/tables/small.md").read_text())[2:]][0] == "not run"


# --- collect ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_run(grid: Callable[[str], str]) -> str:
    """A grid of two rows, one of which has two of its three seeds."""
    name = grid(SMALL + "seeds: [0, 1, 2]\n")
    fake_result(f"-d fake_lt -m tiny_clip loss_type CE {TINY}", 0)
    other = {"packages": {"torch": "2.13.0"}, "notes": ["an image is missing"], "stopped_early": True}
    fake_result(f"-d fake_lt -m tiny_clip loss_type CE {TINY}", 2, **other)
    return name


def test_markdown_has_published_and_ours(half_run: str, script: Words) -> None:
    code, printed, _ = script(collect, half_run)
    assert code == 0
    head, _, *rows = cells(printed)
    assert head == ["data", "row", "trained", "runs", "all, published", "all, ours", "few, published", "few, ours"]
    assert rows == [
        ["fake_lt", "CE, 50 % & more", "1,280", "2 of 3", "50.0", "91.0 ± 1.4", "(40.0)", "82.0 ± 2.8"],
        ["fake_lt", "LA, 50 % & more", "", "0 of 3", "50.0", "not run", "(40.0)", "not run"],
    ]
    facts = "Mean ± standard deviation over seeds 0, 2; commit 0123456789ab-dirty; hardware CPU; torch 2.12.1, 2.13.0"
    for text in (facts, "Nobody, Table 0", "in brackets", "an image is missing (1 of 2 runs)", "last epoch"):
        assert text in printed


def test_a_seed_that_is_given_twice_counts_once(half_run: str, script: Words, grid: Callable[[str], str]) -> None:
    """Otherwise the same result would count twice, in the mean and in the standard deviation."""
    once, twice = (script(collect, f"{half_run} --seeds {seeds}")[1] for seeds in ("0 2", "0 2 2 2"))
    assert once == twice and "91.0 ± 1.4" in once
    assert _grid.read(grid(SMALL + "seeds: [0, 2, 2]\n")).seeds == (0, 2)


def test_a_table_says_what_was_selected_and_added(grid: Callable[[str], str], script: Words) -> None:
    """The published numbers beside ours are of other options then."""
    name = grid(SMALL)
    fake_result(f"-d fake_lt -m tiny_clip loss_type CE {TINY} num_epochs 1")
    words = f"{name} --where loss_type CE -- num_epochs 1"
    for form in ("md", "text", "csv", "latex", "html"):
        printed = " ".join(script(collect, words.replace(" --w", f" --format {form} --w"))[1].split())
        assert "90.0" in printed and "Only the commands with loss_type CE." in printed
        assert "Every command was run with num_epochs 1." in printed


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        ("small.yaml --where loss_type CE --where loss_type LA", "both loss_type CE and loss_type LA"),
        ("output/run --seeds 0", "--seeds"),
        ("output/run --where loss_type CE", "--where"),
        ("output/run -- num_epochs 1", "--"),
    ],
)
def test_a_selection_that_would_be_ignored_is_refused(
    grid: Callable[[str], str], script: Words, words: str, culprit: str
) -> None:
    grid(SMALL)
    fake_result("-d fake_lt -m tiny_clip output_dir run")
    code, _, error = script(collect, words)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and culprit in error


def test_csv_is_for_programs(half_run: str, script: Words) -> None:
    rows = list(csv.DictReader(io.StringIO(script(collect, f"{half_run} --format csv")[1])))
    assert [(row["trained"], row["runs"], row["wanted"]) for row in rows] == [("1280", "2", "3"), ("", "0", "3")]
    assert [row["accuracy_mean"] for row in rows] == ["91.0", ""]
    assert float(rows[0]["few_acc_std"]) == pytest.approx(8**0.5)
    assert (rows[0]["few_acc_published"], rows[0]["torch"]) == ("(40.0)", "2.12.1; 2.13.0")


def test_latex_is_escaped(half_run: str, script: Words) -> None:
    printed = script(collect, f"{half_run} --format latex --metrics accuracy")[1]
    assert r"fake\_lt & CE, 50 \% \& more & 1,280 & 2 of 3 & 50.0 & 91.0 $\pm$ 1.4 \\" in printed
    assert r"\begin{tabular}{llrrrr}" in printed and r"\toprule" in printed


def test_run_folders_that_differ_in_their_seed_are_a_row(grid: Callable[[str], str], script: Words) -> None:
    grid(SMALL)
    folders = [fake_result(f"-d fake_lt -m tiny_clip {more}", seed) for more in ("", "lr 0.3") for seed in (0, 1)]
    folders.append(fake_result("-d fake_lt -m tiny_clip lr 0.4 output_dir own"))
    tested = folders[-1] / "tests" / "tte_True"
    tested.mkdir(parents=True)
    result = json.loads((folders[-1] / "metrics.json").read_text())
    result["evaluation"]["tte"], result["test"]["accuracy"] = True, 99.0
    (tested / "metrics.json").write_text(json.dumps(result))
    code, printed, _ = script(collect, " ".join(map(str, (*folders, tested))) + " --metrics accuracy med_acc")
    assert code == 0
    assert cells(printed)[2:] == [
        ["fake_lt", "fake_lt_tiny_clip", "1,280", "2", "90.5 ± 0.7", "n/a"],
        ["fake_lt", "fake_lt_tiny_clip_lr_0.3", "1,280", "2", "90.5 ± 0.7", "n/a"],
        ["fake_lt", "own", "1,280", "1", "90.0", "n/a"],
        ["fake_lt", "own/tests/tte_True", "1,280", "1", "99.0", "n/a"],
    ]


@pytest.mark.parametrize(
    "words",
    [
        ".",
        "small.yaml .",
        "output --metrics accuracy",
        *(f"small.yaml --metrics {n}" for n in ("speed", "per_class_acc")),
    ],
)
def test_what_cannot_be_collected_is_one_line(half_run: str, script: Words, words: str) -> None:
    code, _, error = script(collect, words)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_a_command_with_a_seed_of_its_own_is_run_once(grid: Callable[[str], str], script: Words) -> None:
    """The same run would otherwise count once for each seed of --seeds."""
    name = grid("# Own seeds\nrows:\n  own: -d fake_lt -m tiny_clip seed 3\n  other: -d fake_lt -m tiny_clip lr 0.3\n")
    _, out, _ = script(reproduce, f"{name} --seeds 1 2 --print")
    assert out.splitlines() == [
        "python main.py -d fake_lt -m tiny_clip seed 3",
        "python main.py -d fake_lt -m tiny_clip lr 0.3 seed 1",
        "python main.py -d fake_lt -m tiny_clip lr 0.3 seed 2",
    ]
    _, out, _ = script(reproduce, f"{name} --seeds 1 2 --print -- seed 5")
    assert len(out.splitlines()) == 2 and all(line.endswith("seed 5") for line in out.splitlines()[1:])


def test_a_folder_with_a_run_of_other_options_is_not_collected(grid: Callable[[str], str], script: Words) -> None:
    words = "-d fake_lt -m tiny_clip output_dir mine lr"
    name = grid(f"# One run\nmetrics: [accuracy]\nrows:\n  row: {words} 0.3\n")
    fake_result(f"{words} 0.3")
    assert "not run" not in script(collect, f"{name} --format md")[1]
    for other in ("0.1", "0.3 num_epochs 500"):
        grid(f"# One run\nmetrics: [accuracy]\nrows:\n  row: {words} {other}\n")
        assert "not run" in script(collect, f"{name} --format md")[1]


def test_a_run_with_a_damaged_config_is_not_called_not_run(grid: Callable[[str], str], script: Words) -> None:
    words = "-d fake_lt -m tiny_clip output_dir mine lr 0.3"
    name = grid(f"# One run\nmetrics: [accuracy]\nrows:\n  row: {words}\n")
    (fake_result(words) / "config.yaml").write_text("lr: [0.3")
    code, _, error = script(collect, f"{name} --format md")
    assert code == 2 and "output/mine/config.yaml" in error and "start over" in error and error.count("\n") == 1
    assert "refused" in script(reproduce, f"{name} --status")[1]


def test_what_is_no_run_is_left_out_and_counted(grid: Callable[[str], str], script: Words) -> None:
    grid(SMALL)
    fake_result("-d fake_lt -m tiny_clip")
    for name in ("tables", "foreign"):
        Path("output", name).mkdir()
    Path("output/foreign/metrics.json").write_text("{}")  # of another program: no config stands beside it
    names = " ".join(str(path) for path in sorted(Path("output").iterdir()))
    code, printed, error = script(collect, f"{names} --metrics accuracy")
    assert code == 0 and cells(printed)[2:] == [["fake_lt", "fake_lt_tiny_clip", "1,280", "1", "90.0"]]
    assert error.startswith("left out 2 of 3") and error.count("\n") == 1
    code, _, error = script(collect, "output/tables output/foreign")
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1


PIPES = ["reproduce.py --list", "reproduce.py small.yaml --print", "collect.py output/run"]


@pytest.mark.parametrize("words", slow_except(["collect.py output/run"], PIPES))
def test_a_closed_pipe_is_no_traceback(words: str, grid: Callable[[str], str]) -> None:
    """As in `scripts/reproduce.py --list | head`."""
    grid(SMALL)
    fake_result("-d fake_lt -m tiny_clip output_dir run")
    name, *rest = words.split()
    command = [sys.executable, str(ROOT / "scripts" / name), *rest]
    process = subprocess.Popen(command, env=offline(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 0


@pytest.mark.parametrize(
    "name", ["analyze_features", "collect", "make_composition", "make_model_list", "make_options", "reproduce", "tune"]
)
def test_a_script_leaves_the_path_alone(name: str) -> None:
    """Only as a program it needs the checkout on the path, where bare names such as `datasets` would be found first."""
    importlib.import_module(f"tailtune.scripts.{name}")
    assert str(ROOT) not in sys.path


@pytest.mark.parametrize("name", ["reproduce", "collect", "tune"])
def test_help_costs_nothing_and_explains(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=offline(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and f"python scripts/{name}.py" in done.stdout
