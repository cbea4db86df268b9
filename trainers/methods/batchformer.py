"""BatchFormer: while training, the samples of a mini-batch attend to each other (Hou, Yu and Tao, CVPR 2022)."""

from dataclasses import dataclass
from typing import Any

from tailtune.configs.option import option
from tailtune.configs.seeding import seeded
from tailtune.models import ClassificationModel
from tailtune.trainers.methods.base import Batch, Method, Objective, Step
from tailtune.trainers.methods.batchformer_layer import BatchMixer
from tailtune.trainers.methods.wrapper import Wrapper

MODES = ("replace", "sum", "mean")


@dataclass(frozen=True)
class Options:
    inner: str = option("ride", "Method whose loss is computed on the mixed features.", table="METHODS")
    layers: int = option(1, "Number of layers of the encoder that attends across the batch.", least=1, most=16)
    heads: int = option(
        0,
        "Number of attention heads across the batch. 0 means 4 for features of more than 128 numbers, else 1.",
        least=0,
        most=1024,
    )
    dropout: float = option(0.5, "Dropout rate of the encoder that attends across the batch.")
    mode: str = option(
        "replace",
        "What the loss is of: the mixed features alone (replace), or also the raw ones, as a sum or a mean.",
        choices=MODES,
    )
    chunks: int = option(
        1,
        "Number of parts of a micro-batch. Images attend only to images of their part, as if each part had its own "
        "GPU.",
        least=1,
        most=10**4,
    )
    kaiming: bool = option(
        False, "The linear layers start as in the original's CIFAR networks, from Kaiming's initialisation."
    )


class BatchFormer(Wrapper):
    """While training, features pass through a transformer across the batch before the classifiers; not at test time.

    All experts share one transformer. Modes:

    - `replace` trains the classifiers on mixed features alone (the authors' version for RIDE).
    - `sum` and `mean` train the classifiers on mixed and on raw features (the authors' generic version, which used
      `lr_factors {mixer: 0.1}`). `sum` is L_mixed + L_raw. `mean` is half of it: the mean loss of a batch of twice
      the size.

    The returned logits of a step are those of the raw features in the modes `sum` and `mean`.
    """

    Options = Options
    depends_on_batch = True
    can_be_wrapped = False

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any, inner: Method) -> None:
        super().__init__(model, objective, options, inner)
        opts = self.options
        with seeded(objective.seed, "mixer"):
            self.mixer = BatchMixer(
                model.encoder.feature_dim, opts.layers, opts.heads, opts.dropout, opts.chunks, opts.kaiming
            )

    @property
    def takes_features(self) -> bool:
        return not self.loss_needs_images

    def forward(self, batch: Batch) -> Step:
        if not self.training:
            return super().forward(batch)
        features = self.model.features(batch["image"])
        mixed = self.head_logits(self.mixer(features, batch["weight"] > 0))
        loss_sum, weight = self.loss(mixed, batch)
        if self.options.mode == "replace":
            return self.step(loss_sum, weight, mixed)
        raw = self.head_logits(features)
        raw_sum, raw_weight = self.loss(raw, batch)
        return self.step(loss_sum + raw_sum, weight + raw_weight if self.options.mode == "mean" else weight, raw)

    def param_groups(self) -> list[dict[str, Any]]:
        """As `Method.param_groups`, with the transformer across the batch as a separate group `mixer`."""
        mixer = list(self.mixer.parameters())
        ids = {id(weight) for weight in mixer}
        groups = super().param_groups()
        others = [{**group, "params": [p for p in group["params"] if id(p) not in ids]} for group in groups]
        return [group for group in [*others, {"name": "mixer", "params": mixer}] if group["params"]]
