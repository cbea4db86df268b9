"""Image-only backbones from timm in the same host."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from timm.models.vision_transformer import checkpoint_filter_fn

from configs.errors import UserError
from configs.seeding import seeded
from models.backbone import Backbone, Inputs
from models.vit import ViT
from models.weights import hub, is_path, load_strict, local_file, read_state

CLASSIFIER = ("head.weight", "head.bias")
"""Of the pre-training classes; a run makes its own."""
POSITIONED = {"pos_embed", "patch_embed.proj.weight"}
"""What timm's filter resizes; a file without them is refused by name."""


@dataclass(frozen=True)
class TimmVit:
    """A ViT by its pinned timm name. Weights: `default`, a local file in timm's layout, or none."""

    name: str

    def inputs(self) -> Inputs:
        return Inputs(224, patch_size=int(self.name.split("patch")[1].split("_")[0]))

    def build(self, pretrained: str | None, resolution: int, seed: int, project: bool, fast: bool = True) -> Backbone:
        if project:
            raise UserError(f"zero_shot needs a text tower, and {self.name} has none; choose a CLIP backbone")
        if pretrained is not None and pretrained != "default" and not is_path(pretrained):
            raise UserError(f"pretrained '{pretrained}': {self.name} takes `default`, a local file, or none")
        load = pretrained is not None and torch.get_default_device().type != "meta"
        file = local_file(pretrained) if load and pretrained and is_path(pretrained) else None
        fetch = load and file is None
        try:
            with seeded(seed, "backbone"), hub() if fetch else nullcontext():
                net: Any = timm.create_model(self.name, pretrained=fetch, num_classes=0, img_size=resolution)
        except (OSError, HfHubHTTPError) as error:
            raise UserError(
                f"the weights of {self.name} are not here and cannot be downloaded: get "
                f"https://huggingface.co/timm/{self.name} and name the file with `pretrained /path/to/file`; "
                "`pretrained none` runs with random weights"
            ) from error
        if file is not None:
            state = {name: each for name, each in read_state(file).items() if name not in CLASSIFIER}
            load_strict(net, checkpoint_filter_fn(state, net) if state.keys() >= POSITIONED else state, self.name, file)
        config = net.pretrained_cfg
        return Backbone(ViT(net, fast=fast), (config["mean"], config["std"]), random=not load)
