"""Ensembles of a trained method and the zero-shot classifier, which add up their logits (`ensemble` logits and gla)."""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tailtune.configs import CfgNode, schema_of, with_values
from tailtune.trainers.distributed import on_main
from tailtune.trainers.evaluation import tta as test_time
from tailtune.trainers.evaluation.inference import Logits, infer
from tailtune.trainers.evaluation.rows import MadeRows, Rows, slices
from tailtune.trainers.feature_store import FeatureStore
from tailtune.trainers.methods import Method
from tailtune.trainers.runs.class_prior import prior_of_run
from tailtune.trainers.runs.load_run import FinishedRun, fresh_method, load_trained
from tailtune.trainers.runs.run_folder import FACTS
from tailtune.trainers.storage.checkpoint import check_base
from tailtune.trainers.storage.large_tensors import Scratch
from tailtune.trainers.storage.manifest import read_json

SOME = 512
"""Number of images whose probabilities are converted to fp64 at a time."""
log = logging.getLogger("tailtune")


class WithZeroShot(Method):
    """A trained method in which the logits of every expert are combined with those of the zero-shot classifier.

    Args:
        trained: the trained method.
        zero_shot: the zero-shot classifier of the same CLIP model.
        join: (expert logits z [B, E, C], zero-shot logits z_zs [B, 1, C]) → combined logits [B, E, C].
    """

    def __init__(self, trained: Method, zero_shot: Method, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(trained.model, trained.objective, trained.options)
        self.trained, self.zero_shot, self.join = trained, zero_shot, join

    @property
    def asks_every_expert(self) -> bool:
        return self.trained.asks_every_expert

    can_be_wrapped = False

    @property
    def parts(self) -> tuple[Method, ...]:
        return self.trained, self.zero_shot

    def expert_logits(self, images: Tensor | list[Tensor]) -> Tensor:
        of_trained, of_zero_shot = images if isinstance(images, list) else (images, images)
        return self.join(self.trained.expert_logits(of_trained), self.zero_shot.expert_logits(of_zero_shot))

    def aggregate(self, logits: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.trained.aggregate(logits, weights)


def logits(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """Weighted sum α z + (1 − α) z_zs of trained and zero-shot logits, with α = `ensemble_alpha`."""
    alpha = run.cfg.ensemble_alpha
    return WithZeroShot(run.method, zero_shot(run), lambda z, other: alpha * z + (1 - alpha) * other), {}


def gla(run: FinishedRun) -> tuple[Method, dict[str, Any]]:
    """Generalized Logit Adjustment (Zhu et al., NeurIPS 2023, section 4): (z − log p) + (z_zs − log π).

    p is the class prior that the trained logits z of an expert assume. π is the class prior that the zero-shot logits
    z_zs assume from pre-training. Both logits are corrected for their prior and then added with equal weight. π is
    estimated from the run's training images, on which the zero-shot classifier was not trained.
    """
    method, accelerator, scratch = zero_shot(run), run.accelerator, Scratch(run.folder.path)
    log.info("prior of the pre-training: zero-shot logits of %d training images", len(run.data.train_unaugmented))
    train_logits = infer(
        test_time.plain(method),
        FeatureStore.of(run.cfg, accelerator).view_of(method, run.data.train_unaugmented),
        accelerator,
        run.cfg.test_batch_size,
        run.cfg.num_workers,
        scratch=scratch,
        title="prior",
    )
    prior = on_main(accelerator, lambda: _prior_of(train_logits, scratch))
    bias = prior_of_run(run.folder, run.cfg).assumed.double() + prior  # [E, C]
    bias = bias.float().to(accelerator.device)
    return WithZeroShot(run.method, method, lambda z, other: z + other - bias), {
        "pretraining_prior": prior.exp().tolist()
    }


def _prior_of(found: Logits | None, scratch: Scratch) -> Tensor:
    assert found is not None, "asked on the first process"
    count, _, classes = found.logits.shape
    logits = found.logits
    return pretraining_prior(MadeRows((count, classes), lambda rows: logits[rows][:, 0]), found.labels, scratch)


def zero_shot(run: FinishedRun) -> Method:
    """Load the zero-shot classifier of the run's backbone and prompt, ready to predict.

    Raises:
        UserError: the pre-trained weights are not those from which the run started.
    """
    cfg, home = zero_shot_of(run.cfg), run.folder.source
    fresh = fresh_method(cfg, run.data.info, run.accelerator.device)
    if run.folder.foreign is None:
        check_base(home, read_json(home / FACTS), fresh.base)
    method = load_trained(fresh, cfg, run.folder.evaluated, run.data.info.class_names)
    test_time.prepare(method, run.cfg.test_prec)
    return method


def zero_shot_of(cfg: CfgNode) -> CfgNode:
    """The config of the zero-shot classifier of a run: options of what the run adds to the backbone get defaults."""
    left_out = {key: entry.default for key, entry in schema_of(cfg).items() if not entry.zero_shot}
    return with_values(cfg, **left_out, zero_shot=True)


def pretraining_prior(logits: Rows, labels: Tensor, scratch: Scratch = Scratch()) -> Tensor:  # noqa: B008
    """Estimate the class prior of pre-training (Zhu et al. 2023, section 4).

    log π is the log q that minimises the class-balanced risk of CE(z − log q, y). If z are the logits of p(y | x) under
    the prior π, then z − log π are the logits under a uniform prior, which minimise the balanced risk.

    The risk is convex in log q and does not change when a constant is added to log q. A log-softmax at the end
    therefore gives a q that sums to 1; the authors' code uses Lagrange multipliers and 1000 steps of SGD instead. The
    minimum is finite, because the risk grows without bound when the log q of any class with images does.

    Args:
        logits: z [N, C], of a model that was not trained on these images.
        labels: y [N].
        scratch: gives room for the probabilities.

    Returns:
        log π [C] in fp64. A class without images gets the mean of log q over the other classes.
    """
    counts = labels.bincount(minlength=logits.shape[1])
    seen = (counts > 0).nonzero().squeeze(1)
    weights = 1 / (len(seen) * counts.double())  # weight of an image of each class [C]
    probabilities = scratch.empty((len(logits), len(seen)), logits.dtype)
    for part in slices(logits):
        probabilities[part] = logits[part][:, seen].softmax(1)
    bias = torch.zeros(len(seen), dtype=torch.float64)  # b = −log q
    exact = partial(torch.optim.LBFGS, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe")
    optimizer = exact([bias], max_iter=500, history_size=20)

    def risk() -> Tensor:
        """Σ_i w_i (log Σ_c p_ic e^{b_c} − b_y), the risk of z + b up to a constant; also sets the gradient of b."""
        factors, value, slope = bias.exp(), -bias.mean(), torch.full_like(bias, -1 / len(seen))
        for part in slices(probabilities, SOME * len(seen)):
            p, w = probabilities[part].double(), weights[labels[part]]
            sums = p @ factors
            value += w @ sums.log()
            slope += (w / sums) @ p * factors
        bias.grad = slope
        return value

    optimizer.step(risk)
    return (-bias.mean()).repeat(len(counts)).index_copy(0, seen, -bias).log_softmax(0)
