"""Backbones of open_clip: the weights of a CLIP are found and read, and its image and text encoder are separated."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailtune.configs.errors import UserError, lookup, prefix_errors, unknown
from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones import open_clip_files, openai_clip
from tailtune.models.backbones.backbone_types import (
    NO_SPLIT,
    Backbone,
    ExpertSplit,
    InputSpec,
    PixelStats,
    PublishedWeights,
)
from tailtune.models.backbones.clip_text_encoder import ClipTextEncoder
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.expert_split import split_experts
from tailtune.models.backbones.open_clip_image_encoders import embedding_encoder, meta_image_encoder
from tailtune.models.backbones.plain_text import is_openai_text
from tailtune.models.backbones.plain_vit import OPENAI_VIT_DEFAULTS, is_openai_vit
from tailtune.models.backbones.pretrained_weights import (
    download_open_clip_weights,
    hub_or_cache,
    is_path,
    load_strict,
    local_file,
    read_state,
    to_open_clip_layout,
)
from tailtune.models.backbones.random_clip import random_clip
from tailtune.models.backbones.text_tower import TextTower, load_text_tower
from tailtune.models.backbones.timm_backbone import TimmBackbone

open_clip = lazy_module("open_clip")
hub_errors = lazy_module("huggingface_hub.errors")
log = logging.getLogger("tailtune")


@dataclass(frozen=True)
class OpenClipBackbone:
    """A CLIP of open_clip.

    Args:
        arch: open_clip's model name; with OpenAI's weights one of the `-quickgelu` names.
        tag: the tag that `pretrained default` means; None: the only one that open_clip lists.
        config: model config file of an architecture that open_clip does not know.
        files: tag → file, for weights that this repository ships.
        pixel_stats: mean and deviation in place of those that open_clip lists for the weights.
        interpolation: in place of the one that open_clip lists. LIFT always resizes bilinearly, although CLIP was
            trained on bicubic images.
    """

    arch: str
    tag: str | None = "openai"
    config: Path | None = None
    files: dict[str, Path] = field(default_factory=dict)
    pixel_stats: PixelStats | None = None
    interpolation: str | None = "bilinear"

    def inputs(self, pretrained: str | None = None) -> InputSpec:
        """The images that the image encoder takes, from open_clip's config and its list of weights."""
        vision = {**OPENAI_VIT_DEFAULTS, **self._config()["vision_cfg"]}
        interpolation = self.interpolation or self._preprocessing(pretrained)["interpolation"]
        if name := vision.get("timm_model_name"):
            patch_size = TimmBackbone(name).inputs().patch_size
        else:
            patch_size = None if isinstance(vision["layers"], (list, tuple)) else vision["patch_size"]
        return InputSpec(int(vision["image_size"]), interpolation, patch_size)

    def published(self, pretrained: str | None) -> PublishedWeights | None:
        """The name and tag of weights that open_clip downloads."""
        tag = self._tag(pretrained)
        return None if tag is None or self.files else PublishedWeights("open_clip", self.arch, tag)

    def build(
        self,
        pretrained: str | None,
        resolution: int,
        seed: int,
        project: bool,
        fast: bool = True,
        split: ExpertSplit = NO_SPLIT,
    ) -> Backbone:
        """The image encoder with its weights, and the text encoder; for the arguments see `BackboneSpec.build`.

        `project` keeps the visual projection of a ViT (zero-shot); all other image encoders always end in the shared
        space. SigLIP's bias is the same for all classes and is left out.

        Raises:
            UserError: unknown tag, no such file, no network, a file of another model, QuickGELU mismatch.
        """
        config = self._config()
        embed_dim, vision = config["embed_dim"], {**OPENAI_VIT_DEFAULTS, **config["vision_cfg"]}
        if isinstance(vision["layers"], (list, tuple)) and resolution != vision["image_size"]:
            raise UserError(
                f"resolution {resolution}: {self.arch} takes {vision['image_size']} only, its attention pooling has "
                "positions for that"
            )
        pixel_stats = self.pixel_stats or self._pixel_stats(pretrained)
        source = self._source(pretrained, config)
        if torch.get_default_device().type == "meta":
            if is_openai_vit(config):
                encoder: Encoder = openai_clip.meta_image_encoder(config, resolution, project, fast)
            else:
                encoder = meta_image_encoder(config, resolution, fast)
            split_experts(encoder, split, self.arch)
            return Backbone(encoder, pixel_stats, embed_dim, text_tower=self._text_tower(config, None, fast))
        path = None if pretrained is None else self._file(pretrained, source, config)
        shipped = path if path in self.files.values() else None
        clip: Any = None if shipped else self._clip(config, resolution, seed, path)
        state = clip.state_dict() if shipped is None else read_state(shipped)
        projection: Tensor | None = None
        if is_openai_vit(config):
            encoder, projection = openai_clip.image_encoder(state, config, resolution, project, fast)
        else:
            encoder = embedding_encoder(clip.visual, embed_dim, resolution, fast)
        split_experts(encoder, split, self.arch)
        text = self._text_encoder(clip, state, config, None if project else projection)
        return Backbone(encoder, pixel_stats, embed_dim, text, path is None, self._text_tower(config, state, fast))

    def _text_encoder(
        self, clip: Any, state: dict[str, Tensor], config: dict[str, Any], projection: Tensor | None
    ) -> ClipTextEncoder:
        """The text encoder: that of open_clip's model, or of the state dict where there is no such model."""
        text: Any = openai_clip.TextModel.of(state, config) if clip is None else clip
        if clip is not None:
            del clip.visual
        return ClipTextEncoder(text, self._tokenizer(config), projection)

    def _text_tower(
        self, config: dict[str, Any], state: dict[str, Tensor] | None, fast: bool
    ) -> Callable[[], TextTower] | None:
        """Makes the text encoder as a host of tuners; None if it is not of OpenAI's kind."""
        return (
            partial(load_text_tower, config, state, self._tokenizer(config), fast) if is_openai_text(config) else None
        )

    def _tokenizer(self, config: dict[str, Any]) -> Callable[[Sequence[str]], Tensor]:
        """Sentences → token ids [n, length]."""
        if self.config is None:
            return partial(tokenize, self.arch)
        return partial(open_clip_files.tokenize, config["text_cfg"]["context_length"])

    def _config(self) -> dict[str, Any]:
        """open_clip's config of the model."""
        if self.config is not None:
            return json.loads(self.config.read_text())
        return open_clip.get_model_config(self.arch)

    def _clip(self, config: dict[str, Any], resolution: int, seed: int, path: Path | None) -> Any:
        """open_clip's model with the weights of a file, or with random weights if `path` is None."""
        try:
            clip = random_clip(self.arch, config, resolution, seed)
        except TypeError as error:
            if self.config is None:
                raise
            raise UserError(f"backbone: open_clip cannot make the model of {self.config}: {error}") from error
        if path is not None:
            with prefix_errors("pretrained"):
                state = to_open_clip_layout(clip, read_state(path))
                if resolution != config["vision_cfg"]["image_size"] and not is_openai_vit(config):
                    open_clip.model.resize_pos_embed(state, clip)
                load_strict(clip, state, self.arch, path)
        return clip

    # --- weights -----------------------------------------------------------------------------------------------

    def _tag(self, pretrained: str | None) -> str | None:
        """The tag that the option `pretrained` means; None for a file or random weights."""
        if pretrained is None or is_path(pretrained):
            return None
        if pretrained != "default":
            return pretrained
        if self.tag is not None:
            return self.tag
        tags = open_clip.list_pretrained_tags_by_model(self.arch)
        if len(tags) != 1:
            choices = f"choose one: {', '.join(tags)}" if tags else "name a file with `pretrained /path/to/file`"
            raise UserError(f"pretrained default: open_clip lists {len(tags)} weights of {self.arch}; {choices}")
        return tags[0]

    def _source(self, pretrained: str | None, config: dict[str, Any]) -> dict[str, Any]:
        """Where open_clip says that the weights are; empty for a file or random weights. Reads nothing."""
        tag = self._tag(pretrained)
        if tag is None:
            return {}
        if self.files:
            return {"file": lookup(self.files, tag, f"pretrained tag of {self.arch}")}
        source = open_clip.get_pretrained_cfg(self.arch, tag)
        if not source:
            raise unknown(f"pretrained tag of {self.arch}", tag, open_clip.list_pretrained_tags_by_model(self.arch))
        if source.get("quick_gelu", False) != config.get("quick_gelu", False):
            with_or_without = "with" if source.get("quick_gelu") else "without"
            quickgelu_arch = f"{self.arch}-quickgelu"
            hint = f", or backbone open_clip:{quickgelu_arch}" if quickgelu_arch in open_clip.list_models() else ""
            raise UserError(
                f"pretrained '{tag}' was trained {with_or_without} QuickGELU and {self.arch} is not: features would be "
                f"wrong; choose a tag of the same activation{hint}"
            )
        return source

    def _file(self, pretrained: str, source: dict[str, Any], config: dict[str, Any]) -> Path:
        """The file with the weights, downloaded if it is not here."""
        if not source:
            if config.get("quick_gelu"):  # the file itself does not say which activation it was trained with
                log.info("%s is taken to have been trained with QuickGELU, as OpenAI's weights", pretrained)
            return local_file(pretrained)
        if "file" in source:
            return Path(source["file"])
        return download_open_clip_weights(self.arch, str(self._tag(pretrained)), source)

    def _pixel_stats(self, pretrained: str | None) -> PixelStats:
        """Mean and deviation of the images that the weights were trained on."""
        preprocessing = self._preprocessing(pretrained)
        return tuple(preprocessing["mean"]), tuple(preprocessing["std"])

    def _preprocessing(self, pretrained: str | None) -> Mapping[str, Any]:
        """mean, std and interpolation of a tag; for a file those of the first tag listed, or open_clip's defaults."""
        tags = [self._tag(pretrained) or "", *open_clip.list_pretrained_tags_by_model(self.arch)]
        listed = filter(None, (open_clip.get_pretrained_cfg(self.arch, tag) for tag in tags))
        return next(listed, asdict(open_clip.transform.PreprocessCfg()))


