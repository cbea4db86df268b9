"""Values of the options of test distributions that the builder hands to the modules below it."""

from collections.abc import Mapping
from dataclasses import dataclass

from yacs.config import CfgNode

from tailtune.configs.option import options_from
from tailtune.datasets.data_settings import DataFolders
from tailtune.datasets.test_distributions.options import DirichletOptions


@dataclass(frozen=True)
class DistributionSettings:
    """Which test distributions are evaluated, and how their images are chosen. The fields are named like the options.

    `shift_…` is the prefix of options about test distributions.
    """

    dataset: str
    folders: DataFolders
    label_field: str
    test_list: str | None
    val_per_class: int
    max_test_images: int | None
    test_dists: list[str] | None
    shift_ratios: list[int]
    shift_order: str
    shift_max: int | None
    shift_factors: Mapping[str, float] | None
    shift_files: str | None
    shift_seed: int
    dirichlet: DirichletOptions
    needs_distribution: bool
    """`adapt` or `target_prior` is set, which give their results for each test distribution."""

    @property
    def may_have_lists(self) -> bool:
        """Whether the test images may be those of a list, so that published lists of subsets can be used."""
        return self.dataset == "ImageList" or (self.dataset == "Shards" and self.test_list is not None)

    @classmethod
    def of(cls, cfg: CfgNode) -> "DistributionSettings":
        """The options of a config."""
        made_here = ("folders", "dirichlet", "needs_distribution")
        return cls(
            folders=DataFolders.of(cfg),
            dirichlet=options_from(DirichletOptions, cfg, "dirichlet", separator="_"),
            needs_distribution=cfg.adapt is not None or cfg.target_prior is not None,
            **{name: cfg[name] for name in cls.__dataclass_fields__ if name not in made_here},
        )
