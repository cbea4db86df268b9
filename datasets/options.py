"""Options of the data: where images and labels are, how they are split, prepared and grouped."""

from dataclasses import dataclass
from functools import partial

from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_float, as_int, as_path, as_str

of_data = partial(option, stages="all")
"""An option of what is trained on, which is the same for every stage of a chain."""


@dataclass(frozen=True)
class DataOptions:
    """Images, labels and splits."""

    dataset: str = of_data("", "Kind of data set, which says how images and labels are stored.", table="DATASETS")
    root: str = option(
        "./data",
        "Folder of the images. For CIFAR it is the folder in which torchvision keeps its archive. For `Shards` it may "
        "be an address such as https://… or s3://….",
        as_path,
        cls="runtime",
        recorded="command",
    )
    lists: str | None = option(
        None,
        "Folder of the list files and of categories.json. None means the folder `root`.",
        as_path,
        cls="runtime",
        recorded="command",
    )
    num_classes: int | None = of_data(
        None, "Number of classes. None means that they are counted in the data.", as_int, least=2, most=100_000
    )
    class_counts: str | None = of_data(
        None, "JSON file with the number of training images of each class, for work without the list files.", as_path
    )
    train_list: str | None = of_data(
        None, "List file of the training images, with one `relative/path label` a line.", as_path
    )
    test_list: str | None = of_data(None, "List file of the test images.", as_path)
    val_list: str | None = of_data(None, "List file of the validation images.", as_path)
    test_per_class: int = of_data(
        0,
        "Number of test images of each class that are held out of the training split, for data without a test split.",
        least=0,
        most=10**6,
        holds_out=True,
    )
    val_per_class: int = of_data(
        0,
        "Number of validation images of each class that are held out of the training split.",
        least=0,
        most=10**6,
        holds_out=True,
    )
    classnames: str | None = of_data(
        None, "Text file with the name of one class a line, or a known set of names such as `imagenet`.", as_str
    )
    label_field: str = of_data(
        "",
        "Field of categories.json that is the label on iNaturalist: `id`, as in the lists, or a taxon such as genus.",
    )
    imb_factor: float | None = of_data(
        None,
        "Images of the smallest class over images of the largest one, to which the training split is cut. None means "
        "that all images are used.",
        as_float,
        least=0.0,
    )
    subset_cap: int | None = option(
        None,
        "Largest number of training images of a class, to which the training split is cut at random. None means that "
        "all images are used. The shot groups are those without this cut.",
        as_int,
        least=1,
        most=10**9,
    )
    subset_seed: int = option(
        0,
        "Random seed of the choice of the images that `subset_cap` keeps.",
        least=0,
        most=2**63 - 1,
        read_with=("subset_cap",),
    )
    on_bad_image: str = option(
        "raise",
        "What happens at an unreadable image: the run stops (raise) or leaves the image out (skip).",
        cls="runtime",
        choices=("raise", "skip"),
    )
    data_fingerprint: str = option(
        "size",
        "What a run compares to know its images again: the sizes of the files or their whole content.",
        cls="runtime",
        choices=("size", "content"),
    )
    augment: str = option(
        "lift", "Random transform of the training images (crop, flip, colours …).", table="AUGMENTS", data_wins=True
    )
    mda_func: str = option(
        "convex",
        "How the smallest area of the crops of `augment mda` grows from 8 % of the image in the first epoch to all of "
        "it in the last; min never grows, max is the whole image from the start.",
        choices=("min", "linear", "convex", "concave", "max"),
        read_with=("augment mda",),
    )
    interpolation: str | None = option(
        None,
        "Interpolation of every resize. None means the one that the backbone was trained with.",
        as_str,
        choices=("bilinear", "bicubic"),
    )
    image_backend: str = of_data(
        "torchvision",
        "Library that decodes and transforms the images: torchvision is fast, pil gives the pixels of the original "
        "codes. Their resized pixels differ by 1 or 2 of 255, and their random draws differ.",
        choices=("torchvision", "pil"),
        earlier="pil",
    )
    cache: str | None = option(
        None,
        "Where the training images are kept after they have been decoded, and resized if no random crop comes first. "
        "None means that every epoch decodes them again.",
        as_str,
        cls="runtime",
        choices=("ram", "disk"),
    )
    cache_dir: str = option(
        "~/.cache/tailtune/images", "Folder of the images that `cache disk` keeps.", as_path, cls="runtime"
    )


@dataclass(frozen=True)
class EvaluatedImageOptions:
    """Which images are evaluated, and in which groups of classes."""

    test_train: bool = option(False, "The training images are evaluated instead of the test images.", cls="test")
    crop_margin: int | None = option(
        None,
        "Pixels by which the short side of a test image is longer than the crop at its centre, without `tte`. None "
        "means a seventh of the crop, or 0 where the object fills the frame.",
        as_int,
        cls="test",
        least=0,
        most=4096,
        read_with=("tte False",),
    )
    max_test_images: int | None = option(
        None,
        "Number of images after which an evaluation stops, for a quick look. None means that it takes all.",
        as_int,
        cls="test",
        stages="all",
        least=1,
        most=10**9,
    )
    many_above: int = option(
        100,
        "Number of training images above which a class counts as many-shot.",
        cls="test",
        logits=False,
        least=0,
        most=10**9,
    )
    few_below: int = option(
        20,
        "Number of training images below which a class counts as few-shot.",
        cls="test",
        logits=False,
        least=0,
        most=10**9,
    )
    group_imb_factor: float | None = option(
        None,
        "Imbalance (see `imb_factor`) whose class counts make the shot groups. None means that of the training images; "
        "LIFT takes 0.01 for every CIFAR-100.",
        as_float,
        cls="test",
        logits=False,
        least=0.0,
    )
