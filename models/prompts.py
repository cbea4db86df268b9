"""PROMPTS: class name → the sentences whose text features stand for the class."""

from collections.abc import Callable, Sequence

from open_clip import OPENAI_IMAGENET_TEMPLATES


def fill(name: str, templates: Sequence[Callable[[str], str]]) -> list[str]:
    """One sentence a template; underscores of a class name read as spaces, hyphens stay."""
    return [template(name.replace("_", " ")) for template in templates]


PROMPTS: dict[str, Sequence[Callable[[str], str]]] = {
    "classname": ("{}".format,),
    "default": ("a photo of a {}.".format,),
    "ensemble": tuple(OPENAI_IMAGENET_TEMPLATES),
}
