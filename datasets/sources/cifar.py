"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read by torchvision in the order of the official files."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_sources import ArraySource

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Pixel statistics of CIFAR-10, which the long-tail literature uses for CIFAR-100, too."""

TRAIN_IMAGES, TEST_IMAGES = 50_000, 10_000

_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""
# torchvision reads the names from the archive, but they are needed before it is downloaded.
CLASS_NAMES = {"CIFAR10": tuple(_CIFAR10.split()), "CIFAR100": tuple(_CIFAR100.split())}


@dataclass(frozen=True)
class CifarArchive:
    """An archive of the data set and the files in it. torchvision checks the same checksums."""

    url: str
    md5: str
    folder: str
    """The folder that the archive unpacks to."""
    files: Mapping[str, str]
    """Name of a file in this folder → its MD5."""


ARCHIVES: Mapping[str, CifarArchive] = MappingProxyType(
    {
        "CIFAR10": CifarArchive(
            "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            "c58f30108f718f92721af3b95e74349a",
            "cifar-10-batches-py",
            MappingProxyType(
                {
                    "data_batch_1": "c99cafc152244af753f735de768cd75f",
                    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                    "data_batch_4": "634d18415352ddfa80567beed471001a",
                    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                    "test_batch": "40351d587109b95175f43aff81a1287e",
                    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
                }
            ),
        ),
        "CIFAR100": CifarArchive(
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            "eb9058c3a382ffc7106e4002c42a8d85",
            "cifar-100-python",
            MappingProxyType(
                {
                    "train": "16019d7e3df5f24257cddd939b257f8d",
                    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
                    "meta": "7973b15100ade9c7d40fb424638fde48",
                }
            ),
        ),
    }
)
"""Name of the data set → its archive."""


def load_cifar(name: str, root: Path) -> tuple[ArraySource, ArraySource]:
    """The official training and test images. A missing archive is downloaded; torchvision checks its checksum.

    Args:
        name: CIFAR10 or CIFAR100.
        root: folder of the archive.

    Returns:
        Training and test images.

    Raises:
        UserError: the archive is missing and cannot be downloaded.
    """
    import torchvision  # takes a second

    dataset = {"CIFAR10": torchvision.datasets.CIFAR10, "CIFAR100": torchvision.datasets.CIFAR100}[name]
    try:
        train, test = dataset(root, train=True, download=True), dataset(root, train=False)
    except (OSError, RuntimeError) as error:  # URLError, HTTPError and a read-only folder are OSErrors
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} is not in {root.absolute()} and cannot be downloaded ({reason}): "
            f"download {dataset.url} to this folder, or set `root` to the folder that holds it"
        ) from error
    return (
        ArraySource(train.data, train.targets, f"{name} train"),
        ArraySource(test.data, test.targets, f"{name} test"),
    )
