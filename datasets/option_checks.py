"""Checks of options that describe a data set."""

from tailtune.configs.errors import UserError
from tailtune.datasets.data_settings import DataSettings


def check_built_in(options: DataSettings, num_classes: int) -> None:
    """Refuse options that would change a data set with fixed splits and names.

    Args:
        options: the options.
        num_classes: number of classes of the data.

    Raises:
        UserError: an option does not apply to these data.
    """
    check_num_classes(options, num_classes)
    refuse(
        options, "train_list", "test_list", "val_list", "label_field", "class_counts", "classnames", "test_per_class"
    )


def check_num_classes(options: DataSettings, num_classes: int) -> None:
    """Check the option `num_classes`.

    Args:
        options: the options.
        num_classes: number of classes of the data.

    Raises:
        UserError: the option has another value.
    """
    if options.num_classes not in (None, num_classes):
        given = f"num_classes {options.num_classes}"
        raise UserError(f"{given}: data '{options.data}' have {num_classes} classes; leave num_classes out")


def check_test(options: DataSettings, has_test: bool) -> None:
    """Check that there is one test split, either its own or held-out images.

    Args:
        options: the options.
        has_test: whether the data have a test split of their own.

    Raises:
        UserError: there are two test splits, or none.
    """
    if has_test and options.test_per_class:
        raise UserError(
            f"test_per_class {options.test_per_class}: the data have a test split already; set test_per_class 0"
        )
    if not has_test and not options.test_per_class:
        remedies = {"ImageList": "set `test_list`", "Shards": "write shards of the test images, too"}
        remedy = remedies.get(options.dataset) or f"add {options.folders.image_root()}/test/<class>/…"
        raise UserError(f"no test split: {remedy}, or set `test_per_class` to hold training images out")


def refuse(options: DataSettings, *keys: str) -> None:
    """Refuse options that do not apply to a data set.

    Args:
        options: the options.
        keys: names of options.

    Raises:
        UserError: one of them is set.
    """
    values = vars(options)
    for key in keys:
        if values[key]:
            raise UserError(f"`{key}` does not apply to dataset {options.dataset}; leave it out")


def check_names(options: DataSettings, names: tuple[str, ...], num_classes: int) -> None:
    """Check that the option `classnames` gives one name for each class.

    Args:
        options: the options.
        names: the names.
        num_classes: number of classes of the data.

    Raises:
        UserError: there are more or fewer.
    """
    if options.classnames and options.num_classes is None and len(names) != num_classes:
        raise UserError(
            f"classnames {options.classnames}: {len(names)} names for {num_classes} classes; give one line per class"
        )
