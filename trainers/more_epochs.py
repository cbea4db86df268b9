"""More epochs for a run: a larger `num_epochs` continues it, where no step depends on the number of epochs."""

from tailtune.configs import CfgNode, config_hash, with_values
from tailtune.configs.errors import UserError
from tailtune.datasets.images.growing_crop import GrowingArea
from tailtune.trainers.methods import Method
from tailtune.trainers.optimizers_and_schedules import SCHEDULES


def any_length(cfg: CfgNode) -> str:
    """A digest of all training options but the number of epochs.

    Args:
        cfg: resolved config of the run.
    """
    return config_hash(with_values(cfg, num_epochs=0))


def check_more_epochs(before: int, cfg: CfgNode, method: Method) -> None:
    """Check that a run can get more epochs.

    Args:
        before: its number of epochs so far.
        cfg: resolved config with the number that is asked for.
        method: the method of the run.

    Raises:
        UserError: a step of the run depended on the number of epochs; the message says which part.
    """
    why = ""
    if SCHEDULES[cfg.schedule].depends_on_length:
        why = f"schedule {cfg.schedule} sets the learning rate of each epoch by the number of epochs"
    elif cfg.augment == "mda" and GrowingArea(cfg.mda_func).depends_on_length:
        why = f"mda_func {cfg.mda_func} sets the crops of each epoch by the number of epochs"
    elif method.depends_on_length:
        why = "its method or its tuner counts the steps up to the end"
    elif cfg.sam_rho_late is not None:
        why = "sam_rho_late sets the length of a move in the last fifth of the epochs"
    if why:
        raise UserError(
            f"num_epochs {cfg.num_epochs}: the run in this folder has {before}, and it would not continue as a run of "
            f"{cfg.num_epochs} begins, because {why}; choose another output_dir, or start over with `resume False`"
        )
