"""Class names that say the same to a text encoder."""

from collections.abc import Sequence


def same_names(names: Sequence[str]) -> str:
    """Which classes have the same name in a sentence, where `_` is a space and CLIP reads no capital letters.

    Args:
        names: C class names.

    Returns:
        A sentence about the first two such classes; empty if all names differ.
    """
    spoken = [" ".join(name.replace("_", " ").lower().split()) for name in names]
    first: dict[str, int] = {}
    repeated = [label for label, name in enumerate(spoken) if first.setdefault(name, label) != label]
    if not repeated:
        return ""
    label = repeated[0]
    other = first[spoken[label]]
    more = f" (and {len(repeated) - 1} more)" if len(repeated) > 1 else ""
    return (
        f"classes {other} '{names[other]}' and {label} '{names[label]}'{more} have the same name, so a text encoder "
        "cannot tell them apart: give each class a name of its own"
    )
