"""Gives the results of an evaluation to TensorBoard and other trackers: curves, and pictures of class accuracies."""

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image

from tailtune.configs import values_of
from tailtune.configs.errors import printable
from tailtune.configs.key import TRAIN
from tailtune.datasets.data_bundle import DataInfo
from tailtune.trainers.evaluation.evaluation_plan import EvaluationPlan
from tailtune.trainers.progress import test_curves, write_test_curves
from tailtune.trainers.report.files import NONE
from tailtune.trainers.report.subject import EvaluatedImages, Launch, Predicted, Subject
from tailtune.trainers.runs.run_folder import RunFolder

ONE_IMAGE = ("aim", "clearml")
"""Trackers whose `log_images` takes one image for each tag; that of the others takes a list."""

log = logging.getLogger("tailtune")


def add_curves(
    plan: EvaluationPlan,
    accelerator: Accelerator,
    folder: RunFolder,
    target: Path,
    result: dict[str, Any],
    info: DataInfo,
) -> None:
    """Log the results of an evaluation, on the first process. Without TensorBoard and trackers it does nothing.

    Args:
        plan: whether there is an event file, and whether pictures are drawn.
        accelerator: has the trackers of a run that was trained in this process.
        folder: the run's folder.
        target: the folder of the result.
        result: the content of metrics.json; receives a note if a picture fails.
        info: facts about the data.
    """
    distributions = result.get("distributions", {})
    step = (result.get("train") or {}).get("steps", 0)
    curves = test_curves(result["test"], distributions)
    accelerator.log(curves, step)
    takers = [tracker for tracker in accelerator.trackers if hasattr(tracker, "log_images")]
    pictures: Mapping[str, bytes] = {}
    try:
        if plan.report != NONE and (plan.tensorboard or takers):
            pictures = class_pictures(result, info)
        images = {tag: Image.open(io.BytesIO(png)).convert("RGB") for tag, png in pictures.items()}
        for tracker in takers if images else ():
            one = tracker.name in ONE_IMAGE
            tracker.log_images({tag: image if one else [image] for tag, image in images.items()}, step)
    except Exception as error:  # of any library: hours of training must not be lost to a picture
        log.debug("the pictures", exc_info=True)
        text = f"no pictures of class accuracies ({type(error).__name__}: {printable(error)})"
        log.warning("warning: %s", text)
        result["notes"].append(text)
    if plan.tensorboard:
        options = values_of(folder.cfg, TRAIN) if target == folder.path else None
        write_test_curves(target / "tensorboard", step, curves, distributions, options, pictures)


def class_pictures(result: Mapping[str, Any], info: DataInfo) -> dict[str, bytes]:
    """The pictures of the class accuracies: tag → content of a PNG file.

    Args:
        result: the content of metrics.json.
        info: facts about the data.
    """
    from tailtune.trainers.report.figures import png_pictures  # imports matplotlib, in a second

    nothing = np.empty(0, dtype=np.int64)
    subject = Subject(
        result,
        info.class_names,
        {name: classes.numpy() for name, classes in info.groups.items()},
        Predicted(nothing, nothing, nothing, nothing),
        EvaluatedImages("test"),
        Path(),
        Launch("", ""),
    )
    return {f"test/{name}": png for name, png in png_pictures(subject).items()}
