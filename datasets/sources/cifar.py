"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), read by torchvision in the order of the official files."""

from pathlib import Path

from tailtune.configs.errors import UserError
from tailtune.datasets.sources.image_sources import ArraySource

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Pixel statistics of CIFAR-10, which the long-tail literature uses for CIFAR-100, too."""

TRAIN_IMAGES = 50_000

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
