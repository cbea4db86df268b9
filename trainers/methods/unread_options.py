"""`refuse_unread_objective_options`: options that only other losses, classifiers or methods than the chosen read."""

from collections import defaultdict
from collections.abc import Mapping

from tailtune.configs import CfgNode, schema_of
from tailtune.configs.errors import UserError
from tailtune.configs.option import key_names, value_of
from tailtune.configs.run_names import methods_in_use
from tailtune.models.heads.classifiers import HEADS
from tailtune.trainers.losses import LOSSES


def refuse_unread_objective_options(cfg: CfgNode, methods: Mapping[str, type]) -> None:
    """Refuse what would change nothing. A model config may hold options of a loss that the command line replaces.

    Args:
        cfg: a config.
        methods: name of a method → dataclass of its options.

    Raises:
        UserError: names the first such option.
    """
    tables: dict[str, Mapping[str, type]] = {
        "loss_type": {name: type(loss.options) for name, loss in LOSSES.items() if loss.options is not None},
        "classifier": {name: head.Options for name, head in HEADS.items()},
        "method": methods,
    }
    readers: dict[str, list[tuple[str, str]]] = defaultdict(list)  # option → entries that read it
    for choice, table in tables.items():
        for name, options in table.items():
            for key in key_names(options, name).values():
                readers[key].append((choice, name))
    chosen = {("loss_type", cfg.loss_type), ("classifier", cfg.classifier)}
    chosen |= {("method", name) for name in methods_in_use(cfg)}
    for key in cfg.given or ():
        if key in readers and chosen.isdisjoint(readers[key]) and value_of(cfg, key) != schema_of(cfg)[key].default:
            shown = " or ".join(" ".join(reader) for reader in readers[key])
            raise UserError(f"{key} {value_of(cfg, key)} does nothing: nothing but {shown} reads it; leave {key} out")
