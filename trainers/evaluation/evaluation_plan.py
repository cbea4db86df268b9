"""The settings of an evaluation, and functions that build data and models when only stored logits are available."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from tailtune.configs import CfgNode, schema_of, values_of
from tailtune.configs.key import TEST
from tailtune.configs.option import options_from
from tailtune.datasets.build_data import build_info
from tailtune.datasets.data_bundle import DataInfo, TestDistribution
from tailtune.datasets.test_distributions.build import build_distributions
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.trainers.evaluation.adaptation_table import ADAPTS
from tailtune.trainers.evaluation.ensembles import Assumed, ensemble_named
from tailtune.trainers.evaluation.target_prior import TargetPlan
from tailtune.trainers.evaluation.tta import warnings_of
from tailtune.trainers.methods import Method
from tailtune.trainers.report.subject import EvaluatedImages
from tailtune.trainers.runs.load_run import outline
from tailtune.trainers.runs.run_folder import FACTS, RunFolder
from tailtune.trainers.storage.manifest import read_json

OF_TEST_IMAGES = ("test_dists", "adapt", "target_prior")
"""Options that apply to test images only; they are ignored when training images are evaluated."""


@dataclass(frozen=True)
class EvaluationPlan:
    """The settings of an evaluation, read from the config."""

    options: dict[str, Any]
    """All options of evaluations, as metrics.json records them."""
    options_of_logits: dict[str, Any]
    """The subset of `options` that changes the logits."""
    reads_train: bool
    """The logits also depend on the training images, whatever images are evaluated."""
    asked: tuple[str, ...]
    """The options of `OF_TEST_IMAGES` that are set."""
    test_train: bool
    adapt: str | None
    adapt_options: Any
    """Options of the adaptation; None without an adaptation."""
    target: TargetPlan | None
    tte_mode: str | None
    """Entry of TEST_TIME; None: one view of each image."""
    test_prec: str
    resolution: int
    batch_size: int
    num_workers: int | None
    max_images: int | None
    tensorboard: bool
    """Whether the results are also written as curves for TensorBoard."""
    report: str
    """What is written beside the result: `none`, `html` or `all`."""
    warnings: tuple[str, ...]
    """Warnings about the options; they are shown before anything is computed."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "EvaluationPlan":
        """Read the settings from a resolved config."""
        options, schema = values_of(cfg, TEST), schema_of(cfg)
        warnings = warnings_of(cfg.tte_mode, cfg.resolution, cfg.expand, cfg.augment) if cfg.tte else ()
        return cls(
            options=options,
            options_of_logits={key: value for key, value in options.items() if schema[key].logits},
            reads_train=ensemble_named(cfg.ensemble).reads_train,
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
            tensorboard="tensorboard" in cfg.trackers,
            report=cfg.report,
            warnings=tuple(warnings),
        )

    @property
    def adapts(self) -> bool:
        """Whether predictions are adapted to the test images."""
        return self.adapt is not None and not self.test_train

    @property
    def needs_val(self) -> bool:
        """Whether the logits of the validation images are needed, not only their metrics."""
        return self.target is not None and self.target.reads_val and not self.test_train


@dataclass(frozen=True)
class Builders:
    """Functions that build from the config what an evaluation needs when only stored logits are available."""

    info: Callable[[], DataInfo]
    """→ properties of the data on which the evaluated run was trained."""
    distributions: Callable[[DataInfo, Tensor, str | None], tuple[TestDistribution, ...]]
    """(properties of the data, labels of the test images [N], their fingerprint) → the test distributions."""
    outline: Callable[[], Method]
    """→ the method of this command, on the meta device."""
    assumed: Callable[[], Assumed]
    """→ what the logits assume. If a run with other options is evaluated, its own options count."""
    images: Callable[[str, str | None], EvaluatedImages]
    """(`test` or `train`, fingerprint) → these images, as far as they are there."""

    @classmethod
    def of(cls, cfg: CfgNode, folder: RunFolder, trains: bool) -> "Builders":
        """The functions for a resolved config.

        Args:
            cfg: the resolved config.
            folder: folder of the run that is evaluated.
            trains: whether the command trains the run that it evaluates.
        """

        @cache  # it asks the file system for each image
        def images(split: str, fingerprint: str | None) -> EvaluatedImages:
            return EvaluatedImages.of(cfg, folder.kept(), split, fingerprint)

        def distributions(info: DataInfo, labels: Tensor, fingerprint: str | None) -> tuple[TestDistribution, ...]:
            options = DistributionSettings.of(cfg)
            return build_distributions(options, info, labels, lambda: images("test", fingerprint).indices)

        return cls(
            info=lambda: build_info(cfg, None if trains else folder.class_counts()),
            distributions=distributions,
            outline=lambda: outline(cfg),
            assumed=lambda: Assumed.of(folder, cfg),
            images=images,
        )


def with_stored_names(info: DataInfo, folder: RunFolder) -> DataInfo:
    """The facts with the class names of the evaluated checkpoint: without image lists, `info` may hold placeholders."""
    facts = folder.source / FACTS
    if folder.foreign is not None or not facts.exists():
        return info
    return replace(info, class_names=tuple(read_json(facts)["class_names"]))
