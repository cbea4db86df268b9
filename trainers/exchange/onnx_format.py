"""`onnx`: uint8 images in, logits out, compared with the model on the spot."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from trainers.exchange.subject import Subject

OPSET = 20
TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest logit."""
ONE_FILE = 1.8e9
"""Bytes; what is larger keeps its weights in a file beside it, because protobuf ends at 2 GB."""
FILE = "model.onnx"


class _Predict(nn.Module):
    """Images [B, 3, R, R] → logits [B, C]."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.method = subject.method

    def forward(self, image: Tensor) -> Tensor:
        return self.method.predict(image)


def check(subject: Subject) -> None:
    """Every model can be exported."""


@torch.no_grad()
def write(subject: Subject, folder: Path) -> dict[str, Any]:
    model = _Predict(subject).eval()
    size = sum(each.numel() * each.element_size() for each in model.parameters())
    with _quiet():
        torch.onnx.export(
            model,
            (subject.images(2),),
            folder / FILE,
            input_names=["image"],
            output_names=["logits"],
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
        "load": f'onnxruntime.InferenceSession("{FILE}").run(None, {{"image": images}})[0]',
    }


def _compare(subject: Subject, model: nn.Module, path: Path) -> dict[str, float]:
    """Run the file on other batch sizes than it was made with."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = largest = 0.0
    for count in (1, 3):
        images = subject.images(count)
        wanted, found = model(images), torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
        worst = max(worst, float((found - wanted).abs().max()))
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
