"""Backbones with a text tower: open_clip resolves and reads the weights, the image tower moves into a host of ours."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub.errors import HfHubHTTPError
from open_clip.model import CLIPVisionCfg, resize_pos_embed
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from open_clip.transform import PreprocessCfg
from torch import Tensor

from tailtune.configs.errors import UserError, lookup, naming, unknown
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.expert_split import divide
from tailtune.models.backbones.open_clip_towers import empty_tower, is_simple, taken_tower, vision_at
from tailtune.models.backbones.pretrained_weights import (
    fetch,
    hub,
    in_open_clip_layout,
    is_path,
    load_strict,
    local_file,
    read_state,
)
from tailtune.models.backbones.spec import ONE, Backbone, Inputs, Published, Split, Stats
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.backbones.timm_models import TimmBackbone

log = logging.getLogger("tailtune")


_register = cache(open_clip.add_model_config)
"""Tells open_clip of a config, once: each time it reads again all that it knows."""


@dataclass(frozen=True)
class OpenClipBackbone:
    """A CLIP of open_clip.

    Args:
        arch: open_clip's model name; with OpenAI's weights one of the `-quickgelu` names.
        tag: what `pretrained default` means; None: the only one that open_clip lists.
        config: model config file of an architecture that open_clip does not know.
        files: tag → file, for weights that travel with the repository.
        stats, interpolation: in place of those that open_clip lists for the weights. LIFT resizes bilinearly
            throughout, although CLIP was trained on bicubic images.
    """

    arch: str
    tag: str | None = "openai"
    config: Path | None = None
    files: dict[str, Path] = field(default_factory=dict)
    stats: Stats | None = None
    interpolation: str | None = "bilinear"

    def inputs(self, pretrained: str | None = None) -> Inputs:
        vision = CLIPVisionCfg(**self._config()["vision_cfg"])
        interpolation = self.interpolation or self._preprocessing(pretrained)["interpolation"]
        if vision.timm_model_name:
            patch_size = TimmBackbone(vision.timm_model_name).inputs().patch_size
        else:
            patch_size = None if isinstance(vision.layers, (list, tuple)) else vision.patch_size
        return Inputs(int(vision.image_size), interpolation, patch_size)

    def published(self, pretrained: str | None) -> Published | None:
        tag = self._tag(pretrained)
        return None if tag is None or self.files else Published("open_clip", self.arch, tag)

    def build(
        self, pretrained: str | None, resolution: int, seed: int, project: bool, fast: bool = True, split: Split = ONE
    ) -> Backbone:
        """The image tower in a host, with the text tower at hand.

        On the meta device nothing is read. `project` keeps the visual projection of a ViT (zero-shot); the feature of
        any other tower is in the shared space already. SigLIP's bias is the same for all classes and is left out.

        Raises:
            UserError: unknown tag, no such file, no network, a file of another model, QuickGELU mismatch.
        """
        config = self._config()
        dim, vision = config["embed_dim"], CLIPVisionCfg(**config["vision_cfg"])
        if isinstance(vision.layers, (list, tuple)) and resolution != vision.image_size:
            raise UserError(
                f"resolution {resolution}: {self.arch} takes {vision.image_size} only, its attention pooling has "
                "positions for that"
            )
        found = self._preprocessing(pretrained)
        stats: Stats = self.stats or (tuple(found["mean"]), tuple(found["std"]))
        source = self._source(pretrained, config)
        if torch.get_default_device().type == "meta":
            encoder = empty_tower(config, resolution, project, fast)
            divide(encoder, split, self.arch)
            return Backbone(encoder, stats, embed_dim=dim)
        path = None if pretrained is None else self._file(pretrained, source, config)
        clip = self._clip(config, resolution, seed)
        if path is not None:
            with naming("pretrained"):
                state = in_open_clip_layout(clip, read_state(path))
                if resolution != vision.image_size and not is_simple(config):
                    resize_pos_embed(state, clip)
                load_strict(clip, state, self.arch, path)
        encoder, projection = taken_tower(clip, config, resolution, project, fast)
        del clip.visual
        divide(encoder, split, self.arch)
        text = TextTower(clip, partial(tokens_of, self.arch), None if project else projection)
        return Backbone(encoder, stats, dim, text, random=path is None)

    def _config(self) -> dict[str, Any]:
        if self.config is not None:
            _register(self.config)
            return json.loads(self.config.read_text())
        return open_clip.get_model_config(self.arch)

    def _clip(self, config: dict[str, Any], resolution: int, seed: int) -> Any:
        """open_clip's model with random weights, of the class that its own factory would choose."""
        text = config["text_cfg"]
        kind = open_clip.CustomTextCLIP if config.get("custom_text") or "hf_model_name" in text else open_clip.CLIP
        kind = open_clip.CoCa if "multimodal_cfg" in config else kind
        own = {name: each for name, each in config.items() if name != "custom_text"}
        if "hf_model_name" in text:
            own["text_cfg"] = {**text, "hf_model_pretrained": False}
        try:
            with seeded(seed, "backbone"), hub() if "hf_model_name" in text else nullcontext():
                return kind(**{**own, "vision_cfg": vision_at(config, resolution)})
        except (OSError, HfHubHTTPError) as error:
            raise UserError(
                f"the text tower of {self.arch} ({text['hf_model_name']}) is described on the Hugging Face hub, which "
                "cannot be reached; choose another backbone, or go online once"
            ) from error

    # --- weights -----------------------------------------------------------------------------------------------

    def _tag(self, pretrained: str | None) -> str | None:
        """The tag that an option's value means; None for a file or random weights."""
        if pretrained is None or is_path(pretrained):
            return None
        if pretrained != "default":
            return pretrained
        tags = list_pretrained_tags_by_model(self.arch)
        if self.tag is None and len(tags) != 1:
            choices = f"choose one: {', '.join(tags)}" if tags else "name a file with `pretrained /path/to/file`"
            raise UserError(f"pretrained default: open_clip lists {len(tags)} weights of {self.arch}; {choices}")
        return self.tag or tags[0]

    def _source(self, pretrained: str | None, config: dict[str, Any]) -> dict[str, Any]:
        """Where open_clip says that the weights are; empty for a file or random weights. Reads nothing."""
        tag = self._tag(pretrained)
        if tag is None:
            return {}
        if self.files:
            return {"file": lookup(self.files, tag, f"pretrained tag of {self.arch}")}
        source = get_pretrained_cfg(self.arch, tag)
        if not source:
            raise unknown(f"pretrained tag of {self.arch}", tag, list_pretrained_tags_by_model(self.arch))
        if source.get("quick_gelu", False) != config.get("quick_gelu", False):
            wanted = "with" if source.get("quick_gelu") else "without"
            other = f"{self.arch}-quickgelu"
            hint = f", or backbone open_clip:{other}" if other in open_clip.list_models() else ""
            raise UserError(
                f"pretrained '{tag}' was trained {wanted} QuickGELU and {self.arch} is not: features would be wrong; "
                f"choose a tag of the same activation{hint}"
            )
        return source

    def _file(self, pretrained: str, source: dict[str, Any], config: dict[str, Any]) -> Path:
        if not source:
            if config.get("quick_gelu"):  # a file does not say
                log.info("%s is taken to have been trained with QuickGELU, as OpenAI's weights", pretrained)
            return local_file(pretrained)
        return Path(source["file"]) if "file" in source else fetch(self.arch, str(self._tag(pretrained)), source)

    def _preprocessing(self, pretrained: str | None) -> Mapping[str, Any]:
        """mean, std and interpolation of a tag; of a file those of the architecture's first tag, or open_clip's."""
        tags = [self._tag(pretrained) or "", *list_pretrained_tags_by_model(self.arch)]
        return next(filter(None, (get_pretrained_cfg(self.arch, tag) for tag in tags)), asdict(PreprocessCfg()))


def find_open_clip(name: str) -> OpenClipBackbone:
    """The backbone `open_clip:<name>`. Raises `UserError` for a name that open_clip does not know."""
    if name not in open_clip.list_models():
        raise unknown("open_clip model", name, open_clip.list_models())
    return OpenClipBackbone(name, tag=None, interpolation=None)


def tokens_of(arch: str, sentences: Sequence[str]) -> Tensor:
    """Token ids [n, length]. The tokenizer is read when the first sentence comes, because some are downloaded."""
    return _tokenizer(arch)(list(sentences))


@cache
def _tokenizer(arch: str) -> Any:
    online = "hf_tokenizer_name" in open_clip.get_model_config(arch)["text_cfg"]
    try:
        with hub() if online else nullcontext():
            return open_clip.get_tokenizer(arch)
    except (OSError, ImportError, ValueError, HfHubHTTPError) as error:  # not here, or a package is missing
        reason = str(error).strip().split("\n", 1)[0][:120]
        raise UserError(
            f"the tokenizer of {arch} cannot be loaded ({reason}); go online once, or choose init_head class_mean, "
            "which reads no text"
        ) from error