def find_open_clip_backbone(name: str) -> OpenClipBackbone:
    """The backbone `open_clip:<name>`.

    Args:
        name: open_clip's model name, or the path of a model config file of open_clip, which ends in .json.

    Raises:
        UserError: open_clip does not know the name, or the file is missing or describes no CLIP with CLIP's tokenizer.
    """
    if name.endswith(".json"):
        return OpenClipBackbone(name, tag=None, config=open_clip_files.checked_config(name), interpolation=None)
    if name not in open_clip.list_models():
        raise unknown("open_clip model", name, open_clip.list_models())
    return OpenClipBackbone(name, tag=None, interpolation=None)


def tokenize(arch: str, sentences: Sequence[str]) -> Tensor:
    """Tokenize sentences for a model. Its tokenizer is loaded when first used, because some are downloaded.

    Args:
        arch: open_clip's model name.
        sentences: n sentences.

    Returns:
        Token ids [n, length].

    Raises:
        UserError: the tokenizer is not here and cannot be downloaded, or a package that it needs is missing.
    """
    return _tokenizer(arch)(list(sentences))


@cache
def _tokenizer(arch: str) -> Any:
    online = "hf_tokenizer_name" in open_clip.get_model_config(arch)["text_cfg"]
    try:
        with hub_or_cache() if online else nullcontext():
            return open_clip.get_tokenizer(arch)
    except (OSError, ImportError, ValueError, hub_errors.HfHubHTTPError) as error:
        reason = str(error).strip().split("\n", 1)[0][:120]
        raise UserError(
            f"the tokenizer of {arch} cannot be loaded ({reason}); go online once, or choose init_head class_mean, "
            "which reads no text"
        ) from error
