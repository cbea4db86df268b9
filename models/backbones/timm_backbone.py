"""Backbones of timm, image encoders only: plain ViTs run in `ViTEncoder`, all other networks as a whole."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from tailtune.configs.errors import UserError, prefix_errors, unknown
from tailtune.configs.lazy_module import lazy_module
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.backbone_types import NO_SPLIT, Backbone, ExpertSplit, InputSpec, PublishedWeights
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.expert_split import split_experts
from tailtune.models.backbones.pretrained_weights import (
    State,
    hub_or_cache,
    is_path,
    load_strict,
    local_file,
    read_state,
)
from tailtune.models.backbones.safe_torch_load import refuse_bad_tensors
from tailtune.models.backbones.vit_compatibility import unsupported_part
from tailtune.models.backbones.vit_encoder import ViTEncoder
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder

hub_errors = lazy_module("huggingface_hub.errors")
timm = lazy_module("timm")
vit = lazy_module("timm.models.vision_transformer")

DAMAGED = (SafetensorError, UnpicklingError, EOFError)
"""What timm raises for a file in its cache that was not downloaded completely."""
RESIZED = {"pos_embed", "patch_embed.proj.weight"}
"""Tensors that timm's filter resizes, and without which it fails; a file without them gets our message instead."""


@dataclass(frozen=True)
class TimmBackbone:
    """A network of timm. `pretrained`: `default` (weights of the name's tag, or of timm's default tag), a file, none.

    Args:
        name: timm's name, with `.tag` or without.
        interpolation: in place of timm's.
    """

    name: str
    interpolation: str | None = None

    def inputs(self, pretrained: str | None = None) -> InputSpec:
        """The images that timm lists for the network; timm's crop ratio for testing is not used."""
        config = self._config()
        return InputSpec(config.input_size[-1], self.interpolation or config.interpolation, _patch_size(self.name))

    def published(self, pretrained: str | None) -> PublishedWeights | None:
        """timm's name and tag of the weights, with `pretrained default`."""
        config = self._config()
        return PublishedWeights("timm", f"{config.architecture}.{config.tag}") if pretrained == "default" else None

    def build(
        self,
        pretrained: str | None,
        resolution: int,
        seed: int,
        project: bool,
        fast: bool = True,
        split: ExpertSplit = NO_SPLIT,
    ) -> Backbone:
        """The network without its classifier; the feature is the classifier's input.

        For the arguments see `BackboneSpec.build`.

        Raises:
            UserError: zero-shot; weights that do not exist or do not fit; a resolution that the network cannot take.
        """
        config = self._config()
        self._check(pretrained, project, config)
        load = pretrained is not None and torch.get_default_device().type != "meta"
        file = local_file(pretrained) if load and pretrained and is_path(pretrained) else None
        with seeded(seed, "backbone"):
            net = self.create(download=load and file is None)
        set_resolution(net, resolution, config.input_size[-1], self.name)
        if file is not None:
            with prefix_errors("pretrained"):
                load_strict(net, _without_classifier(read_state(file), net, config), self.name, file)
        encoder = encoder_for(net, fast)
        split_experts(encoder, split, self.name)
        return Backbone(encoder, (config.mean, config.std), random_base=not load)

    def _config(self) -> Any:
        """timm's description of the network and its weights."""
        config = timm.get_pretrained_cfg(self.name)
        assert config is not None, "names are checked where they are looked up"
        return config

    def _check(self, pretrained: str | None, project: bool, config: Any) -> None:
        """Raise a `UserError` for options that the network cannot fulfil."""
        if project:
            raise UserError(f"zero_shot needs a text encoder, and {self.name} has none; choose a CLIP backbone")
        if pretrained is not None and pretrained != "default" and not is_path(pretrained):
            raise UserError(f"pretrained '{pretrained}': {self.name} takes `default`, a local file, or none")
        if pretrained == "default" and not config.has_weights:
            raise UserError(f"timm has no weights of {self.name}: name a file with `pretrained /path/to/file`, or none")

    def create(self, download: bool) -> Any:
        """timm's network without its classifier.

        Args:
            download: whether it gets its published weights, from timm's cache or the network; else random ones.

        Raises:
            UserError: the weights are not here and cannot be downloaded, or are damaged.
        """
        try:
            with hub_or_cache() if download else nullcontext():
                net = timm.create_model(self.name, pretrained=download, num_classes=0)
        except DAMAGED as error:
            raise UserError(
                f"the weights of {self.name} in the cache of timm cannot be read ({error}); remove them from there, so "
                "that they are downloaded again"
            ) from error
        except (OSError, hub_errors.HfHubHTTPError) as error:
            config = self._config()
            url = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url
            raise UserError(
                f"the weights of {self.name} are not here and cannot be downloaded: get {url} and name the file "
                "with `pretrained /path/to/file`; `pretrained none` runs with random weights"
            ) from error
        if download:
            refuse_bad_tensors(net.state_dict(), f"the weights of {self.name}, as timm reads them,")
        return net


