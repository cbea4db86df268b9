"""BatchFormer: while training, the samples of a mini-batch attend to each other (Hou, Yu and Tao, CVPR 2022)."""

from dataclasses import dataclass, field
from typing import Any

from tailtune.configs.seeding import seeded
from tailtune.models import ClassificationModel
from tailtune.trainers.methods.base import Batch, Method, Objective, Step
from tailtune.trainers.methods.batch_mixer import BatchMixer
from tailtune.trainers.methods.wrapper import Wrapper

MODES = ("replace", "sum", "mean")


@dataclass(frozen=True)
class Options:
    inner: str = field(default="ride", metadata={"doc": "entry of METHODS whose loss is used"})
    layers: int = field(default=1, metadata={"doc": "of the encoder across the batch", "least": 1, "most": 16})
    heads: int = field(
        default=0, metadata={"doc": "of its attention; 0: 4 for features above 128, else 1", "least": 0, "most": 1024}
    )
    dropout: float = field(default=0.5, metadata={"doc": "in it"})
    mode: str = field(
        default="replace",
        metadata={"doc": "loss of the mixed features alone, or with the raw ones: sum or mean", "choices": MODES},
    )
    chunks: int = field(
        default=1,
        metadata={"doc": "parts of a micro-batch that attend separately, as on GPUs", "least": 1, "most": 10**4},
    )
    kaiming: bool = field(default=False, metadata={"doc": "start its linear layers as the original's CIFAR networks"})


class BatchFormer(Wrapper):
    """Features pass a transformer across the batch on their way to the classifiers; at test time they do not.

    All experts share the one encoder. Modes: `replace` trains the classifiers on mixed features alone (the RIDE
    version); `sum` and `mean` train them on mixed and raw features (shared classifier): L_mixed + L_raw,
    or their mean, that of a batch of twice the size (the generic version, where `lr_factors {mixer: 0.1}` was used).
    Logits of a step are those of the raw features where these are trained on.
    """

    Options = Options
    depends_on_batch = True
    can_be_wrapped = False

    def __init__(self, model: ClassificationModel, objective: Objective, options: Any, inner: Method) -> None:
        super().__init__(model, objective, options, inner)
        own = self.options
        with seeded(objective.seed, "mixer"):
            self.mixer = BatchMixer(
                model.encoder.feature_dim, own.layers, own.heads, own.dropout, own.chunks, own.kaiming
            )

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
        """With the encoder across the batch as a group of its own, `mixer`."""
        own = list(self.mixer.parameters())
        ids = {id(each) for each in own}
        found = super().param_groups()
        others = [{**group, "params": [each for each in group["params"] if id(each) not in ids]} for group in found]
        return [group for group in [*others, {"name": "mixer", "params": own}] if group["params"]]
