"""Searches for good values of options with Optuna, by a metric of the validation split.

    python scripts/tune.py -d digits_lt -m tiny_clip_peft val_per_class 1 'lr=log(1e-3,1e-1)' --trials 20
    python scripts/tune.py -d my.yaml -m clip_vit_b16_peft 'lr=log(1e-3,1e-1)' 'loss_type=choice(LA,CE)'

Ranges are log(a,b), uniform(a,b), int(a,b) and choice(a,b,…). Every other KEY VALUE is the same in all trials. A trial
is a run of main.py, in a run folder of its own. Its value is the best validation of its training; the test images
decide nothing. A trial that is behind the median of the earlier ones after the same epoch ends early (it is pruned).

Ctrl-C saves the state of the run; the same command continues it, and then the search. The same command on further
machines or terminals works on the same search. At the end the trials are written into output/tables/STUDY.csv.
"""

import argparse
import csv
import io
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune import main as tailtune
from tailtune.configs.errors import UserError
from tailtune.configs.launch_environment import world_size
from tailtune.scripts._launches import cut
from tailtune.scripts._search import COMMAND, FOLDER, MOST_FAILURES, Search, counted, open_study
from tailtune.scripts._search_space import split_space
from tailtune.trainers.evaluation.validation_metrics import BEST, HIGHER, LOWER
from tailtune.trainers.processes.exit import run_as_process
from tailtune.trainers.processes.interrupts import handled_signals
from tailtune.trainers.runs.run_folder import OUTPUT

CONTINUES = "interrupted; the same command continues"
DEFAULT = OUTPUT / "tune"
"""Folder of the SQLite files of searches whose storage is not given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments; None: those of this process.

    Returns:
        The exit code: 0 for success, 2 for wrong input or a search in which no trial succeeds, 130 for an interruption.
    """
    return tailtune.exit_code_of(_command, argv, interrupted=CONTINUES)


def _command(argv: Sequence[str]) -> int:
    args, words = _parser().parse_known_args(argv)
    if world_size() > 1:
        raise UserError("a search runs each trial in one process; start this command several times instead")
    if args.trials < 1:
        raise UserError(f"--trials {args.trials}: a search needs at least one")
    if args.startup is not None and args.startup < 0:
        raise UserError(f"--startup {args.startup}: the number of trials that end before any is pruned is at least 0")
    if args.study is not None and (not args.study or "/" in args.study):  # files of the search have this name
        raise UserError(f"--study {args.study}: give the search a name without /")
    search = search_of(args, words)
    search.check()
    name = args.study or f"{Path(search.data).stem}_{Path(search.model).stem}"
    if args.storage is None:
        DEFAULT.mkdir(parents=True, exist_ok=True)
    study = open_study(search, name, args.storage or f"sqlite:///{DEFAULT}/{name}.db", args.startup)
    while len(counted(study)) < args.trials:
        study.optimize(search.objective, n_trials=1, catch=(Exception,))
        if len(search.failures) == MOST_FAILURES:
            raise UserError(f"{MOST_FAILURES} trials failed one after another; the last one: {search.failures[-1]}")
    return report(study, search)


def search_of(args: argparse.Namespace, words: Sequence[str]) -> Search:
    """The search that a command line describes. `val_every 1` and `keep` are added if they are not given.

    Raises:
        UserError: a flag or a range is wrong, or an option does not fit a search.
    """
    unknown = next((word for word in words if word.startswith("--")), None)
    if unknown:
        raise UserError(f"unknown argument {unknown}; see python scripts/tune.py --help")
    pairs, space = split_space(words)
    given = dict(zip(pairs[::2], pairs[1::2], strict=True))
    for key in {"output_dir", "model_dir", "test_only"} & {*given, *space}:
        raise UserError(f"{key} does not fit a search, in which each trial trains in its own run folder; leave it out")
    keep = given.get("keep", "")
    metric = args.metric or (keep.removeprefix(BEST) if keep.startswith(BEST) else HIGHER[0])
    pairs += [] if "val_every" in given else ["val_every", "1"]
    pairs += [] if "keep" in given else ["keep", f"{BEST}{metric}"]
    return Search(args.data, args.model, pairs, space, metric)


