"""`report RUN` on the command line: writes the report of a finished run or evaluation again, from its files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailtune.configs import CfgNode, Schema, load_resolved, with_values
from tailtune.configs.errors import UserError
from tailtune.configs.key import TEST
from tailtune.configs.program import Parser, print_text, program
from tailtune.trainers.report.files import ALL, HTML, REPORT, write_report
from tailtune.trainers.runs.ownership import OwnedFolder
from tailtune.trainers.runs.result_table import REPORTS, read_result
from tailtune.trainers.runs.run_folder import FACTS, OUTPUT, kept_splits
from tailtune.trainers.runs.run_lock import RunLock
from tailtune.trainers.storage.manifest import manifest_of, read_json

if TYPE_CHECKING:
    from tailtune.trainers.report.subject import Subject

LOGITS = "logits.safetensors"


def run_report_command(argv: Sequence[str], load_schema: Callable[[], Schema]) -> int:
    """Write the report of a run or of one of its later evaluations.

    Args:
        argv: the words that follow `report`.
        load_schema: gives the schema of all options.

    Returns:
        The exit code 0.

    Raises:
        UserError: there is no result, or one of its files is missing or damaged.
    """
    parser = Parser(prog=f"{program()} report", description="Write the report of a finished run again.")
    parser.add_argument("run", metavar="RUN", help="a run folder, its name in output/, or a folder in its tests/")
    parser.add_argument("--figures", action="store_true", help="also write every figure as PNG and PDF, for papers")
    args = parser.parse_args(list(argv))
    folder = _with_result(args.run)
    subject = write_again(folder, load_schema(), ALL if args.figures else HTML)
    if subject.images.source is None:
        print_text("the images are not where they were, or have changed, so the report shows none of them")
    print_text(f"report {folder / REPORT}")
    return 0


def _with_result(name: str) -> Path:
    """The folder of the result that a word names."""
    for folder in (Path(name).expanduser(), OUTPUT / name):
        if (folder / "metrics.json").is_file():
            return folder
        if tests := sorted(path.parent for path in folder.glob("tests/*/metrics.json")):
            raise UserError(f"report {name}: {folder} has no result of its own; name an evaluation such as {tests[0]}")
    raise UserError(f"report {name}: there is no metrics.json in it; name the folder of a finished run")


def write_again(folder: Path, schema: Schema, kind: str) -> "Subject":
    """Write the files of a report.

    Args:
        folder: the folder of the result.
        schema: all options.
        kind: `html` or `all`.

    Returns:
        What the report shows.

    Raises:
        UserError: a file of the result is missing or damaged, or another launch uses the run's folder.
    """
    manifest = manifest_of(folder / "metrics.json")
    if manifest is None:
        raise UserError(f"{folder} is in no run's folder, so nothing may be written there; evaluate the run again")
    home = OwnedFolder(manifest.home)
    result = read_result(folder / "metrics.json")
    if not (folder / LOGITS).is_file():
        raise UserError(
            f"{folder / LOGITS} is missing, and the report is made from it; move {folder / 'metrics.json'} away and "
            "launch the command of the run again"
        )
    lock = RunLock(home.path)
    home.hold(lock)
    try:
        if folder == home.path:
            home.own(*REPORTS)
        subject = _subject(folder, home.path, result, schema)
        home.seal(write_report(folder, subject, kind))
    finally:
        lock.release()
    return subject


def _subject(folder: Path, home: Path, result: dict[str, Any], schema: Schema) -> "Subject":
    from tailtune.datasets.build_data import build_info
    from tailtune.datasets.shot_groups import shot_groups
    from tailtune.trainers.evaluation.logit_files import open_logits
    from tailtune.trainers.evaluation.metrics import evaluate_predictions
    from tailtune.trainers.evaluation.report_of_evaluation import predicted_of
    from tailtune.trainers.report.subject import EvaluatedImages, Launch, Subject

    about = result["evaluation"]
    source = Path(about.get("of") or home)
    source = source if (source / "config.yaml").is_file() else home
    cfg = _evaluated(source, home, about, schema)
    counts = result["class_counts"]
    groups = (
        shot_groups(counts, cfg.many_above, cfg.few_below)
        if cfg.group_imb_factor is None and cfg.subset_cap is None
        else build_info(cfg, counts).groups
    )
    split = "train" if cfg.test_train else "test"
    images = EvaluatedImages.of(cfg, kept_splits(source), split, (about.get("images") or {}).get(split))
    _, found = open_logits(folder / LOGITS)
    assert found is not None
    indices = {name: classes.numpy() for name, classes in groups.items()}
    measured = evaluate_predictions(found.summary.predictions, groups)  # earlier versions had fewer metrics
    return Subject(
        {**result, "test": {**measured, **result["test"]}},
        read_json(source / FACTS)["class_names"],
        indices,
        predicted_of(found),
        images,
        source / "tensorboard",
        Launch.of(cfg, evaluates=folder != home),
    )


def _evaluated(source: Path, home: Path, about: dict[str, Any], schema: Schema) -> CfgNode:
    """The config of the evaluation: of the evaluated run, with the options that metrics.json records."""
    if not (source / "config.yaml").is_file():
        raise UserError(f"{source / 'config.yaml'} is missing, so nothing says which data were evaluated")
    asked = {key: about.get(key, entry.default) for key, entry in schema.items() if entry.cls == TEST}
    asked["model_dir"] = None if source.resolve() == home.resolve() else str(source)
    return with_values(load_resolved(source / "config.yaml", schema), **asked)
