"""A hyper-parameter search with Optuna: what is searched for, how a trial runs, and the study in its storage."""

import shlex
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tailtune.configs import CfgNode, schema_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import TRAIN
from tailtune.configs.schema import Schema
from tailtune.configs.unread_options import unread_options
from tailtune.scripts._grid import stages
from tailtune.scripts._packages import required
from tailtune.scripts._search_space import Range
from tailtune.trainers.evaluation.validation_metrics import LOWER, Validated
from tailtune.trainers.processes.interrupts import Interrupted
from tailtune.trainers.runs.run_folder import folder_of
from tailtune.trainers.storage.manifest import read_json

HEARTBEAT, GRACE = 60, 180
"""Seconds between two signs of life of a worker, and after which its trial is given to another worker."""
MOST_FAILURES = 5
"""Trials that fail one after another, after which the search ends."""
RETRIED = "retry_history"
"""Attribute of a trial that continues trials of workers that have died: their numbers (Optuna sets it)."""
OF_SEARCH, COMMAND, FOLDER, STOPPED = "search", "command", "folder", "stopped"
"""Attributes that a study (the first one) and its trials have in the storage."""


@dataclass
class Search:
    """What is searched for, and how a trial is run."""

    data: str
    model: str
    pairs: Sequence[str]
    """The words `KEY VALUE` that all trials share."""
    space: Mapping[str, Range]
    metric: str
    failures: list[str] = field(default_factory=list)
    """Why the latest trials failed, without a successful one between them."""

    @property
    def direction(self) -> str:
        """Whether a larger or a smaller value is better, in Optuna's words."""
        return "minimize" if self.metric in LOWER else "maximize"

    @property
    def identity(self) -> dict[str, Any]:
        """What all workers of a search must agree on."""
        ranges = {key: str(found) for key, found in self.space.items()}
        return {"words": self.words({}), "space": ranges, "metric": self.metric}

    def words(self, values: Mapping[str, str]) -> list[str]:
        """The words after `python main.py` with these values of the searched options."""
        return ["-d", self.data, "-m", self.model, *self.pairs, *(word for pair in values.items() for word in pair)]

    def words_of_trial(self, values: Mapping[str, str]) -> list[str]:
        """As `words`, without the searched options that nothing reads because of other searched options.

        In a search over `loss_type=choice(LA,CE)` and `tau=uniform(0,2)`, the trials with CE have no τ.
        """
        cfg = stages(self.words(values))[-1]
        unread, searched = unread_options(cfg), {schema_of(cfg).name(key) for key in self.space}
        idle = {key for key, readers in unread.items() if {reader.split()[0] for reader in readers} & searched}
        return self.words({key: value for key, value in values.items() if schema_of(cfg).name(key) not in idle})

    def check(self) -> None:
        """Check the first and the last value of every range, before a study is made.

        Raises:
            UserError: an option is unknown, a value is impossible, no validation depends on an option, or the data have
                no validation split.
        """
        from tailtune.trainers.config_checks import validate

        first = {key: found.values[0] for key, found in self.space.items()}
        others = [{**first, key: value} for key, found in self.space.items() for value in found.values[1:]]
        for values in (first, *others):
            validate(stages(self.words_of_trial(values)))
        self._check_measured(schema_of(stages(self.words(first))[-1]))
        check_validation(stages(self.words(first))[-1])

    def _check_measured(self, schema: Schema) -> None:
        """Raise a `UserError` for an option whose values the validations of the training cannot compare."""
        for key in self.space:
            name = schema.name(key.removeprefix("after."))
            if name not in schema.defaults:
                continue
            if schema[name].cls != TRAIN:
                raise UserError(
                    f"{key} changes nothing that is trained, so the validations have the same {self.metric} with every "
                    "value; give it one value"
                )
            if schema[name].holds_out:
                raise UserError(
                    f"{key} changes the validation images, so trials could not be compared; give it one value"
                )

    def objective(self, trial: Any) -> float:
        """Run a trial of Optuna.

        Returns:
            The best value of the metric in the run's validations.
        """
        values = {key: found.suggest(trial, key) for key, found in self.space.items()}
        words = self.words_of_trial(values)
        print(f"trial {trial.number}: python main.py {shlex.join(words)}", flush=True)
        try:
            value = self._run(trial, words)
        except KeyboardInterrupt:
            trial.set_user_attr(STOPPED, True)
            trial.study.enqueue_trial(trial.params)  # the next trial has the same values, so it continues this run
            raise
        except required("optuna").TrialPruned:
            print(f"trial {trial.number}: pruned", flush=True)
            raise
        except Exception as error:  # one failed run, for example without memory, must not end the search
            if not isinstance(error, UserError):
                traceback.print_exc()
            self.failures.append(" ".join(str(error).split()))
            print(f"trial {trial.number}: failed: {self.failures[-1]}", flush=True)
            raise
        self.failures.clear()
        print(f"trial {trial.number}: {self.metric} {value:.4g}", flush=True)
        return value

    def _run(self, trial: Any, words: Sequence[str]) -> float:
        from tailtune.trainers.stages import run_stages

        configs = stages(words)
        trial.set_user_attr(COMMAND, f"python main.py {shlex.join(words)}")
        trial.set_user_attr(FOLDER, folder_of(configs[-1]).as_posix())
        pruned: list[bool] = []
        reported: set[int] = set()

        def on_validation(validated: Validated) -> bool:
            trial.report(validated[self.metric], validated["epoch"])
            reported.add(validated["epoch"])
            if validated["epoch"] < configs[-1].num_epochs and trial.should_prune():
                pruned.append(True)
            return bool(pruned)

        try:
            outcome = run_stages(configs, on_validation)
        except Interrupted:
            if pruned:
                raise required("optuna").TrialPruned from None
            raise KeyboardInterrupt from None
        history = {v["epoch"]: float(v[self.metric]) for v in _validations(outcome.folder)}
        for epoch in history.keys() - reported:  # of an earlier launch, before an interruption
            trial.report(history[epoch], epoch)
        return (min if self.metric in LOWER else max)(history.values())


