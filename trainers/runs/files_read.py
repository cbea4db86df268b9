"""The files, besides images and checkpoint, on which a result depends, and their content as digests."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from tailtune.configs import CfgNode
from tailtune.datasets.data_settings import DataFolders
from tailtune.datasets.sources.image_list import first_file
from tailtune.datasets.test_distributions.frequency_rules import distribution_names
from tailtune.datasets.test_distributions.settings import DistributionSettings


def files_of_evaluation(cfg: CfgNode) -> dict[str, str]:
    """The files of test distributions and target priors: name → 16 digits of the SHA-256; missing ones are left out."""
    names = [name for name in (cfg.target_prior, cfg.dirichlet_list) if name and "." in name]
    if cfg.shift_files:
        shifts = distribution_names(DistributionSettings.of(cfg))
        names += [cfg.shift_files.replace("{name}", shift) for shift in shifts]
    return _digests(names, [Path(), *DataFolders.of(cfg).for_lists()])


def digest_of_texts(cfg: CfgNode) -> str:
    """A digest of the files of class names and descriptions, if a prediction is computed from them; else empty.

    The zero-shot classifier is made of texts, and is a part of ensembles. A trained classifier is in the checkpoint.
    """
    if not cfg.zero_shot and cfg.ensemble is None:
        return ""
    names = [name for name in (cfg.classnames, cfg.descriptors) if name and "." in name]
    digests = _digests(names, DataFolders.of(cfg).for_lists())
    return hashlib.sha256("".join(digests.values()).encode()).hexdigest()[:16] if digests else ""


def _digests(names: Iterable[str], folders: Sequence[Path]) -> dict[str, str]:
    paths = {name: first_file(str(Path(name).expanduser()), folders) for name in names}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in paths.items() if path}