def report(study: Any, search: Search) -> int:
    """Write the table of all trials, and print the best one.

    Returns:
        The exit code: 2 if no trial has succeeded.
    """
    trials = counted(study)
    path = OUTPUT / "tables" / f"{study.study_name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table(trials, search))
    states = [trial.state.name.lower() for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"\n{study.study_name}: {len(trials)} trials ({counts}), by {search.metric} of the validation split")
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if not complete:
        raise UserError(f"no trial was completed; {path} has all of them, and a larger --trials goes on")
    better_first = sorted(complete, key=lambda trial: trial.value, reverse=search.direction == "maximize")
    for trial in better_first[:10]:
        values = " ".join(f"{key} {_shown(value)}" for key, value in used(trial).items())
        print(f"{trial.number:>5}  {trial.value:>9.4g}  {cut(values, 62)}")
    best = better_first[0]
    print(f"best: trial {best.number}, {search.metric} {best.value:.4g}, in {best.user_attrs[FOLDER]}")
    print(f"{best.user_attrs[COMMAND]}\nall trials: {path}")
    return 0


def table(trials: Sequence[Any], search: Search) -> str:
    """The trials as CSV, each with its best validation, also if it was pruned."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["trial", "state", search.metric, "epochs", *search.space, FOLDER, COMMAND])
    for trial in trials:
        reported = trial.intermediate_values.values()  # the value of a pruned trial is only its last validation
        best = (min if search.metric in LOWER else max)(reported, default="")
        value = trial.value if trial.state.name == "COMPLETE" else best
        attributes = [trial.user_attrs.get(name, "") for name in (FOLDER, COMMAND)]
        parameters = [_shown(used(trial).get(key, "")) for key in search.space]
        epochs = max(trial.intermediate_values, default="")
        writer.writerow([trial.number, trial.state.name.lower(), value, epochs, *parameters, *attributes])
    return text.getvalue()


def used(trial: Any) -> dict[str, Any]:
    """The values of a trial as in its command, which leaves out those that nothing reads."""
    if COMMAND not in trial.user_attrs:
        return dict(trial.params)
    words = shlex.split(trial.user_attrs[COMMAND])[6:]  # after `python main.py -d DATA -m MODEL`
    given = dict(zip(words[::2], words[1::2], strict=True))
    return {key: given[key] for key in trial.params if key in given}


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _parser() -> argparse.ArgumentParser:
    parser = tailtune.Parser(
        prog="python scripts/tune.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python scripts/tune.py -d DATA -m MODEL KEY=RANGE … [KEY VALUE …] [options]",
        allow_abbrev=False,
    )
    parser.add_argument("-d", "--data", required=True, metavar="DATA", help="as for main.py")
    parser.add_argument("-m", "--model", required=True, metavar="MODEL", help="as for main.py")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="trials of the whole search; default: 20")
    parser.add_argument("--study", metavar="NAME", help="name of the search; default: DATA_MODEL")
    storage = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME; default: SQLite in output/tune"
    parser.add_argument("--storage", metavar="URL", help=storage)
    metric = f"metric of the validation split; default: that of `keep`, or {HIGHER[0]}"
    parser.add_argument("--metric", choices=(*HIGHER, *LOWER), metavar="METRIC", help=metric)
    startup = "trials that end before the first one may be pruned; default: 5"
    parser.add_argument("--startup", type=int, default=5, metavar="N", help=startup)
    none = "let every trial run to its end"
    parser.add_argument("--no-pruning", dest="startup", action="store_const", const=None, help=none)
    return parser


if __name__ == "__main__":
    for number in handled_signals():  # as Ctrl-C: the storage is told that the trial ends
        signal.signal(number, signal.default_int_handler)
    run_as_process(main, tailtune.exit_code_and_line)
