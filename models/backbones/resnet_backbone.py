"""Residual networks as backbones: how one is built, and how its pre-trained weights are loaded."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tailtune.configs.errors import UserError, prefix_errors
from tailtune.configs.lazy_module import lazy_module
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.backbone_types import NO_SPLIT, Backbone, ExpertSplit, InputSpec, PublishedWeights
from tailtune.models.backbones.pretrained_weights import State, is_path, load_strict, local_file, read_state
from tailtune.models.backbones.resnet import ResNet, ResNetDesign, make_resnet
from tailtune.models.backbones.resnet_encoder import ResNetEncoder
from tailtune.models.backbones.timm_backbone import TimmBackbone

timm_data = lazy_module("timm.data")
DEFAULT_BRANCH_STAGES = 2
"""How many of the last stages each expert has for itself unless `expert_split` says otherwise; as in RIDE."""
BRANCH = re.compile(r"^branches\.\d+\.")
"""Beginning of the name of a tensor that one branch has for itself."""
CLASSIFIER, COUNTER = "fc.", "num_batches_tracked"
"""Tensors that a file may hold and that are not loaded: the classifier of the pre-training classes, and how many
batches a norm has seen (networks converted from Caffe do not have these). Any other tensor must fit."""


@dataclass(frozen=True)
class ResNetBackbone:
    """One of our residual networks. `pretrained`: none (trained from scratch), `default`, or a file.

    Args:
        name: its name in messages.
        design: its shape.
        weights: timm's name of weights that fit; None: nobody has published any.
    """

    name: str
    design: ResNetDesign
    weights: str | None = None

    def inputs(self, pretrained: str | None = None) -> InputSpec:
        """The images that the network takes: 32 pixels for CIFAR, else 224."""
        return InputSpec(32 if self.design.cifar else 224, "bilinear")

    def published(self, pretrained: str | None) -> PublishedWeights | None:
        """timm's weights of the network, with `pretrained default`."""
        return PublishedWeights("timm", self.weights) if pretrained == "default" and self.weights else None

    def build(
        self,
        pretrained: str | None,
        resolution: int,
        seed: int,
        project: bool,
        fast: bool = True,
        split: ExpertSplit = NO_SPLIT,
    ) -> Backbone:
        """The network without its classifier. Every branch gets the pre-trained weights of its stages.

        For the arguments see `BackboneSpec.build`.

        Raises:
            UserError: zero-shot; more expert stages than the network has; weights that do not exist or do not fit.
        """
        self._check(pretrained, project, split)
        branch_stages = DEFAULT_BRANCH_STAGES if split.own_blocks is None else split.own_blocks
        branches = split.experts if split.experts > 1 and branch_stages else 0
        net = make_resnet(self.design, seed, branches, branch_stages, split.reduced)
        if pretrained is not None and torch.get_default_device().type != "meta":
            with prefix_errors("pretrained"):
                state, path = self._pretrained_state(pretrained)
                load_into_branches(net, state, self.name, path)
        # Weights for CIFAR are always the user's own, trained on images with the statistics of the data at hand.
        from_data = pretrained is None or self.design.cifar
        pixel_stats = None if from_data else (timm_data.IMAGENET_DEFAULT_MEAN, timm_data.IMAGENET_DEFAULT_STD)
        timm_name = self.weights.partition(".")[0] if self.weights and not (split.reduced or branches) else None
        return Backbone(ResNetEncoder(net, timm_name), pixel_stats)

    def _check(self, pretrained: str | None, project: bool, split: ExpertSplit) -> None:
        """Raise a `UserError` for options that the network cannot fulfil."""
        depth = len(self.design.blocks)
        if project:
            raise UserError(f"zero_shot needs a text encoder, and {self.name} has none; choose a CLIP backbone")
        if split.own_blocks is not None and split.own_blocks > depth:
            raise UserError(f"expert_split {split.own_blocks}: {self.name} has {depth} stages; choose 0 to {depth}")
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

    def _pretrained_state(self, pretrained: str) -> tuple[State, Path]:
        """The state dict of the weights, and the file (or timm's name) for messages."""
        if pretrained != "default":
            path = local_file(pretrained)
            return read_state(path), path
        assert self.weights is not None  # `_check` has refused None
        with seeded("timm"):  # timm draws random weights before it reads the file
            return TimmBackbone(self.weights).create(download=True).state_dict(), Path(self.weights)


def load_into_branches(net: ResNet, state: State, name: str, path: Path) -> None:
    """Load the weights of a whole network into a trunk and all its branches.

    Args:
        net: the network to fill.
        state: state dict of the whole network; stages of the branches are copied into every branch.
        name: what the network is called in messages.
        path: the file in messages.

    Raises:
        UserError: tensors that are missing, unexpected or of another shape.
    """
    current = net.state_dict()
    source_of = {target: BRANCH.sub("", target) for target in current}
    kept = {
        key: tensor for key, tensor in state.items() if not key.startswith(CLASSIFIER) and not key.endswith(COUNTER)
    }
    counters = {key: tensor for key, tensor in current.items() if key.endswith(COUNTER)}
    loaded = {target: kept[source] for target, source in source_of.items() if source in kept}
    unexpected = {key: tensor for key, tensor in kept.items() if key not in source_of.values()}
    load_strict(net, counters | loaded | unexpected, name, path)
