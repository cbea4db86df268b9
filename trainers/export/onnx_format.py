"""`onnx`: uint8 images → logits, and those of each expert; the file is compared with the model at once."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailtune.configs.errors import UserError
from tailtune.trainers.export.exported_model import ExportedModel

OPSET = 20
TOLERANCE = 1e-4
"""Largest difference that is allowed between the file's and the model's logits, relative to the largest logit."""
LARGEST_FILE = 1.8e9
"""Bytes of weights in one file. A larger model gets a second file for them, because protobuf ends at 2 GB."""
FILE = "model.onnx"
OUTPUTS = ("logits", "expert_logits")
LOAD = f"""import numpy
import onnxruntime
session = onnxruntime.InferenceSession({FILE!r})
def predict(images):
    return session.run(['logits'], {{'image': numpy.asarray(images)}})[0]"""


class _Predict(nn.Module):
    """Images [B, 3, R, R] → logits [B, C], and with several experts also the logits of each [B, E, C]."""

    def __init__(self, exported: ExportedModel) -> None:
        super().__init__()
        self.method, self.has_experts = exported.method, exported.experts > 1

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.method.expert_logits(image)
        mean = self.method.aggregate(logits)
        return (mean, logits) if self.has_experts else (mean,)


def check(exported: ExportedModel) -> None:
    """Raise a `UserError` for a method that asks other experts about every image; a graph is fixed."""
    if not exported.method.asks_every_expert:
        raise UserError(
            "export onnx: the method asks other experts about every image, which a graph cannot; export the run before "
            "it, whose experts these are"
        )


@torch.no_grad()
def write(exported: ExportedModel, folder: Path) -> dict[str, Any]:
    """Write the model and compare it."""
    model = _Predict(exported).eval()
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with _quiet():
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
    difference = _compare(exported, model, folder / FILE)
    return {
        "opset": OPSET,
        **difference,
        "image": f"uint8 [batch, 3, {exported.resolution}, {exported.resolution}], RGB; mean and std are inside",
        "logits": "float32 [batch, classes]",
        **({"expert_logits": "float32 [batch, experts, classes], whose mean is logits"} if model.has_experts else {}),
        "how_to_load": LOAD,
    }


def _compare(exported: ExportedModel, model: nn.Module, path: Path) -> dict[str, float]:
    """Compare the file with the model, on other batch sizes than it was made with.

    Raises:
        UserError: their logits differ by more than TOLERANCE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = largest = 0.0
    for count in (1, 3):
        images = exported.images(count)
        for expected, logits in zip(model(images), session.run(None, {"image": images.numpy()}), strict=True):
            worst = max(worst, float((torch.from_numpy(logits) - expected).abs().max()))
            largest = max(largest, float(expected.abs().max()))
    if not worst <= TOLERANCE * largest:
        raise UserError(f"export onnx: its logits differ by {worst:.2g} where the largest is {largest:.2g}; not kept")
    return {"largest_difference": worst, "largest_logit": largest}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress reports and warnings about its internals; errors still come through."""
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
