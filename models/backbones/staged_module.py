"""`StagedModule`: the base of methods and encoders, of which several runs may each train a part."""

from torch import nn


class StagedModule(nn.Module):
    """A module of which several runs may each train a part, one run after the other.

    Attributes:
        frozen_trained: names of the parameters that an earlier run trained and that this run leaves unchanged. Like
            parameters that train, they keep their dtype and are part of a checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.frozen_trained: set[str] = set()
