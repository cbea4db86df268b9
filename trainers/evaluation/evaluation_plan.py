"""What an evaluation needs of a config: its numbers, and what it builds where it has no model or images at hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tailtune.configs import CfgNode, schema_of, values_of
from tailtune.configs.key import TEST
from tailtune.configs.option import options_from
from tailtune.datasets import DataInfo, build_info
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.datasets.test_distributions.build import build_distributions
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.trainers.evaluation.adaptation_table import ADAPTS
from tailtune.trainers.evaluation.target_prior import TargetPlan
from tailtune.trainers.evaluation.tta import warnings_of
from tailtune.trainers.methods import Method
from tailtune.trainers.runs.load_run import outline, outline_of
from tailtune.trainers.runs.run_folder import RunFolder

OF_TEST_IMAGES = ("test_dists", "adapt", "target_prior")
"""Options that make something of the test images, and nothing of training images."""


@dataclass(frozen=True)
class EvaluationPlan:
    """The numbers of an evaluation."""

    options: dict[str, Any]
    """All options of evaluations, as metrics.json records them."""
    options_of_logits: dict[str, Any]
    """Those of them that change the logits."""
    asked: tuple[str, ...]
    """Which of `OF_TEST_IMAGES` are given."""
    test_train: bool
    adapt: str | None
    adapt_options: Any
    """Options of the adaptation; None without one."""
    target: TargetPlan | None
    tte_mode: str | None
    """Entry of TEST_TIME; None: one view of an image."""
    test_prec: str
    resolution: int
    batch_size: int
    num_workers: int
    max_images: int | None
    warnings: tuple[str, ...]
    """What a reader of the result has to know before anything is computed."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "EvaluationPlan":
        """The numbers of a resolved config."""
        options, schema = values_of(cfg, TEST), schema_of(cfg)
        warnings = warnings_of(cfg.tte_mode, cfg.resolution, cfg.expand, cfg.augment) if cfg.tte else ()
        return cls(
            options=options,
            options_of_logits={key: value for key, value in options.items() if schema[key].logits},
            asked=tuple(key for key in OF_TEST_IMAGES if cfg[key] is not None),
            test_train=cfg.test_train,
            adapt=cfg.adapt,
            adapt_options=cfg.adapt and options_from(ADAPTS[cfg.adapt].Options, cfg, cfg.adapt),
            target=TargetPlan.of(cfg),
            tte_mode=cfg.tte_mode if cfg.tte else None,
            test_prec=cfg.test_prec,
            resolution=cfg.resolution,
            batch_size=cfg.test_batch_size,
            num_workers=cfg.num_workers,
            max_images=cfg.max_test_images,
            warnings=tuple(warnings),
        )

    @property
    def adapts(self) -> bool:
        """Whether predictions are adapted to the test images."""
        return self.adapt is not None and not self.test_train

    @property
    def needs_val(self) -> bool:
        """Whether logits of the validation images are needed besides their metrics."""
        return self.target is not None and self.target.reads_val and not self.test_train


@dataclass(frozen=True)
class Builders:
    """What an evaluation builds from the config where stored logits are all that it has."""

    info: Callable[[], DataInfo]
    """Facts of the data that the evaluated run was trained on."""
    distributions: Callable[[DataInfo, Tensor], tuple[TestDistribution, ...]]
    """Facts and the labels of the test images → the test distributions."""
    outline: Callable[[], Method]
    """The method of this command, on the meta device."""
    trained_outline: Callable[[], Method]
    """The method that made the logits, on the meta device; of a run with other options it is that run's."""

    @classmethod
    def of(cls, cfg: CfgNode, folder: RunFolder, trains: bool) -> "Builders":
        """For a resolved config.

        Args:
            trains: the command trains the run that it evaluates.
        """
        return cls(
            info=lambda: build_info(cfg, None if trains else folder.class_counts()),
            distributions=lambda info, labels: build_distributions(DistributionSettings.of(cfg), info, labels),
            outline=lambda: outline(cfg),
            trained_outline=lambda: outline_of(folder, cfg),
        )
