"""Our ResNets as backbones: the host that runs trunk and branches, and their weights."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from tailtune.configs.errors import UserError, prefix_errors
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.generic import GenericEncoder
from tailtune.models.backbones.pretrained_weights import State, is_path, load_strict, local_file, read_state
from tailtune.models.backbones.resnet import Design, ResNet, make_resnet
from tailtune.models.backbones.spec import ONE, Backbone, Inputs, Published, Split
from tailtune.models.backbones.timm_models import TimmBackbone

OWN = 2
"""Stages that each expert has for itself unless `expert_split` says otherwise, as in RIDE."""
BRANCH = re.compile(r"^branches\.\d+\.")
CLASSIFIER, COUNTER = "fc.", "num_batches_tracked"
"""What files hold and this network has no use for: the classifier of other classes, and how often a norm was trained,
which Caffe's do not hold. Anything else is refused."""


class ResNetEncoder(GenericEncoder):
    """A residual network whose experts have their last stages for themselves.

    Args:
        net: whole, or trunk and branches.
        timm_name: timm's name of the same network; None: timm has none.
    """

    def __init__(self, net: ResNet, timm_name: str | None = None) -> None:
        super().__init__(net, net.feature_dim)
        self.timm_name = timm_name
        self.parts = net.stages
        self.experts = max(1, len(net.branches))

    def insert(self, tuner: str, module: nn.Module) -> None:
        """As of any network that runs as a whole; one of each expert, where the feature is its own."""
        if self.experts > 1:
            module = nn.ModuleDict({str(expert): copy.deepcopy(module) for expert in range(self.experts)})
        super().insert(tuner, module)

    def trunk(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, H, W] → the map that the branches share; the feature where there are none.

        The map keeps the dtype in which it was computed, so that the cut changes no number.
        """
        return super().trunk(images) if self.experts == 1 else self.run(self.net, self.received(images))

    def branch(self, shared: Tensor, expert: int) -> Tensor:
        if self.experts == 1:
            return shared
        features = self.run(self.net.branches[expert], shared).to(self.dtype)
        for each in self.tuners.values():
            features = each.get_submodule(str(expert))(features, features)
        return features


@dataclass(frozen=True)
class ResNetBackbone:
    """One of our residual networks. Weights: none (it is trained from scratch), `default`, or a local file.

    Args:
        name: for people.
        design: its shape.
        weights: timm's name of those that fit; None: nobody has published any.
    """

    name: str
    design: Design
    weights: str | None = None

    def inputs(self, pretrained: str | None = None) -> Inputs:
        return Inputs(32 if self.design.cifar else 224, "bilinear")

    def published(self, pretrained: str | None) -> Published | None:
        return Published("timm", self.weights) if pretrained == "default" and self.weights else None

    def build(
        self, pretrained: str | None, resolution: int, seed: int, project: bool, fast: bool = True, split: Split = ONE
    ) -> Backbone:
        """The network without classifier; each stage of pre-trained weights goes into every branch.

        Raises:
            UserError: zero-shot, a split that the network has no stages for, no such weights, a file of another one.
        """
        self._check(pretrained, project, split)
        own = OWN if split.own is None else split.own
        branches = split.experts if split.experts > 1 and own else 0
        net = make_resnet(self.design, seed, branches, own, split.reduced)
        if pretrained is not None and torch.get_default_device().type != "meta":
            with prefix_errors("pretrained"):
                state, path = self._state(pretrained)
                load_into_all(net, state, self.name, path)
        # There are no weights of CIFAR's networks but one's own, of the data at hand.
        stats = None if pretrained is None or self.design.cifar else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        timm_name = self.weights.partition(".")[0] if self.weights and not (split.reduced or branches) else None
        return Backbone(ResNetEncoder(net, timm_name), stats)

    def _check(self, pretrained: str | None, project: bool, split: Split) -> None:
        depth = len(self.design.blocks)
        if project:
            raise UserError(f"zero_shot needs a text tower, and {self.name} has none; choose a CLIP backbone")
        if split.own is not None and split.own > depth:
            raise UserError(f"expert_split {split.own}: {self.name} has {depth} stages; choose 0 to {depth}")
        if pretrained is None:
            return
        if pretrained == "default" and self.weights is None:
            raise UserError(
                f"there are no pre-trained weights of {self.name}: `pretrained none` trains it from scratch, "
                "`pretrained /path/to/file` begins with weights of your own"
            )
        if pretrained != "default" and not is_path(pretrained):
            raise UserError(f"pretrained '{pretrained}': {self.name} takes `default`, a local file, or none")
        if split.reduced:
            raise UserError(
                "reduce_dimension makes stages that no pre-trained weights fit; set it to False, or pretrained to none"
            )

    def _state(self, pretrained: str) -> tuple[State, Path]:
        if pretrained != "default":
            path = local_file(pretrained)
            return read_state(path), path
        assert self.weights is not None  # else refused before
        with seeded("timm"):  # which draws weights before it reads them
            return TimmBackbone(self.weights).create(fetch=True).state_dict(), Path(self.weights)


def load_into_all(net: ResNet, state: State, name: str, path: Path) -> None:
    """Weights of one network for trunk and branches; the stages of a branch go into every branch.

    Raises:
        UserError: weights that are missing, unexpected or of another shape.
    """
    own = net.state_dict()
    sources = {each: BRANCH.sub("", each) for each in own}
    kept = {key: each for key, each in state.items() if not key.startswith(CLASSIFIER) and not key.endswith(COUNTER)}
    fresh = {each: own[each] for each in own if each.endswith(COUNTER)}
    loaded = {each: kept[source] for each, source in sources.items() if source in kept}
    extra = {key: each for key, each in kept.items() if key not in sources.values()}
    load_strict(net, fresh | loaded | extra, name, path)
