"""Values of the options of test distributions that the builder hands to the modules below it."""

from collections.abc import Mapping
from dataclasses import dataclass

from yacs.config import CfgNode

from tailtune.datasets.data_settings import DataFolders


@dataclass(frozen=True)
class DirichletSettings:
    """The options `dirichlet_…`, without this prefix."""

    trials: int
    """Draws of each component."""
    ratio: float
    """Largest / smallest class of a component before the draw."""
    concentration: float | None
    """Sum of the parameters of the Dirichlet distribution; None: the images of its largest class."""
    least: int
    """Smallest number of images of a class."""
    list_file: str | None
    """List file (option `dirichlet_list`) in whose order images are shuffled; None: the test list."""
    learn: str
    """Images that weights are learnt from, a key of `LEARN` in dirichlet.py."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "DirichletSettings":
        """The options of a config."""
        return cls(
            trials=cfg.dirichlet_trials,
            ratio=cfg.dirichlet_ratio,
            concentration=cfg.dirichlet_concentration,
            least=cfg.dirichlet_least,
            list_file=cfg.dirichlet_list,
            learn=cfg.dirichlet_learn,
        )


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
    dirichlet: DirichletSettings
    needs_distribution: bool
    """`adapt` or `target_prior` is set, which give their results for each test distribution."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "DistributionSettings":
        """The options of a config."""
        made_here = ("folders", "dirichlet", "needs_distribution")
        return cls(
            folders=DataFolders.of(cfg),
            dirichlet=DirichletSettings.of(cfg),
            needs_distribution=cfg.adapt is not None or cfg.target_prior is not None,
            **{name: cfg[name] for name in cls.__dataclass_fields__ if name not in made_here},
        )
