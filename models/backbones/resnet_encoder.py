"""The encoder that runs our residual networks: the trunk, and the branches of experts."""

import copy

from torch import Tensor, nn

from tailtune.models.backbones.resnet import ResNet
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder


class ResNetEncoder(WholeNetworkEncoder):
    """A residual network whose experts have their last stages for themselves.

    Args:
        net: the network, whole or cut into trunk and branches.
        timm_name: timm's name of the same network; None: timm does not have it.
    """

    def __init__(self, net: ResNet, timm_name: str | None = None) -> None:
        super().__init__(net, net.feature_dim)
        self.timm_name = timm_name
        self.blocks = net.stages
        self.experts = max(1, len(net.branches))

    def insert(self, tuner: str, module: nn.Module) -> None:
        """Put a tuner's module on the feature; with several experts, a copy of it on the feature of each."""
        if self.experts > 1:
            module = nn.ModuleDict({str(expert): copy.deepcopy(module) for expert in range(self.experts)})
        super().insert(tuner, module)

    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → the map that the branches share; the features where there are none.

        The map keeps the dtype in which it was computed, so the cut changes no number.
        """
        return super().trunk(images) if self.experts == 1 else self.run(self.net, self.as_network_input(images))

    def branch(self, shared: Tensor, expert: int) -> Tensor:
        if self.experts == 1:
            return shared
        features = self.run(self.net.branches[expert], shared).to(self.dtype)
        for modules in self.tuners.values():
            features = modules.get_submodule(str(expert))(features, features)
        return features
