"""The Python API: `tailtune.train`, `tailtune.load` and `tailtune.build_model`."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tailtune import models
from tailtune.configs import CfgNode, UserError
from tailtune.configs.errors import printable
from tailtune.configs.launch_environment import check_environment
from tailtune.configs.unread_options import refuse_unread_options
from tailtune.datasets.build_data import build_info, stored_info, with_descriptors
from tailtune.datasets.data_bundle import DataInfo
from tailtune.models import ClassificationModel, resolve
from tailtune.models.heads.head_init import NEEDS_TEXT
from tailtune.trainers.head_preparation import text_context
from tailtune.trainers.option_schema import declared
from tailtune.trainers.option_words import words_of
from tailtune.trainers.predict_in_python import Prediction
from tailtune.trainers.processes.console_log import console_restored
from tailtune.trainers.processes.interrupts import Interrupted
from tailtune.trainers.runs.result_table import read_result
from tailtune.trainers.stages import run_stages
from tailtune.trainers.stages_of_words import NO_DATA, stages_of
from tailtune.trainers.trained_model import TrainedModel, load

__all__ = ["Prediction", "TrainedModel", "TrainedRun", "build_model", "load", "train"]

log = logging.getLogger("tailtune")


@dataclass(frozen=True, eq=False)
class TrainedRun:
    """The result of `tailtune.train`."""

    folder: Path
    """The run folder."""
    metrics: Mapping[str, Any] = field(repr=False)
    """The content of metrics.json: `metrics["test"]["accuracy"]` is in %."""
    source: Path = field(repr=False)
    """Folder of the run whose model was evaluated: `folder`, or the run that `model_dir` names."""

    def load(self, device: str | torch.device | None = None) -> TrainedModel:
        """Load the model that was evaluated, see `tailtune.load`.

        Raises:
            UserError: as `tailtune.load`; or the metrics are of an ensemble, which is not stored as one model.
        """
        if self.metrics["evaluation"].get("ensemble"):
            raise UserError(f"load: the metrics are of an ensemble; tailtune.load('{self.source}') loads the run alone")
        return load(self.source, device)


def train(data: str | Path, model: str | Path, **options: Any) -> TrainedRun:
    """Train and evaluate, as the command `tailtune -d DATA -m MODEL KEY VALUE …` does.

    The same call again resumes an unfinished run, and returns the result of a finished one. The log is printed on
    standard output. Several processes are started by `accelerate launch` with a script that calls this function.

    Args:
        data: name of a data config, the path of your YAML, or a folder with a folder of images for each class. The
            split of a folder is made once, in output/<name>_data, and used again by later calls.
        model: name of a model config, or the path of your YAML.
        **options: options as keywords, such as `lr=0.1` or `lora=True`. Names with a dot:
            `**{"ride.diversity": 0.1}`. A text is parsed as on the command line.

    Returns:
        The run folder and the metrics of the evaluation.

    Raises:
        UserError: an unknown name, a wrong value, or options that do not fit each other; nothing is written then.
        KeyboardInterrupt: Ctrl-C, SIGTERM or SIGUSR1. The state is saved, and the same call continues.

    Example:
        ```python
        run = tailtune.train("digits_lt", "tiny_clip_peft", lr=0.1, num_epochs=5)
        print(run.metrics["test"]["accuracy"], run.metrics["test"]["few_acc"])
        ```
    """
    check_environment()
    with stages_of(str(data), str(model), words_of(options), declared(), "train") as stages, console_restored():
        try:
            outcome = run_stages(stages)
        except Interrupted:  # another program knows KeyboardInterrupt only
            raise KeyboardInterrupt("the state is saved; the same call continues") from None
    return TrainedRun(outcome.folder, read_result(outcome.metrics), outcome.source)


def build_model(
    model: str | Path,
    data: str | Path | None = None,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    **options: Any,
) -> ClassificationModel:
    """Build the untrained model of a config: a `torch.nn.Module` with pre-trained encoder, tuners and classifier.

    Parameters that the config does not train have `requires_grad` False. A classifier that starts from texts
    (`init_head text_feat`, `zero_shot`) is made from the class names. One that starts from training images keeps its
    random weights, with a warning, because no images are given here.

    Args:
        model: as for `train`.
        data: as for `train`. It gives class names and options of the model.
        class_names: names of the C classes, instead of `data`.
        num_classes: number of classes, instead of `data`, for a classifier that reads no texts. Together with `data`,
            it is the option of this name.
        **options: options as keywords, as for `train`.

    Returns:
        The model, in training mode, on the CPU. It maps images [N, 3, R, R], uint8 or normalised floats, to logits
        [N, E, C] of E experts; E is 1 without experts. `model.features(images)` returns features [N, D].

    Raises:
        UserError: an unknown name, a wrong value, missing weights, or class names that are needed and not given.

    Example:
        ```python
        model = tailtune.build_model("tiny_clip_peft", class_names=["zero", "one", "two"])
        logits = model(images).mean(1)  # [N, 3]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ```
    """
    _check_classes(data, class_names, num_classes)
    of_data = {} if data is None or num_classes is None else {"num_classes": num_classes}
    words = words_of(options | of_data)
    with stages_of(str(data or NO_DATA), str(model), words, declared(), "build_model", keep=False) as stages:
        cfg = resolve(stages[-1])
        info = _info_without_images(cfg, data is not None, class_names, num_classes)
    refuse_unread_options(cfg)
    net = models.build_model(cfg, info.class_names, descriptors=info.descriptors, pixel_stats=(info.mean, info.std))
    return _start_head(net, cfg, info.num_classes)


def _check_classes(data: Any, class_names: Any, num_classes: Any) -> None:
    """Raise a `UserError` unless the classes are given in exactly one way."""
    if num_classes is not None and (not isinstance(num_classes, int) or isinstance(num_classes, bool)):
        raise UserError(f"build_model: num_classes must be a whole number, not '{printable(num_classes)}'")
    if isinstance(class_names, str):
        raise UserError("build_model: class_names must be a list of names, not one text")
    ways = (data is not None) + (class_names is not None) + (num_classes is not None and data is None)
    if ways != 1:
        raise UserError("build_model: give either data, class_names or num_classes")


def _start_head(net: ClassificationModel, cfg: CfgNode, num_classes: int) -> ClassificationModel:
    """Fill the classifier from the class names, or leave it random if it would be filled from training images."""
    if _reads_text(cfg):
        net.init_head(text_context(net, num_classes, cfg.seed, torch.device("cpu")))
    elif net.init is not None:
        log.warning("warning: init_head %s reads training images, so the classifier stays random", cfg.init_head)
        net.init = None
    return net


def _reads_text(cfg: CfgNode) -> bool:
    return bool(cfg.zero_shot or cfg.init_head in NEEDS_TEXT)


def _info_without_images(
    cfg: CfgNode, from_data: bool, class_names: Sequence[str] | None, num_classes: int | None
) -> DataInfo:
    """Facts about the classes: of the data config, or those that the caller gives."""
    if from_data:
        info = build_info(cfg)
    else:
        names = tuple(class_names or (f"class {label}" for label in range(num_classes or 0)))
        info = stored_info(cfg, names, [1] * len(names))
    if len(info.class_names) < 2:
        raise UserError(f"build_model: a classifier has at least two classes, not {len(info.class_names)}")
    no_names = class_names is None and info.class_names[0] == "class 0"
    if _reads_text(cfg) and cfg.pretrained is not None and no_names:
        raise UserError("build_model: the classifier is made from the names of the classes: give class_names")
    return with_descriptors(cfg, info)