def _validations(folder: Path) -> list[Validated]:
    """The history of a finished run."""
    history: list[Validated] = read_json(folder / "metrics.json")["train"]["validations"]
    return history


def check_validation(cfg: CfgNode) -> None:
    """Raise a `UserError` if the data of a config have no validation split."""
    from tailtune.datasets.build_records import build_records
    from tailtune.datasets.table import DATASETS

    if not cfg.val_per_class and (DATASETS[cfg.dataset].built_in or "val" not in build_records(cfg)[0]):
        raise UserError(
            f"a search needs a validation split, and {cfg.data} has none; the test images must not choose options: "
            "hold images out with val_per_class, or give a val_list or a folder val"
        )


def open_study(search: Search, name: str, url: str, startup: int | None) -> Any:
    """Open a study of Optuna, or make it.

    Args:
        search: what is searched for.
        name: name of the study in the storage.
        url: address of the storage.
        startup: number of trials that end before the first one may be pruned; None: none is pruned.

    Raises:
        UserError: Optuna or the driver of the data base is missing, the storage cannot be used, or the study is of
            another search.
    """
    optuna = required("optuna")
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of the heartbeat
    pruner = optuna.pruners.NopPruner() if startup is None else optuna.pruners.MedianPruner(startup)
    for last in (False, False, True):
        try:
            storage = _storage(url)
            study = optuna.create_study(
                storage=storage, study_name=name, direction=search.direction, pruner=pruner, load_if_exists=True
            )
            break
        except (SQLAlchemyError, ImportError) as error:
            if last or isinstance(error, ImportError):
                reason = " ".join(str(getattr(error, "orig", None) or error).split())
                raise UserError(f"--storage {_without_password(url)} cannot be used: {reason}") from error
            time.sleep(1)  # another worker may be making the tables
    known = study.user_attrs.get(OF_SEARCH)
    if known is not None and known != search.identity:
        raise UserError(
            f"the study {name} is another search ({_described(known)}, not {_described(search.identity)}); give this "
            "one another name with --study"
        )
    study.set_user_attr(OF_SEARCH, search.identity)
    return study


def _storage(url: str) -> Any:
    """Optuna's storage in a data base. A worker that has died gives its trial to another one."""
    storages = required("optuna").storages
    from sqlalchemy.engine import make_url

    address = make_url(url)
    if address.drivername == "postgresql":  # without a driver SQLAlchemy takes another one than Optuna recommends
        address = address.set(drivername="postgresql+psycopg2")
    waits = {"connect_args": {"timeout": 60}} if address.get_backend_name() == "sqlite" else {}
    return storages.RDBStorage(
        address.render_as_string(hide_password=False),
        engine_kwargs={"pool_pre_ping": True, **waits},  # a trial may take longer than a connection lasts
        heartbeat_interval=HEARTBEAT,
        grace_period=GRACE,
        heartbeat_stale_trial_callback=storages.RetryHeartbeatStaleTrialCallback(),
    )


def counted(study: Any) -> list[Any]:
    """The trials of a study, without those whose run another trial continues, and those that nobody has begun."""
    optuna = required("optuna")
    optuna.storages.fail_stale_trials(study)
    trials = study.get_trials(deepcopy=False)
    continued = {number for trial in trials for number in trial.system_attrs.get(RETRIED, ())}
    continued |= {trial.number for trial in trials if trial.user_attrs.get(STOPPED)}
    waiting = optuna.trial.TrialState.WAITING
    return [trial for trial in trials if trial.state != waiting and trial.number not in continued]


def _described(identity: Mapping[str, Any]) -> str:
    ranges = " ".join(f"{key}={found}" for key, found in identity["space"].items())
    return f"{shlex.join(identity['words'])} {ranges} by {identity['metric']}"


def _without_password(url: str) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "URL"
