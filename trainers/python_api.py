"""The Python API: `tailtune.train`, `tailtune.load` and `tailtune.build_model`."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tailtune import models
from tailtune.configs import CfgNode, UserError, load_configs
from tailtune.configs.errors import printable
from tailtune.configs.launch_environment import check_environment
from tailtune.datasets.build_data import build_info, stored_info, with_descriptors
from tailtune.datasets.data_bundle import DataInfo
from tailtune.models import ClassificationModel, resolve
from tailtune.models.heads.head_init import NEEDS_TEXT
from tailtune.trainers.head_preparation import text_context
from tailtune.trainers.option_schema import declared
from tailtune.trainers.processes.console_log import console_restored
from tailtune.trainers.processes.interrupts import Interrupted
from tailtune.trainers.runs.result_table import read_result
from tailtune.trainers.stages import run_stages
from tailtune.trainers.trained_model import TrainedModel, load

__all__ = ["TrainedModel", "TrainedRun", "build_model", "load", "train"]

NO_DATA = "fake_lt"
"""Data config of a model that is built without data. It sets no option of the model."""

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


def train(data: str | Path, model: str, **options: Any) -> TrainedRun:
    """Train and evaluate, as the command `tailtune -d DATA -m MODEL KEY VALUE …` does.

    The same call again resumes an unfinished run, and returns the result of a finished one. The log is printed on
    standard output. Several processes are started by `accelerate launch` with a script that calls this function.

    Args:
        data: name of a data config, or the path of your YAML.
        model: name of a model config.
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
    stages = load_configs(str(data), model, _words(options), declared(), "train")
    with console_restored():
        try:
            outcome = run_stages(stages)
        except Interrupted:  # another program knows KeyboardInterrupt only
            raise KeyboardInterrupt("the state is saved; the same call continues") from None
    return TrainedRun(outcome.folder, read_result(outcome.metrics), outcome.source)


def build_model(
    model: str,
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
        model: name of a model config.
        data: name of a data config, or the path of your YAML. It gives class names and options of the model.
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
    if data is not None and num_classes is not None:
        options["num_classes"] = num_classes
    cfg = resolve(load_configs(str(data or NO_DATA), model, _words(options), declared(), "build_model")[-1])
    info = _info_without_images(cfg, data is not None, class_names, num_classes)
    net = models.build_model(cfg, info.class_names, descriptors=info.descriptors, pixel_stats=(info.mean, info.std))
    _start_head(net, cfg, info.num_classes)
    return net


def _check_classes(data: Any, class_names: Any, num_classes: Any) -> None:
    """Raise a `UserError` unless the classes are given in exactly one way."""
    if num_classes is not None and (not isinstance(num_classes, int) or isinstance(num_classes, bool)):
        raise UserError(f"build_model: num_classes must be a whole number, not '{printable(num_classes)}'")
    if isinstance(class_names, str):
        raise UserError("build_model: class_names must be a list of names, not one text")
    ways = (data is not None) + (class_names is not None) + (num_classes is not None and data is None)
    if ways != 1:
        raise UserError("build_model: give either data, class_names or num_classes")


def _start_head(net: ClassificationModel, cfg: CfgNode, num_classes: int) -> None:
    """Fill the classifier from the class names, or leave it random if it would be filled from training images."""
    if _reads_text(cfg):
        net.init_head(text_context(net, num_classes, cfg.seed, torch.device("cpu")))
    elif net.init is not None:
        log.warning("warning: init_head %s reads training images, so the classifier stays random", cfg.init_head)
        net.init = None


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


def _words(options: Mapping[str, Any]) -> list[str]:
    """Options as the words of a command line, so that a run has the same name and hash as that of the command."""
    return [word for key, value in options.items() for word in (key, _word(key, value))]


def _word(key: str, value: Any) -> str:
    if value is None:
        return "none"
    value = _without_numpy(value)
    if not isinstance(value, (list, dict)):
        return str(value)
    try:
        return yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True).strip()
    except yaml.YAMLError:
        raise UserError(f"{key}: '{printable(value)}' must hold texts and numbers only") from None


def _without_numpy(value: Any) -> Any:
    """The value with plain numbers and lists in place of those of NumPy and of tuples."""
    if isinstance(value, dict):
        return {_without_numpy(name): _without_numpy(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_without_numpy(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value
