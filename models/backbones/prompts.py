"""PROMPTS: templates that turn a class name into the sentences whose text features stand for the class."""

from collections.abc import Callable, Sequence

from tailtune.configs.errors import UserError, unknown
from tailtune.models.backbones.open_clip_files import imagenet_templates

Sentences = Sequence[Sequence[str]]
"""The sentences of C classes; each class has one or more."""

DESCRIPTOR = "descriptor"

PROMPTS: dict[str, Callable[[], tuple[str, ...]]] = {
    "classname": lambda: ("{}",),
    "default": lambda: ("a photo of a {}.",),
    "ensemble": imagenet_templates,
    DESCRIPTOR: lambda: (),  # its sentences come from the option `descriptors`
}
"""Name → function that returns the templates, in which {} stands for the class name."""


def templates_of(prompt: str) -> tuple[str, ...]:
    """The templates that the option `prompt` means.

    Args:
        prompt: an entry of PROMPTS, or templates of the user's own with `|` between them.

    Raises:
        UserError: it is no entry, and not every part contains {}.
    """
    if prompt in PROMPTS:
        return PROMPTS[prompt]()
    templates = tuple(template.strip() for template in prompt.split("|"))
    if not all("{}" in template for template in templates):
        raise UserError(f"{unknown('prompt', prompt, PROMPTS)}, or a sentence with {{}} in the class name's place")
    return templates


def fill(class_names: Sequence[str], prompt: str) -> list[list[str]]:
    """The sentences of each class.

    Args:
        class_names: C names; an underscore is read as a space.
        prompt: an entry of PROMPTS, or templates of the user's own.

    Returns:
        C lists with one sentence for each template.
    """
    templates = templates_of(prompt)
    return [[template.replace("{}", name.replace("_", " ")) for template in templates] for name in class_names]
