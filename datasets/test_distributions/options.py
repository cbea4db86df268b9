"""Options of the label distributions that a model is evaluated on."""

from dataclasses import dataclass
from functools import partial

from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_factors, as_float, as_int, as_ints, as_names, as_path

of_test_sets = partial(option, cls="test", logits=False)
"""An option that chooses among images whose logits are known."""
OF_A_DISTRIBUTION = ("test_dists", "target_prior")
"""Options that name a distribution such as forward50."""


@dataclass(frozen=True)
class ShiftOptions:
    """Test sets of other class frequencies."""

    test_dists: list[str] | None = of_test_sets(
        None,
        "Label distributions to evaluate on: names such as uniform, forward50 or backward50; `all` for those of the "
        "data; `dirichlet` for randomly drawn ones.",
        as_names,
    )
    shift_ratios: list[int] = of_test_sets(
        [2, 5, 10, 25, 50],
        "Ratios of the largest to the smallest class that test_dists all stands for.",
        as_ints,
        least=1,
        most=10**6,
        read_with=("test_dists all",),
    )
    shift_order: str = of_test_sets(
        "counts",
        "Order of the classes from frequent to rare: by their number of training images (counts), as in the published "
        "lists (published), or by their label (label).",
        choices=("counts", "published", "label"),
        read_with=OF_A_DISTRIBUTION,
    )
    shift_max: int | None = of_test_sets(
        None,
        "Number of images of the largest class of a distribution. None means as many as the smallest class of the test "
        "split has.",
        as_int,
        least=1,
        most=10**9,
        read_with=OF_A_DISTRIBUTION,
    )
    shift_factors: dict[str, float] | None = of_test_sets(
        None,
        "Smallest over largest class of a distribution, where it is not 1/ratio, such as {forward3: 0.3333}.",
        as_factors,
        read_with=OF_A_DISTRIBUTION,
    )
    shift_files: str | None = of_test_sets(
        None,
        "Path of the published list of a distribution, with {name} in it. None means that its images are drawn.",
        as_path,
        read_with=OF_A_DISTRIBUTION,
    )
    shift_seed: int = of_test_sets(
        0,
        "Random seed of the draw of a distribution's images.",
        least=0,
        most=2**63 - 1,
        read_with=OF_A_DISTRIBUTION,
    )


@dataclass(frozen=True)
class DirichletOptions:
    """Test sets whose class frequencies are drawn from a Dirichlet distribution; the options are `dirichlet_…`."""

    trials: int = of_test_sets(3, "Number of draws of each part of test_dists dirichlet.", least=1, most=100)
    ratio: float = of_test_sets(
        100.0, "Ratio of the largest to the smallest class in the mean of the Dirichlet draws.", least=1.0, most=1e6
    )
    concentration: float | None = of_test_sets(
        None,
        "Sum Σα of the Dirichlet parameters; a larger one varies less. None means the number of images of the largest "
        "class.",
        as_float,
        most=1e9,
    )
    least: int = of_test_sets(1, "Smallest number of images of a class in a Dirichlet draw.", least=0, most=10**6)
    list: str | None = of_test_sets(
        None, "List file in whose order the Dirichlet draws take images. None means the file `test_list`.", as_path
    )
    learn: str = of_test_sets(
        "independent",
        "Images that `adapt` learns from in a Dirichlet draw: another draw (independent), the evaluated ones (equal), "
        "or one half of each class, of which the other half is evaluated (disjoint).",
        choices=("independent", "equal", "disjoint"),
    )
