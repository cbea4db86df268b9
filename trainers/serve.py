"""`serve_run`: answers requests with the model of a finished run, until a signal comes. Nothing is written."""

import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO

import uvicorn

from tailtune.configs import Schema
from tailtune.configs.errors import UserError, printable
from tailtune.datasets.sources.uploaded_images import UploadedImages
from tailtune.trainers.evaluation.evaluation_plan import EvaluationPlan
from tailtune.trainers.labeller import Labeller, config_to_label, problem_of
from tailtune.trainers.prediction.request import ModelRequest, check_threshold
from tailtune.trainers.prediction.tables import Row
from tailtune.trainers.processes.interrupts import handled_signals
from tailtune.trainers.serving.app import Answer, make_app
from tailtune.trainers.serving.limits import Limits

GRACE = 10
"""Seconds that requests get to end after a signal."""

log = logging.getLogger("tailtune")


def serve_run(request: ModelRequest, limits: Limits, listener: socket.socket, address: str, schema: Schema) -> None:
    """Load a run and answer requests until Ctrl-C or SIGTERM. Requests that are being computed are answered before.

    Args:
        request: which model.
        limits: what a request may cost.
        listener: the socket, which listens already. It is closed at the end.
        address: where it listens, for messages.
        schema: all options.

    Raises:
        UserError: wrong input, or a file of the run is damaged.
    """
    cfg, checkpoint = config_to_label(request, schema, "serve")
    target = EvaluationPlan.of(cfg).target
    if target is not None and target.name.startswith("estimate"):
        raise UserError(
            f"target_prior {target.name} reads all images, and a server never has them all; name the frequencies"
        )
    labeller = Labeller(cfg, checkpoint)
    names = labeller.info.class_names
    check_threshold(request.threshold, names)
    facts = {"run": labeller.checkpoint.home.name, "backbone": cfg.backbone, "classes": len(names)}
    app = make_app(_label_files(labeller, request.threshold), facts, limits)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
        )
    )
    classes = printable(", ".join(names))
    log.info("%s: %s on %s, %d classes (%s)", facts["run"], cfg.backbone, labeller.device, len(names), classes)
    log.info("%s is ready: open it and drop images, or send them to %s/predict; Ctrl-C ends it", address, address)
    with _stopped_by_signals(server):
        server.run([listener])
    log.info("stopped")


def _label_files(labeller: Labeller, threshold: float | None) -> Callable[[Sequence[str], Sequence[BinaryIO]], Any]:
    """A function that labels files as `predict` does."""
    predictor = labeller.predictor
    used = predictor.frequencies()

    def label(names: Sequence[str], files: Sequence[BinaryIO]) -> list[Answer]:
        view, answers = labeller.view(UploadedImages(files)), [Answer() for _ in files]
        for logits, _, unreadable in labeller.batches(view, num_workers=0):
            for position in unreadable:
                answers[position] = {"path": names[position], "error": problem_of(view, position)}
            for part, top in predictor.most_probable(predictor.log_odds(logits, used)):
                for position, classes in zip(logits.index[part].tolist(), top, strict=True):
                    answers[position] = Row.of(names[position], classes, threshold).as_object()
        return answers

    return label


@contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Let every signal that we handle end the server. uvicorn knows two of them, and raises them again at its end."""

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in handled_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