def find_timm_backbone(name: str) -> TimmBackbone:
    """The backbone `timm:<name>`.

    Raises:
        UserError: timm does not know the name or the tag.
    """
    arch, tag = timm.models.split_model_name_tag(name)
    if arch not in timm.list_models():  # `timm.is_model` also accepts old names, for which timm lists no weights
        raise unknown("timm model", arch, timm.list_models())
    tags = [model.partition(".")[2] for model in timm.list_models(f"{arch}.*", pretrained=True)]
    if "." in name and tag not in tags:  # the tag of `resnet18.` is empty
        raise unknown(f"tag of timm's {arch}", tag, tags)
    return TimmBackbone(name)


def encoder_for(net: Any, fast: bool = True) -> Encoder:
    """The encoder that runs a timm network.

    Args:
        net: the network without its classifier.
        fast: False computes the plain formulation of a ViT, for comparison.
    """
    if unsupported_part(net) is None:
        return ViTEncoder(net, fast=fast)
    return WholeNetworkEncoder(net, net.head_hidden_size)


def set_resolution(net: Any, resolution: int, native: int, name: str) -> None:
    """Prepare a timm network for images of another size; most convnets take any size as they are.

    Args:
        net: the network.
        resolution: side of the images, in pixels.
        native: side of the images for which it was made, in pixels.
        name: what the network is called in messages.

    Raises:
        UserError: the network cannot take images of that size.
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
    """Side of the patches of a transformer with one grid of patches; None for other networks.

    timm knows this of a built network only, so one is built on the meta device.
    """
    with torch.device("meta"), torch.no_grad():
        net: Any = timm.create_model(name, pretrained=False, num_classes=0).eval()
        if unsupported_part(net) is not None:
            side = net.pretrained_cfg["input_size"][-1]
            shape = tuple(net(torch.empty(1, 3, side, side)).shape)
            if shape != (1, net.head_hidden_size):
                raise UserError(f"timm's {name} gives no feature vector of an image (but {shape}); choose another")
    has_one_grid = (
        isinstance(net, (vit.VisionTransformer, timm.models.eva.Eva))
        and type(net.patch_embed) is timm.layers.PatchEmbed
    )
    return int(net.patch_embed.patch_size[0]) if has_one_grid else None


def _without_classifier(state: State, net: Any, config: Any) -> State:
    """A state dict in timm's layout without the classifier of the pre-training classes, at the network's resolution."""
    names = config.classifier if isinstance(config.classifier, (tuple, list)) else (config.classifier,)
    classifier = {f"{name}.{suffix}" for name in names for suffix in ("weight", "bias")}
    state = {name: tensor for name, tensor in state.items() if name not in classifier}
    resizable = isinstance(net, vit.VisionTransformer) and state.keys() >= RESIZED
    return vit.checkpoint_filter_fn(state, net) if resizable else state
