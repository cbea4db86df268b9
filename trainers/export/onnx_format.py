"""`onnx`: uint8 images in, logits out, also those of each expert; compared with the model on the spot."""

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
"""Largest difference allowed, relative to the largest logit."""
ONE_FILE = 1.8e9
"""Bytes; what is larger keeps its weights in a file beside it, because protobuf ends at 2 GB."""
FILE = "model.onnx"
OUTPUTS = ("logits", "expert_logits")
LOAD = f"""import numpy
import onnxruntime
session = onnxruntime.InferenceSession({FILE!r})
def predict(images):
    return session.run(['logits'], {{'image': numpy.asarray(images)}})[0]"""


class _Predict(nn.Module):
    """Images [B, 3, R, R] → logits [B, C]; of several experts also those of each [B, E, C]."""

    def __init__(self, subject: ExportedModel) -> None:
        super().__init__()
        self.method, self.several = subject.method, subject.experts > 1

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits = self.method.expert_logits(image)
        mean = self.method.aggregate(logits)
        return (mean, logits) if self.several else (mean,)


def check(subject: ExportedModel) -> None:
    """Every model can be exported that is the same function of every image."""
    if not subject.method.asks_every_expert:
        raise UserError(
            "export onnx: the method asks other experts about every image, which a graph cannot; export the run before "
            "it, whose experts these are"
        )


@torch.no_grad()
def write(subject: ExportedModel, folder: Path) -> dict[str, Any]:
    model = _Predict(subject).eval()
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    with _quiet():
        torch.onnx.export(
            model,
            (subject.images(2),),
            folder / FILE,
            input_names=["image"],
            output_names=list(OUTPUTS if subject.experts > 1 else OUTPUTS[:1]),
            dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
            opset_version=OPSET,
            dynamo=True,
            external_data=size > ONE_FILE,
            verbose=False,
        )
    difference = _compare(subject, model, folder / FILE)
    return {
        "opset": OPSET,
        **difference,
        "image": f"uint8 [batch, 3, {subject.resolution}, {subject.resolution}], RGB; mean and std are inside",
        "logits": "float32 [batch, classes]",
        **({"expert_logits": "float32 [batch, experts, classes], whose mean is logits"} if model.several else {}),
        "how_to_load": LOAD,
    }


def _compare(subject: ExportedModel, model: nn.Module, path: Path) -> dict[str, float]:
    """Run the file on other batch sizes than it was made with."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = largest = 0.0
    for count in (1, 3):
        images = subject.images(count)
        for wanted, got in zip(model(images), session.run(None, {"image": images.numpy()}), strict=True):
            worst = max(worst, float((torch.from_numpy(got) - wanted).abs().max()))
            largest = max(largest, float(wanted.abs().max()))
    if not worst <= TOLERANCE * largest:
        raise UserError(f"export onnx: its logits differ by {worst:.2g} where the largest is {largest:.2g}; not kept")
    return {"largest_difference": worst, "largest_logit": largest}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress and its own internals' warnings; only its errors are the user's business."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
