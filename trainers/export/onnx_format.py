"""Export format `onnx`: a graph from uint8 images to logits, also of each expert. It is compared with the model."""

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tailtune.configs.errors import UserError
from tailtune.trainers.export.exported_model import ExportedModel
from tailtune.trainers.export.loading_code import preprocessing
from tailtune.trainers.storage.atomic_io import write_parts

OPSET = 20
TOLERANCE = 1e-4
"""Largest allowed difference between the logits of the file and of the model, relative to the largest logit."""
HALF_TOLERANCE = 2e-2
"""The same for a file that computes in fp16."""
LARGEST_FILE = 1.8e9
"""Largest size in bytes of the weights in one file. protobuf allows 2 GB, so larger weights go to a second file."""
FILE = "model.onnx"
NORMALISES = ("value_range", "mean", "std")
"""Fields of `preprocessing` that the graph applies itself."""
OUTPUTS = ("logits", "expert_logits")


class _Steps(NamedTuple):
    """Shares of the parts in the time of an export: 18, 4 and 13 s for CLIP ViT-B/16 on two busy cores (AMD EPYC)."""

    graph: int = 4
    file: int = 1
    comparison: int = 3


STEPS = _Steps()
BAR = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]"
"""A bar without a number of steps, because they are no unit that a user knows."""
LOAD = f"""import numpy
import onnxruntime
session = onnxruntime.InferenceSession({FILE!r})
def predict(images):
    return session.run(['logits'], {{'image': numpy.asarray(images)}})[0]"""


class _Predict(nn.Module):
    """Images [B, 3, R, R] → logits [B, C]. With several experts, also the logits of each expert [B, E, C]."""

    def __init__(self, exported: ExportedModel) -> None:
        super().__init__()
        self.method, self.has_experts = exported.method, exported.experts > 1

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.method.expert_logits(image)
        mean = self.method.aggregate(logits)
        return (mean, logits) if self.has_experts else (mean,)


def check(exported: ExportedModel) -> None:
    """Raise a `UserError` if the method selects experts for each image, because an exported graph is fixed."""
    if not exported.method.asks_every_expert:
        raise UserError(
            "export onnx: the method asks other experts about every image, which a graph cannot; export the run before "
            "it, whose experts these are"
        )


@torch.no_grad()
def write(exported: ExportedModel, folder: Path) -> dict[str, Any]:
    """Write the model, and compare the logits of the file with those of the model.

    Args:
        exported: the model.
        folder: the folder to write into.

    Returns:
        Facts for `facts.json`.

    Raises:
        UserError: the logits differ by more than TOLERANCE.
    """
    model = _Predict(exported).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    # The steps are few: show each. Without `miniters`, tqdm leaves out the short ones after one of ten seconds.
    shown = {"leave": False, "disable": None, "mininterval": 0, "miniters": 1, "bar_format": BAR}
    with tqdm(total=sum(STEPS), desc="export onnx", **shown) as bar, _quiet():
        torch.onnx.export(
            model,
            (exported.images(2),),
            folder / FILE,
            input_names=["image"],
            output_names=list(OUTPUTS if exported.experts > 1 else OUTPUTS[:1]),
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=size > LARGEST_FILE,
            verbose=False,
        )
        bar.update(STEPS.graph)
        _finish(exported, folder / FILE)
        bar.update(STEPS.file)
        difference = _compare(exported, model, folder / FILE, bar)
    return {
        "opset": OPSET,
        "normalised_inside": _normalised(exported),
        "computes_in": "float16" if exported.half else "float32",
        **difference,
        "image": f"uint8 [batch, 3, {exported.resolution}, {exported.resolution}], RGB; mean and std are inside",
        "logits": "float32 [batch, classes]",
        **({"expert_logits": "float32 [batch, experts, classes], whose mean is logits"} if model.has_experts else {}),
        "how_to_load": LOAD,
    }


def _finish(exported: ExportedModel, path: Path) -> None:
    """Convert the file to fp16 if that is wanted, and add the metadata that a program without facts.json needs.

    Raises:
        UserError: the weights are too large for the conversion, or the file system refuses to write.
    """
    import onnx

    whole = not path.with_name(f"{FILE}.data").exists()
    if exported.half and not whole:
        raise UserError("export onnx: export_fp16 is for weights of less than 1.8 GB; leave it out")
    graph = onnx.load(path, load_external_data=False)
    if exported.half:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        graph = convert_float_to_float16(graph, keep_io_types=True)
    facts = exported.describe()
    about = {name: facts[name] for name in ("class_names", "class_counts", "temperature")}
    about |= {"preprocessing": preprocessing(exported, inside=True), "normalised_inside": _normalised(exported)}
    onnx.helper.set_model_props(graph, {name: json.dumps(value) for name, value in about.items()})
    write_parts(path, [graph.SerializeToString()])


def _normalised(exported: ExportedModel) -> dict[str, Any]:
    """What the graph does with the pixel values: their range, and the mean and the deviation of each channel."""
    return {name: preprocessing(exported)[name] for name in NORMALISES}


def _compare(exported: ExportedModel, model: nn.Module, path: Path, bar: "tqdm[None]") -> dict[str, float]:
    """Compare the file with the model. The batch sizes differ from the batch size of the export.

    Moves the bar by `STEPS.comparison`.

    Raises:
        UserError: their logits differ by more than TOLERANCE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = largest = 0.0
    bar.update()
    for count in (1, 3):
        images = exported.images(count)
        for expected, logits in zip(model(images), session.run(None, {"image": images.numpy()}), strict=True):
            worst = max(worst, float((torch.from_numpy(logits) - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
        bar.update()
    if not worst <= (HALF_TOLERANCE if exported.half else TOLERANCE) * largest:
        raise UserError(f"export onnx: its logits differ by {worst:.2g} where the largest is {largest:.2g}; not kept")
    return {"largest_difference": worst, "largest_logit": largest}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Within the block, hide progress reports and internal warnings of the exporter. Errors are still raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
