"""What an option is: the entry of a schema."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from tailtune.configs.value_parsers import as_bool, as_float, as_int, as_str

Class = Literal["train", "test", "runtime"]


@dataclass(frozen=True)
class Key:
    parse: Callable[[Any], Any]
    default: Any
    cls: Class
    doc: str
    choices: tuple[str, ...] = ()
    least: float | None = None
    """The smallest value allowed."""
    most: float | None = None
    """The largest."""
    optional: bool = field(default=False)
    """None is a value although the default is another one."""
    internal: bool = False
    """Set by the loader, never by YAML or command line."""
    logits: bool = True
    """For `test` keys: the value changes the logits, not only what is computed from them."""
    data_wins: bool = False
    """A data config's value beats the model config's (digits must not be flipped, whatever the model prefers)."""

    def beyond(self, value: Any) -> str | None:
        """What a typed value had to be, `at most 64, not 65`, also each number of a list or mapping; None: it is."""
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        for number in (each for each in inside if isinstance(each, (int, float))):
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


def option_keys(method: str, options: type) -> dict[str, Key]:
    """The keys of a method's own `Options` dataclass: `ride.diversity`, typed by the field's default.

    `metadata` of a field is what a key says beside its type and default: `doc`, and `choices`, `least` and `most` where
    there are some. A changed option is another trained model.
    """
    parsers: dict[type, Callable[[Any], Any]] = {bool: as_bool, int: as_int, float: as_float, str: as_str}
    return {
        f"{method}.{each.name}": Key(parsers[type(each.default)], each.default, "train", **each.metadata)
        for each in fields(options)
    }
