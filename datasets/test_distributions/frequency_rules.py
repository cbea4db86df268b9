"""Names of test distributions, and the rules that give their class frequencies.

SADE (Zhang et al. 2022, section 5): `forward<r>` is long-tailed in the order of the training classes, and its largest
class is r times its smallest. `backward<r>` has the reverse order. `uniform` has the same number of images of every
class.
"""

import re
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from tailtune.configs.errors import UserError, printable
from tailtune.datasets.long_tail import longtail_counts
from tailtune.datasets.test_distributions.dirichlet import DIRICHLET, check_dirichlet, dirichlet_names
from tailtune.datasets.test_distributions.settings import DistributionSettings

LongTail = Callable[[float, int, float], list[int]]
"""Images of the largest class, number of classes C, smallest / largest class → images per class [C]."""
FrequencyRule = Callable[[float, int], list[int]]
"""Images of the largest class, number of classes C → images per class [C], in the order of `class_order`."""


def _reversed_longtail_counts(largest: float, num_classes: int, factor: float) -> list[int]:
    return longtail_counts(largest, num_classes, factor)[::-1]


LONG_TAILS: Mapping[str, LongTail] = MappingProxyType(
    {"forward": longtail_counts, "backward": _reversed_longtail_counts}
)
UNIFORM, ALL = "uniform", "all"
CHOICES = "all, uniform, forward<r> or backward<r> with a whole number r from 1, such as backward50; or dirichlet"


def frequency_rule(name: str, factors: Mapping[str, float] | None = None, key: str = "test_dists") -> FrequencyRule:
    """The rule of a test distribution.

    Args:
        name: `uniform`, `forward<r>` or `backward<r>`.
        factors: the option `shift_factors`: name → smallest / largest class, where it is not 1/r.
        key: the option that contains the name, for messages.

    Raises:
        UserError: another name.
    """
    if name == UNIFORM:
        return partial(longtail_counts, imb_factor=1.0)
    match = re.fullmatch(r"([a-z]+)([1-9]\d{0,8})", name)
    if match is None or match[1] not in LONG_TAILS:
        raise UserError(f"{key}: unknown distribution '{printable(name)}'; choices: {CHOICES}")
    factor, long_tail = (factors or {}).get(name, 1 / int(match[2])), LONG_TAILS[match[1]]
    return lambda largest, num_classes: long_tail(largest, num_classes, factor)


def distribution_names(options: DistributionSettings) -> tuple[str, ...]:
    """The test distributions that `test_dists` asks for, with `all` and `dirichlet` replaced by single names.

    Args:
        options: the options; no file is read.

    Returns:
        Different names in the order of the option.

    Raises:
        UserError: an unknown name, or options of test distributions that do not fit each other or the data.
    """
    names: list[str] = []
    for name in options.test_dists or ():
        if name.startswith(DIRICHLET):
            names += dirichlet_names(name, options.dirichlet.trials)
            continue
        names += _all_names(options.shift_ratios) if name == ALL else [name]
        frequency_rule(names[-1])
    check_dirichlet(options.dirichlet, options.may_have_lists)
    for name, factor in (options.shift_factors or {}).items():
        frequency_rule(name, key="shift_factors")
        if not 0 < factor <= 1:
            raise UserError(
                f"shift_factors: {name} {factor:g} must be above 0 and at most 1 (smallest / largest class)"
            )
    if options.shift_files and (not options.may_have_lists or "{name}" not in options.shift_files):
        needs = "it needs dataset ImageList, or Shards with test_list, and {name} in its value"
        raise UserError(f"shift_files {options.shift_files}: {needs}; or set shift_files none")
    if names and options.shift_order == "published" and options.label_field not in ("", "id", "name"):
        raise UserError(
            f"shift_order published is an order of species, but label_field is {options.label_field}: set shift_order "
            "counts"
        )
    return tuple(dict.fromkeys(names))


def _all_names(ratios: list[int]) -> list[str]:
    return [*(f"forward{ratio}" for ratio in reversed(ratios)), UNIFORM, *(f"backward{ratio}" for ratio in ratios)]
