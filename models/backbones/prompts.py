"""PROMPTS: class name → the sentences whose text features stand for the class."""

from collections.abc import Sequence

from open_clip import OPENAI_IMAGENET_TEMPLATES

from tailtune.configs.errors import UserError, unknown

Sentences = Sequence[Sequence[str]]
"""One or more sentences of each class, [C] lists of any length."""

DESCRIPTOR = "descriptor"

PROMPTS: dict[str, tuple[str, ...]] = {
    "classname": ("{}",),
    "default": ("a photo of a {}.",),
    "ensemble": tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES),
    DESCRIPTOR: (),  # its sentences come with the data
}
"""Name → templates, {} being the place of the class name."""


def templates_of(prompt: str) -> tuple[str, ...]:
    """The templates of an entry of PROMPTS, or the user's own, `|` between several.

    Raises:
        UserError: neither an entry nor sentences with {}.
    """
    if prompt in PROMPTS:
        return PROMPTS[prompt]
    own = tuple(part.strip() for part in prompt.split("|"))
    if not all("{}" in part for part in own):
        raise UserError(f"{unknown('prompt', prompt, PROMPTS)}, or a sentence with {{}} in the class name's place")
    return own


def fill(class_names: Sequence[str], prompt: str) -> list[list[str]]:
    """The sentences of each class; underscores of a class name read as spaces, hyphens stay."""
    templates = templates_of(prompt)
    return [[template.replace("{}", name.replace("_", " ")) for template in templates] for name in class_names]
