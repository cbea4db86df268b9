"""Values of options that the builder hands to the modules below it: folders, the data set, the splits."""

from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from tailtune.configs.errors import UserError


@dataclass(frozen=True)
class DataFolders:
    """Where the files of a data set may be. Relative paths start from `data_dir`, or from the working directory."""

    data_dir: str
    """Folder of a data config that was given as a path; empty for a shipped data config."""
    root: str
    """Option `root`."""
    lists: str | None
    """Option `lists`."""

    @classmethod
    def of(cls, cfg: CfgNode) -> "DataFolders":
        """The folders that a config names."""
        return cls(cfg.data_dir, cfg.root, cfg.lists)

    @property
    def url(self) -> str | None:
        """The option `root` if it is an address, such as `https://host/path`; None if it is a folder."""
        return self.root if "://" in self.root else None

    def image_root(self) -> Path:
        """The folder that the paths of images start from.

        Raises:
            UserError: `root` is an address.
        """
        if self.url:
            raise UserError(f"root {self.url}: only `dataset: Shards` reads from an address; give a folder")
        return self._resolve(self.root)

    def for_lists(self) -> list[Path]:
        """The folders in which list files are looked for, in this order: `data_dir`, then `lists` or else `root`."""
        folders = [Path(self.data_dir)] if self.data_dir else []
        if self.lists or not self.url:
            folders.append(self._resolve(self.lists or self.root))
        return folders or [Path()]

    def _resolve(self, name: str) -> Path:
        path = Path(name).expanduser()
        beside_config = Path(self.data_dir) / path
        return beside_config if beside_config.exists() or not path.exists() else path


@dataclass(frozen=True)
class DataSettings:
    """What the entries of `DATASETS` need to know. The fields are named like the options."""

    data: str
    """Name of the data config, for messages."""
    dataset: str
    folders: DataFolders
    num_classes: int | None
    class_counts: str | None
    train_list: str | None
    test_list: str | None
    val_list: str | None
    val_per_class: int
    test_per_class: int
    classnames: str | None
    label_field: str

    @classmethod
    def of(cls, cfg: CfgNode) -> "DataSettings":
        """The options of a config."""
        names = [name for name in cls.__dataclass_fields__ if name != "folders"]
        return cls(folders=DataFolders.of(cfg), **{name: cfg[name] for name in names})

    def list_files(self) -> dict[str, str]:
        """Split → name of its list file; without the splits that have none."""
        files = {"train": self.train_list, "val": self.val_list, "test": self.test_list}
        return {split: file for split, file in files.items() if file}


@dataclass(frozen=True)
class SplitSettings:
    """Which images each split takes. The fields are named like the options."""

    dataset: str
    test_per_class: int
    val_per_class: int
    imb_factor: float | None
    subset_cap: int | None
    subset_seed: int
    on_bad_image: str
    data_fingerprint: str

    @classmethod
    def of(cls, cfg: CfgNode) -> "SplitSettings":
        """The options of a config."""
        return cls(**{name: cfg[name] for name in cls.__dataclass_fields__})
