"""`predict_images`: labels images that belong to no data set, with the model of a finished run.

The logits of the images are dropped after every batch. Only if a target prior is estimated from the images are they
kept until the end, in a file if there are many.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tailtune.configs import Schema
from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.view import View
from tailtune.trainers.evaluation.inference import CollectedLogits, Logits
from tailtune.trainers.evaluation.rows import Rows
from tailtune.trainers.labeller import Labeller, config_to_label, problem_of
from tailtune.trainers.prediction.outputs import Outputs, open_outputs
from tailtune.trainers.prediction.predictor import Predictor
from tailtune.trainers.prediction.request import PredictRequest
from tailtune.trainers.processes.interrupts import Interrupt
from tailtune.trainers.storage.large_tensors import Scratch

log = logging.getLogger("tailtune")


def predict_images(request: PredictRequest, schema: Schema, stdout: BinaryIO) -> int:
    """Label images and write the results. Neither a run folder nor a score is written.

    Args:
        request: what shall be done.
        schema: all options.
        stdout: receives the table if the request names no file.

    Returns:
        Number of images that could not be read.

    Raises:
        UserError: wrong input, or the file system refuses to write; no file is left then.
        KeyboardInterrupt: a signal has stopped it; no file is left either.
        BrokenPipeError: nobody reads the table on standard output any more.
    """
    cfg, checkpoint = config_to_label(request, schema, "predict")
    if request.embeddings is not None and cfg.tte:
        raise UserError("--embeddings are of one view of an image; leave it out, or set tte to False")
    labeller = Labeller(cfg, checkpoint)
    predictor, count = labeller.predictor, len(request.paths)
    view = labeller.view(FileSource(Path(), request.paths, np.zeros(count, dtype=np.int64)))
    started, scratch = time.perf_counter(), Scratch(request.out and request.out.absolute().parent)
    about = {"run": request.run, "backbone": cfg.backbone}
    with Interrupt() as interrupt, open_outputs(request, predictor.class_names, stdout, about) as outputs:
        images = _Images(labeller, view, interrupt)
        batches = images.batches(outputs)
        found = collected(batches, count, scratch) if predictor.estimates else None
        used = predictor.frequencies(found, scratch)
        for part in batches if found is None else [found]:
            _write(predictor, predictor.log_odds(part, used), part.index, outputs)
        if interrupt.requested:
            raise KeyboardInterrupt
    bad, seconds = images.unreadable, time.perf_counter() - started
    log.info("%d images in %.1f s, %.0f a second", count - bad, seconds, count / seconds)
    if bad:
        log.warning("%d of %d images could not be read and are left out", bad, count)
    return bad


class _Images:
    """One pass over the images.

    Args:
        labeller: the model.
        view: the images.
        interrupt: ends the pass after a batch.
    """

    def __init__(self, labeller: Labeller, view: View, interrupt: Interrupt) -> None:
        self.labeller, self.view, self.interrupt, self.unreadable = labeller, view, interrupt, 0

    def batches(self, outputs: Outputs) -> Iterator[Logits]:
        """The logits of the images that can be read, batch by batch.

        Args:
            outputs: receives the features.

        Raises:
            KeyboardInterrupt: a signal has come; the batch that was being computed is finished before.
        """
        shown = sys.stderr is not None and sys.stderr.isatty()
        with ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(total=len(self.view), unit="image", disable=not shown, leave=False, dynamic_ncols=True)
            )
            if shown:
                stack.enter_context(logging_redirect_tqdm([log]))  # lines appear above the bar
            num_workers, with_features = self.labeller.cfg.num_workers, outputs.embeddings is not None
            for logits, features, unreadable in self.labeller.batches(self.view, num_workers, with_features):
                for position in unreadable:
                    log.warning("%s", problem_of(self.view, position))
                self.unreadable += len(unreadable)
                if features is not None:
                    outputs.add_features(features)
                bar.update(len(logits.index) + len(unreadable))
                bar.clear()  # the table may go to the same terminal
                yield logits
                if self.interrupt.requested:
                    raise KeyboardInterrupt


def collected(batches: Iterator[Logits], count: int, scratch: Scratch) -> Logits:
    """The logits of all images, in a file if there are many.

    Args:
        batches: logits of some images each.
        count: number of all images; some may be missing in the batches.
        scratch: gives room for them.

    Raises:
        UserError: there are none.
    """
    collected = CollectedLogits(count, scratch, summarised=False)
    for batch in batches:
        if collected.rows is None:
            collected.reserve(batch.logits.shape[1:])
        collected.add(batch.logits[:], batch.labels, batch.index)
    found = collected.all()
    if found is None or not len(found.index):
        raise UserError("target_prior: no image could be read, so that class frequencies cannot be estimated")
    return found


def _write(predictor: Predictor, log_odds: Rows, index: Tensor, outputs: Outputs) -> None:
    """Write the most probable classes of n images, a few images at a time."""
    for part, top in predictor.most_probable(log_odds):
        outputs.add(index[part].tolist(), top)
