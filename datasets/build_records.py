"""`build_records` lists the files of each split at present. It imports no torch, so a finished run is shown quickly."""

from yacs.config import CfgNode

from tailtune.configs.errors import lookup
from tailtune.datasets.data_settings import DataSettings, SplitSettings
from tailtune.datasets.splits.choose_splits import choose_splits, make_records
from tailtune.datasets.splits.split_records import ChosenSplits, Record, StoredSplits
from tailtune.datasets.splits.unreadable_images import drop_from_train, inspect_splits
from tailtune.datasets.table import DATASETS


def build_records(cfg: CfgNode, stored: StoredSplits | None = None) -> tuple[dict[str, Record], ChosenSplits | None]:
    """The files that each split is made of at present, with their sizes. No file is opened, nothing is downloaded.

    Args:
        cfg: the config of a stage.
        stored: the splits of the run that is continued or evaluated.

    Returns:
        Name of a split → its record; and the splits, or None for built-in data.

    Raises:
        MissingData: a list or folder does not exist.
        UserError: as `build_info`.
    """
    entry, options = lookup(DATASETS, cfg.dataset, "dataset"), SplitSettings.of(cfg)
    if entry.built_in:
        return {name: Record.built_in(cfg.dataset) for name in ("train", "test", "val")}, None
    chosen, _ = inspect_splits(choose_splits(options, entry.load(DataSettings.of(cfg)), stored), read_headers=False)
    chosen = drop_from_train(chosen, stored.unreadable if stored else ())
    return make_records(options, chosen, stored), chosen
