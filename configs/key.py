"""Defines `Key`, the description of one option in the schema."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Class = Literal["train", "test", "runtime"]
Recorded = Literal["", "config", "command"]
Holder = Literal["", "encoder", "head", "texts"]


@dataclass(frozen=True)
class Key:
    """The properties of an option: its allowed values, its meaning and its effects."""

    parse: Callable[[Any], Any]
    """Converts text or a YAML value to the typed value. Raises ValueError with a description of the expected value."""
    default: Any
    doc: str
    """One sentence about the meaning of the option, with the unit of a number."""
    cls: Class = "train"
    """The effect of a changed value: another trained model (`train`), another evaluation of the same model (`test`), or
    the same results computed in another way (`runtime`)."""
    choices: tuple[str, ...] = ()
    table: str = ""
    """Name of the table whose entries are the allowed values, such as LOSSES. The schema does not check the value; the
    code that reads the option does."""
    least: float | None = None
    """The smallest allowed value, also for each number in a list or mapping."""
    most: float | None = None
    """The largest allowed value, also for each number in a list or mapping."""
    earlier: Any = None
    """What runs did before the option existed, where this is not the default. None: the default."""
    optional: bool = False
    """None is allowed although it is not the default."""
    internal: bool = False
    """Only the loader may set the option; a YAML and the command line may not."""
    logits: bool = True
    """The value changes the logits. False for `test` options that only change computations with stored logits."""
    data_wins: bool = False
    """The data config's value overrides the model config's. For example, digits must not be flipped for any model."""
    stages: Literal["all", "last"] | None = None
    """The stages for which the command line sets the option. None: all for `runtime` options, the last for others."""
    recorded: Recorded = ""
    """For `runtime` options: where the value is recorded, so that the run can be identified and repeated elsewhere.
    `config`: in the run's config.yaml. `command`: also in the command that an export contains."""
    held_with: Holder = ""
    """The part of the model that the option changes without a change of its tensors; `texts` are the text features of a
    classifier. A later stage that continues this part needs the same value, because the checkpoint does not show it."""
    zero_shot: bool = True
    """The option also applies to the zero-shot classifier. False for additions to the backbone and training options."""
    read_with: tuple[str, ...] = ()
    """Options of which one must be set so that anything reads this one: `option`, which then differs from its default,
    or `option value`, where * in a value stands for any text. Empty: nothing has to be set."""
    holds_out: bool = False
    """The option removes images from the training split."""
    method: str = ""
    """The method that owns the option. The value is part of the config hash only if that method is in use."""

    @property
    def every_stage(self) -> bool:
        """Whether the command line sets the option for every stage of a chain."""
        return self.cls == RUNTIME if self.stages is None else self.stages == "all"

    def beyond(self, value: Any) -> str | None:
        """A description of the allowed values, such as `at most 64, not 65`; None if the value is within the bounds."""
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for number in (item for item in inside if isinstance(item, (int, float))):
            if self.least is not None and number < self.least:
                return f"at least {plain(self.least)}, not {plain(number)}"
            if self.most is not None and number > self.most:
                return f"at most {plain(self.most)}, not {plain(number)}"
        return None


def plain(number: float) -> str:
    """A number as text. Whole numbers are written with all digits."""
    return str(number) if isinstance(number, int) else f"{number:g}"


TRAIN: Class = "train"
TEST: Class = "test"
RUNTIME: Class = "runtime"
