"""Image-only backbones from timm: ViTs in the ViT host, whatever else as a whole."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from timm.layers import PatchEmbed
from timm.models import PretrainedCfg, split_model_name_tag
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn

from tailtune.configs.errors import UserError, prefix_errors, unknown
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.expert_split import divide
from tailtune.models.backbones.generic import GenericEncoder
from tailtune.models.backbones.pretrained_weights import State, hub, is_path, load_strict, local_file, read_state
from tailtune.models.backbones.spec import ONE, Backbone, Inputs, Published, Split
from tailtune.models.backbones.torch_files import refuse_odd
from tailtune.models.backbones.vit import ViT
from tailtune.models.backbones.vit_support import refusal

DAMAGED = (SafetensorError, UnpicklingError, EOFError)
"""What reading a file of timm's raises that was not downloaded to its end."""
POSITIONED = {"pos_embed", "patch_embed.proj.weight"}
"""What timm's filter resizes; a file without them is refused by name."""


@dataclass(frozen=True)
class TimmBackbone:
    """A network of timm. Weights: `default` (those of the name's tag, or of timm's default), a local file, or none.

    Args:
        name: timm's name, with `.tag` or without.
        interpolation: in place of timm's.
    """

    name: str
    interpolation: str | None = None

    def inputs(self, pretrained: str | None = None) -> Inputs:
        """timm's own; its share of the image that is cropped for testing is not taken over."""
        config = self._config()
        return Inputs(config.input_size[-1], self.interpolation or config.interpolation, _patch_size(self.name))

    def published(self, pretrained: str | None) -> Published | None:
        config = self._config()
        return Published("timm", f"{config.architecture}.{config.tag}") if pretrained == "default" else None

    def build(
        self, pretrained: str | None, resolution: int, seed: int, project: bool, fast: bool = True, split: Split = ONE
    ) -> Backbone:
        """The network without its classifier; the feature is what the classifier was given.

        Raises:
            UserError: zero-shot, no such weights, no network, a file of another model, a resolution it cannot take.
        """
        config = self._config()
        self._check(pretrained, project, config)
        load = pretrained is not None and torch.get_default_device().type != "meta"
        file = local_file(pretrained) if load and pretrained and is_path(pretrained) else None
        with seeded(seed, "backbone"):
            net = self.create(fetch=load and file is None)
        resize(net, resolution, config.input_size[-1], self.name)
        if file is not None:
            with prefix_errors("pretrained"):
                load_strict(net, _without_classifier(read_state(file), net, config), self.name, file)
        encoder = host(net, fast)
        divide(encoder, split, self.name)
        return Backbone(encoder, (config.mean, config.std), random=not load)

    def _config(self) -> Any:
        config = timm.get_pretrained_cfg(self.name)
        assert config is not None, "names are checked where they are looked up"
        return config

    def _check(self, pretrained: str | None, project: bool, config: PretrainedCfg) -> None:
        if project:
            raise UserError(f"zero_shot needs a text tower, and {self.name} has none; choose a CLIP backbone")
        if pretrained is not None and pretrained != "default" and not is_path(pretrained):
            raise UserError(f"pretrained '{pretrained}': {self.name} takes `default`, a local file, or none")
        if pretrained == "default" and not config.has_weights:
            raise UserError(f"timm has no weights of {self.name}: name a file with `pretrained /path/to/file`, or none")

    def create(self, fetch: bool) -> Any:
        """timm's network without classifier, with its published weights or random ones.

        Raises:
            UserError: the weights are not here and cannot be downloaded, or are damaged.
        """
        try:
            with hub() if fetch else nullcontext():
                net = timm.create_model(self.name, pretrained=fetch, num_classes=0)
        except DAMAGED as error:
            raise UserError(
                f"the weights of {self.name} in the cache of timm cannot be read ({error}); remove them from there, so "
                "that they are downloaded again"
            ) from error
        except (OSError, HfHubHTTPError) as error:
            config = self._config()
            place = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            raise UserError(
                f"the weights of {self.name} are not here and cannot be downloaded: get {place} and name the file "
                "with `pretrained /path/to/file`; `pretrained none` runs with random weights"
            ) from error
        if fetch:
            refuse_odd(net.state_dict(), f"the weights of {self.name}, as timm reads them,")
        return net


def find_timm(name: str) -> TimmBackbone:
    """The backbone `timm:<name>`. Raises `UserError` for a name or tag that timm does not know."""
    arch, tag = split_model_name_tag(name)
    if arch not in timm.list_models():  # `is_model` says yes to names that timm has renamed, and then has none of them
        raise unknown("timm model", arch, timm.list_models())
    tags = [each.partition(".")[2] for each in timm.list_models(f"{arch}.*", pretrained=True)]
    if "." in name and tag not in tags:  # `resnet18.` has an empty one
        raise unknown(f"tag of timm's {arch}", tag, tags)
    return TimmBackbone(name)


def host(net: Any, fast: bool = True) -> Encoder:
    """A timm network without classifier in the host that computes all of it."""
    return ViT(net, fast=fast) if refusal(net) is None else GenericEncoder(net, net.head_hidden_size)


def resize(net: Any, resolution: int, native: int, name: str) -> None:
    """Prepare a timm network for images of another size; most convnets take any.

    Raises:
        UserError: it takes one size only, or no such one.
    """
    if resolution == native:
        return
    if not hasattr(net, "set_input_size"):
        if not net.pretrained_cfg.get("fixed_input_size"):
            return
        raise UserError(f"resolution {resolution}: {name} takes {native} only")
    try:
        net.set_input_size(resolution)
    except (AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"resolution {resolution} does not fit {name}, whose own is {native}") from error


@cache
def _patch_size(name: str) -> int | None:
    """Of a transformer with one grid of patches; timm knows it of a built network only."""
    with torch.device("meta"), torch.no_grad():
        net: Any = timm.create_model(name, pretrained=False, num_classes=0).eval()
        if refusal(net) is not None:
            side = net.pretrained_cfg["input_size"][-1]
            shape = tuple(net(torch.empty(1, 3, side, side)).shape)
            if shape != (1, net.head_hidden_size):
                raise UserError(f"timm's {name} gives no feature vector of an image (but {shape}); choose another")
    whole = isinstance(net, (VisionTransformer, Eva)) and type(net.patch_embed) is PatchEmbed
    return int(net.patch_embed.patch_size[0]) if whole else None


def _without_classifier(state: State, net: Any, config: PretrainedCfg) -> State:
    """A file in timm's layout for a network without classifier, which is that of the pre-training classes."""
    names = config.classifier if isinstance(config.classifier, (tuple, list)) else (config.classifier,)
    parts = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    state = {name: each for name, each in state.items() if name not in parts}
    fits = isinstance(net, VisionTransformer) and state.keys() >= POSITIONED
    return checkpoint_filter_fn(state, net) if fits else state
