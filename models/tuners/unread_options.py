"""`refuse_unread_tuner_options`: options on the command line that only tuners read which are off."""

from collections import defaultdict
from functools import cache

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError
from tailtune.configs.option import key_names
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.text_tuners import TEXT_TUNERS, TextTunerOptions


def refuse_unread_tuner_options(cfg: CfgNode) -> None:
    """Refuse what would change nothing. A model config may hold options of a tuner that the command line turns off.

    Args:
        cfg: a config.

    Raises:
        UserError: names the first such option.
    """
    for key in cfg.given or ():
        readers = _readers().get(key, [])
        if readers and cfg[key] is not None and not any(cfg[name] for name in readers):
            shown = ", ".join(readers[:3]) + (" …" if len(readers) > 3 else "")
            raise UserError(
                f"{key} {cfg[key]} does nothing: no tuner that reads it is on ({shown}); add `{readers[0]} True`, or "
                f"leave {key} out"
            )


@cache
def _readers() -> dict[str, list[str]]:
    """Name of an option → the tuners that read it."""
    readers: dict[str, list[str]] = defaultdict(list)
    for name, tuner in TUNERS.items():
        for key in key_names(type(tuner.options), name, separator="_").values():
            readers[key].append(name)
    sizes = key_names(TextTunerOptions)
    for name, of_images in TEXT_TUNERS.items():
        options = TUNERS[of_images].options
        for field, key in key_names(type(options), of_images, separator="_").items():
            if field == "layers" or (field == "ratio" and of_images != "mask"):
                continue  # in the text tower only text_tuner_args sets them
            # The text tower has sizes of its own, and shares the other options with the image tower.
            readers[sizes.get(field, key)].append(name)
    return readers
