"""The zero-shot classifier beside a trained one: their logits together (for `ensemble` logits and gla)."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tailtune.configs import CfgNode, schema_of
from tailtune.trainers.distributed import on_main
from tailtune.trainers.evaluation import tta as test_time
from tailtune.trainers.evaluation.inference import Logits, infer
from tailtune.trainers.methods import Method
from tailtune.trainers.runs.load_run import FinishedRun, fresh_method, load_trained, outline_of
from tailtune.trainers.runs.run_folder import FACTS
from tailtune.trainers.storage.checkpoint import check_base
from tailtune.trainers.storage.manifest import read_json

SOME = 512
"""Images that are in double precision together."""
log = logging.getLogger("tailtune")


class WithZeroShot(Method):
    """A trained method, every expert of which is joined with the zero-shot classifier of the same CLIP.

    Args:
        join: expert logits z [B, E, C], zero-shot logits z_zs [B, 1, C] → [B, E, C].
    """

    def __init__(self, trained: Method, zero_shot: Method, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(trained.model, trained.objective, trained.options)
        self.trained, self.zero_shot, self.join = trained, zero_shot, join

    @property
    def asks_every_expert(self) -> bool:
        return self.trained.asks_every_expert

    can_be_wrapped = False

    def expert_logits(self, images: Tensor) -> Tensor:
        return self.join(self.trained.expert_logits(images), self.zero_shot.expert_logits(images))

    def aggregate(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.trained.aggregate(logits, weights)


def logits(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """α z + (1 − α) z_zs."""
    alpha = run.cfg.ensemble_alpha
    return WithZeroShot(run.method, zero_shot(run), lambda z, other: alpha * z + (1 - alpha) * other), {}


def gla(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """(z − log p) + (z_zs − log π), p the prior that each expert's z assumes, π that of the pre-training.

    Generalized Logit Adjustment (Zhu et al., NeurIPS 2023, section 4): both are freed from the class frequencies that
    they saw, and then count alike. π comes from the run's training images, which the zero-shot classifier has not seen.
    """
    method, accelerator = zero_shot(run), run.accelerator
    log.info("prior of the pre-training: zero-shot logits of %d training images", len(run.data.train_unaugmented))
    found = infer(
        test_time.plain(method), run.data.train_unaugmented, accelerator, run.cfg.test_batch_size, run.cfg.num_workers
    )
    prior = on_main(accelerator, lambda: _prior_of(found))
    bias = outline_of(run.folder, run.cfg).assumed_prior().double().cpu() + prior  # [E, C]
    bias = bias.float().to(accelerator.device)
    return WithZeroShot(run.method, method, lambda z, other: z + other - bias), {
        "pretraining_prior": prior.exp().tolist()
    }


def _prior_of(found: Logits | None) -> Tensor:
    assert found is not None, "asked on the first process"
    return pretraining_prior(found.logits[:, 0], found.labels)


def zero_shot(run: FinishedRun) -> Method:
    """The zero-shot classifier of the run's backbone and prompt, ready to predict.

    Raises:
        UserError: its text encoder is not the one that made the run's head.
    """
    cfg, home = zero_shot_of(run.cfg), run.folder.source
    fresh = fresh_method(cfg, run.data.info, run.accelerator.device)
    if run.folder.foreign is None:
        check_base(home, read_json(home / FACTS), fresh.base)
    method = load_trained(fresh, cfg, run.folder.evaluated, run.data, run.accelerator)
    test_time.prepare(method, run.cfg.test_prec)
    return method


def zero_shot_of(cfg: CfgNode) -> CfgNode:
    """The config of that classifier: what a run adds to its backbone is left out."""
    cfg = cfg.clone()
    cfg.defrost()
    left_out = {key: entry.default for key, entry in schema_of(cfg).items() if not entry.zero_shot}
    cfg.update(left_out, zero_shot=True)
    cfg.freeze()
    return cfg


def pretraining_prior(logits: Tensor, labels: Tensor) -> Tensor:
    """log π = argmin over log q of the class-balanced risk of CE(z − log q, y), fp64 [C] (Zhu et al. 2023, section 4).

    Logits z of p(y | x) under the prior π become those of a uniform one where log π is taken off, which is what the
    balanced risk rewards. In log q it is convex, and a constant changes nothing: so the simplex, for which the
    authors' code has multipliers and 1000 steps of SGD, needs a log-softmax at the end. The minimum is finite, since
    every class that is there would lose without bound. A class without images gets the mean of log q.

    Args:
        logits: [N, C], of a model that has not learnt from these images.
        labels: [N].
    """
    counts = labels.bincount(minlength=logits.shape[1])
    seen = (counts > 0).nonzero().squeeze(1)
    weights = 1 / (len(seen) * counts.double())  # of an image of each class
    pairs = zip(logits.split(SOME), labels.split(SOME), strict=True)
    chunks = [(z[:, seen].softmax(1), weights[y]) for z, y in pairs]
    bias = torch.zeros(len(seen), dtype=torch.float64)  # b = −log q
    exact = partial(torch.optim.LBFGS, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    optimizer = exact([bias], max_iter=500, history_size=20)

    def risk() -> Tensor:
        """Σ_i w_i (log Σ_c p_ic e^{b_c} − b_y), which is the risk of z + b up to a constant, and its slope."""
        factors, value, slope = bias.exp(), -bias.mean(), torch.full_like(bias, -1 / len(seen))
        for p, w in chunks:
            p = p.double()
            sums = p @ factors
            value += w @ sums.log()
            slope += (w / sums) @ p * factors
        bias.grad = slope
        return value

    optimizer.step(risk)
    return (-bias.mean()).repeat(len(counts)).index_copy(0, seen, -bias).log_softmax(0)
