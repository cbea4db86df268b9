"""What an option is: the entry of the schema."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Class = Literal["train", "test", "runtime"]
Recorded = Literal["", "config", "command"]
Holder = Literal["", "encoder", "head"]


@dataclass(frozen=True)
class Key:
    """Everything that is known of an option: what it takes, what it means and what it may do."""

    parse: Callable[[Any], Any]
    """Text or a YAML value → the typed value; raises ValueError with what was expected."""
    default: Any
    doc: str
    """A sentence that stands alone, with the unit of a number."""
    cls: Class = "train"
    """What a changed value makes: another trained model (`train`), another evaluation of the same model (`test`), or
    the same numbers in another way (`runtime`)."""
    choices: tuple[str, ...] = ()
    table: str = ""
    """Name of the table whose entries are values, such as LOSSES. The code that reads the option looks them up."""
    least: float | None = None
    """The smallest value allowed, also for each number of a list or mapping."""
    most: float | None = None
    """The largest value allowed."""
    optional: bool = False
    """None is a value although the default is another one."""
    internal: bool = False
    """The loader sets it; neither a YAML nor the command line may."""
    logits: bool = True
    """The value changes the logits. False for `test` options that only change what is computed from stored logits."""
    data_wins: bool = False
    """A data config's value beats the model config's: digits must not be flipped, whatever the model prefers."""
    stages: Literal["all", "last"] | None = None
    """The stages of a chain that the command line reaches. None: all for `runtime` options, the last for others."""
    recorded: Recorded = ""
    """For `runtime` options: where the value is written down, so that a run can be told and repeated elsewhere. Either
    in the run's config.yaml, or there and in the command that an export names."""
    held_with: Holder = ""
    """The part of the model whose later stages need the same value, because no tensor of that part tells it."""
    zero_shot: bool = True
    """The zero-shot classifier has it too. False for what a run adds to its backbone, and for how it trains."""
    holds_out: bool = False
    """The value takes images out of the training split."""
    method: str = ""
    """The method that owns it. The value is then part of the config hash exactly when that method is in use."""

    @property
    def every_stage(self) -> bool:
        """Whether the command line sets it for every stage of a chain."""
        return self.cls == RUNTIME if self.stages is None else self.stages == "all"

    def beyond(self, value: Any) -> str | None:
        """What a typed value should have been, such as `at most 64, not 65`; None where it is within the bounds."""
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for number in (item for item in inside if isinstance(item, (int, float))):
            if self.least is not None and number < self.least:
                return f"at least {plain(self.least)}, not {plain(number)}"
            if self.most is not None and number > self.most:
                return f"at most {plain(self.most)}, not {plain(number)}"
        return None


def plain(number: float) -> str:
    """A number as a user writes it: whole ones in full."""
    return str(number) if isinstance(number, int) else f"{number:g}"


TRAIN: Class = "train"
TEST: Class = "test"
RUNTIME: Class = "runtime"
