"""The run folder `output/<name>/`: its paths, its stored config and splits, and whether its run is finished."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

from tailtune.configs import CfgNode, config_hash, load_resolved, schema_of, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import TEST, TRAIN
from tailtune.datasets.splits.split_records import ChosenSplits, Record, StoredSplits, parse_splits, split_files
from tailtune.trainers.foreign_checkpoints.checkpoint_file import LIFT_FILE, ForeignCheckpoint
from tailtune.trainers.runs.files_read import digest_of_texts, files_of_evaluation
from tailtune.trainers.runs.longer_run import epochs_before, forget_results, is_trained_as
from tailtune.trainers.runs.ownership import OtherRun, OwnedFolder
from tailtune.trainers.runs.result_table import REPORTS
from tailtune.trainers.storage.atomic_io import FACTS as FACTS_FILE
from tailtune.trainers.storage.atomic_io import Damaged, write_bytes
from tailtune.trainers.storage.manifest import MARKER, Manifest, read_bytes, read_json

OUTPUT = Path("output")
FACTS = Path("checkpoint") / FACTS_FILE
TRAINING = ("config.yaml", "log.txt", "splits", "state", "checkpoint", "tensorboard")
"""Entries of the run folder that training creates."""
RESULTS = ("metrics.json", "logits.safetensors", "val_logits.safetensors", "expert_weights.json", *REPORTS)
"""Entries of the run folder that the evaluation creates."""


@dataclass(frozen=True)
class Checkpoint:
    """The place of the tensors that a run has trained."""

    home: Path
    """Folder of the run."""
    foreign: ForeignCheckpoint | None = None
    """A checkpoint file of another project; None: the checkpoint of the run itself."""


def folder_of(cfg: CfgNode) -> Path:
    """Path of the run folder of a config."""
    return OUTPUT / (cfg.output_dir or cfg.run_name)


class RunFolder(OwnedFolder):
    """The paths of a run, and decisions that depend on the content of its folder.

    The class takes a whole config, because it writes `config.yaml` and compares a command with a stored config. A
    folder belongs to a run if `tailtune.json` says so (`manifest.py`). Only the entries listed there are ever changed.

    Args:
        cfg: resolved config of the command.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg
        super().__init__(folder_of(cfg))
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.json"
        self.checkpoint = self.path / "checkpoint"
        self.states = self.path / "state"
        self.splits = self.path / "splits"
        self.events = self.path / "tensorboard"
        source_and_file = self._own() if cfg.model_dir is None else find_checkpoint(cfg.model_dir)
        self.source, self.foreign = source_and_file
        """Folder of the run whose checkpoint is evaluated; the checkpoint file, if another project has written it."""
        self.adopts = self.foreign is not None

    def _own(self) -> tuple[Path, ForeignCheckpoint | None]:
        """This folder as the source. It may hold a checkpoint of LIFT, which a `test_only` command then evaluates."""
        lift = self.cfg.test_only and not self.checkpoint.exists() and (self.path / LIFT_FILE).is_file()
        return self.path, ForeignCheckpoint(self.path / LIFT_FILE) if lift else None

    @cached_property
    def soup(self) -> tuple[Path, ...]:
        """Folders of the runs that `ensemble_runs` names."""
        sources = [find_checkpoint(name, "ensemble_runs") for name in self.cfg.ensemble_runs or ()]
        for _, foreign in sources:
            if foreign is not None:
                raise UserError(f"ensemble_runs: {foreign.path} is of other people's code; name runs of our own")
        paths = [path for path, _ in sources]
        for number, path in enumerate(paths):
            if path.resolve() in [other.resolve() for other in (self.source, *paths[:number])]:
                raise UserError(f"ensemble_runs: {path} is there twice; name other runs than the one that is evaluated")
        return tuple(paths)

    @property
    def evaluated(self) -> Checkpoint:
        """The checkpoint that is evaluated or continued."""
        return Checkpoint(self.source, self.foreign)

    @property
    def origin(self) -> str:
        """Path of the evaluated checkpoint, as text."""
        return str(self.foreign.path if self.foreign else self.source)

    # --- start of a run ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that the command fits the content of the folder. Nothing is written.

        Raises:
            UserError: the folder holds a run with other options, or files that the run did not create.
        """
        starts_over = not self.cfg.resume and not self.cfg.test_only
        trained = any(path.exists() for path in (self.config, self.states, self.checkpoint, self.metrics))
        if trained and not self.empty() and not starts_over:
            self.compare()
        self.check_free(*(("tests",) if self.cfg.test_only else (*TRAINING, *RESULTS)))
        if self.cfg.export is not None and self.cfg.model_dir is None:
            self.check_free("export")

    def claim(self, trains: bool) -> None:
        """Take possession of the folder, and write `config.yaml` if the command trains.

        With `resume False`, an earlier run in the folder is moved aside first.
        """
        if not self.cfg.resume and not self.cfg.test_only and not self.empty():
            self.move_aside()
        if trains and epochs_before(self.config, self.cfg) is not None:
            forget_results(self, [*(self.path / name for name in RESULTS), self.checkpoint])
        self.own(*((*TRAINING, *RESULTS) if trains else ("tests",)))
        if trains or (self.metrics.exists() and not self.manifest.intact(self.config)):
            recorded = (key for key, entry in schema_of(self.cfg).items() if entry.recorded)
            values = values_of(self.cfg, TRAIN, TEST) | {key: self.cfg[key] for key in recorded}
            # The evaluation of an unfinished run uses the options of the latest command.
            self.seal({self.config: write_bytes(self.config, yaml.safe_dump(values, sort_keys=False).encode())})

    def keep_splits(self, records: Mapping[str, Record], chosen: ChosenSplits) -> None:
        """Write the images of each split, the unused and unreadable images, and the class names into the folder."""
        files = split_files(records, chosen.unused, chosen.unreadable, chosen.class_names)
        digests = {self.splits / name: write_bytes(self.splits / name, content) for name, content in files.items()}
        self.seal(digests)

    def empty(self) -> bool:
        """Whether the folder holds neither a saved state nor a checkpoint nor a result."""
        return not any(path.exists() for path in (self.states, self.checkpoint, self.metrics, self.path / "tests"))

    # --- content of the folder -----------------------------------------------------------------------------------

    def kept(self) -> StoredSplits | None:
        """The splits recorded by the run whose checkpoint is evaluated or continued; None if there are none.

        Raises:
            UserError: the stored splits are damaged.
        """
        return kept_splits(self.source) if self.foreign is None else None

    def target(self, other_test: str = "") -> Path:
        """The folder for the result of this command's evaluation: the run folder itself, or `tests/<key>/` in it.

        Args:
            other_test: fingerprint of the test images if they have changed since the training; otherwise empty.
        """
        if self.cfg.test_only or other_test or (self.finished() and not self.is_of_same_test(self.metrics)):
            suffix = f"_test_{other_test.partition(':')[2][:8]}" if other_test else ""
            return self.path / "tests" / f"{self.cfg.test_key}{suffix}"
        return self.path

    def checkpoint_id(self) -> str | None:
        """Digests of the trained tensors and of the base model, also of `ensemble_runs`; None without a checkpoint.

        Of a file of another project, or a run of other training options than the command's, it has the config hash. Of
        predictions that are made of texts, it has a digest of their files.
        """
        texts = digest_of_texts(self.cfg)
        if self.foreign is not None:
            return "+".join(filter(None, [f"{self.foreign.digest}-{self.foreign.kind}-{config_hash(self.cfg)}", texts]))
        if not (self.source / FACTS).exists():
            return texts if texts and self.cfg.zero_shot else None
        stored = [read_json(home / FACTS) for home in (self.source, *self.soup)]
        parts = [f"{str(facts.get('sha256'))[:16]}-{facts.get('base')}" for facts in stored]
        same = self.source == self.path or is_trained_as(self.source / self.config.name, self.cfg)
        return "+".join(filter(None, [*parts, "" if same else config_hash(self.cfg), texts]))

    def class_counts(self) -> list[int] | None:
        """Number of training images of each class, [C], of the evaluated run; None if it is not recorded."""
        return counts_of(self.source) if self.foreign is None else None

    def files_read(self) -> dict[str, str]:
        """The files, besides images and checkpoint, that a result depends on: name → 16 digits of the SHA-256.

        Files that do not exist are left out.
        """
        return files_of_evaluation(self.cfg)

    def finished(self) -> bool:
        """Whether the run has ended, and its result and checkpoint are undamaged."""
        return self.metrics.exists() and not self.damage() and epochs_before(self.config, self.cfg) is None

    def damage(self) -> str:
        """The first damaged file of a finished run, in words; empty if there is no damage."""
        marker = Manifest.read(self.path)
        if marker is None:
            return f"{self.path} has no {MARKER}"
        try:
            marker.check(self.metrics)
            for path in map(self.path.joinpath, marker.files):
                if path.parent in (self.checkpoint, self.splits):
                    marker.check(path)
        except Damaged as error:
            return str(error)
        return ""

    def compare(self) -> None:
        """Raise a `UserError` if the stored config is damaged, `OtherRun` if its training options are not these."""
        try:
            stored = values_of(load_resolved(self.config, schema_of(self.cfg)))
            read_bytes(self.config)
        except UserError as error:
            if self._same_hash():
                return  # the options are the same, so the config can be written again
            raise UserError(f"{error}; start over with `resume False`, or choose another output_dir") from error
        home = stored.get("data_dir")
        if home and home != self.cfg.data_dir and Path(home).is_dir():  # otherwise the data have been moved
            what = f"a run on '{self.cfg.data}' of {home}, another data config of that name"
            raise OtherRun(f"{self.path} holds {what}; choose another output_dir")
        more = {"num_epochs"} if epochs_before(self.config, self.cfg) is not None else set()  # `more_epochs.py` decides
        for key, value in values_of(self.cfg, TRAIN).items():
            if stored.get(key) != value and key not in more:
                raise OtherRun(
                    f"{self.path} holds another run: {key} is {stored.get(key)} there and {value} here; set {key} to "
                    "that value, choose another output_dir, or start over with `resume False`"
                )

    def _same_hash(self) -> bool:
        """Whether the checkpoint or a state was trained with the options of this command (for a damaged config)."""
        for path in (self.path / FACTS, *self.states.glob(f"*/{FACTS_FILE}")):
            try:
                facts = read_json(path)
            except Damaged:
                continue
            return bool(facts.get("identity", facts).get("config") == config_hash(self.cfg))
        return False

    def is_of_same_test(self, metrics: Path) -> bool:
        """Whether a result was computed with the evaluation options of this command.

        Args:
            metrics: the metrics.json of the result.
        """
        stored = read_json(metrics).get("evaluation", {})
        schema = schema_of(self.cfg)
        return all(stored.get(key, schema[key].default) == value for key, value in values_of(self.cfg, TEST).items())


def counts_of(home: Path) -> list[int] | None:
    """Number of training images of each class, [C], of the run in folder `home`; None if it is not recorded."""
    return read_json(home / FACTS).get("class_counts") if (home / FACTS).is_file() else None


def kept_splits(home: Path) -> StoredSplits | None:
    """The splits recorded by the run in folder `home`; None if there are none.

    Raises:
        UserError: the stored splits are damaged.
    """
    marker = Manifest.read(home)
    names = [name for name in marker.files if name.startswith("splits/")] if marker else []
    if not names:
        return None
    try:
        return parse_splits({name.partition("/")[2]: read_bytes(home / name) for name in names})
    except (KeyError, ValueError, TypeError) as error:
        raise Damaged(home / "splits", str(error)) from error


FINDS = f"name the folder of a finished run, a {LIFT_FILE} of LIFT, or a checkpoint file of RIDE or SADE"


def find_checkpoint(
    model_dir: str, key: str = "model_dir", remedy: str = FINDS
) -> tuple[Path, ForeignCheckpoint | None]:
    """Find a checkpoint.

    Args:
        model_dir: path of a run folder or of a checkpoint file, or name of a run folder in output/.
        key, remedy: the option that names it, and what it may name, for the message.

    Returns:
        Folder of the run; the checkpoint file, if another project has written it.

    Raises:
        UserError: there is no checkpoint.
    """
    for path in (Path(model_dir).expanduser(), OUTPUT / model_dir):
        if path.is_file():
            return path.parent, ForeignCheckpoint(path)
        if (path / FACTS).is_file():
            return path, None
        if (path / LIFT_FILE).is_file():
            return path, ForeignCheckpoint(path / LIFT_FILE)
    raise UserError(f"{key} {model_dir} holds no checkpoint/; {remedy}")
