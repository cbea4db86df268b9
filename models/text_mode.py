"""Text mode: the model whose classifier is made of text features that change while it trains."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError
from tailtune.configs.option import option, options_from, value_of
from tailtune.models.backbones.backbone_types import Backbone, BackboneSpec
from tailtune.models.backbones.class_texts import tokenized
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone
from tailtune.models.backbones.prompts import Sentences, fill
from tailtune.models.backbones.text_tower import GIB, TextTower
from tailtune.models.classification_model import ClassificationModel
from tailtune.models.feature_adapters import FeatureAdapterOptions, add_feature_adapters
from tailtune.models.heads.classifiers import CosineClassifier
from tailtune.models.heads.expert_heads import ExpertHeads, heads_of
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.heads.tip_adapter import TipAdapter
from tailtune.models.maple import add_maple
from tailtune.models.text_contexts import COOP, MAPLE, NONE, ContextOptions, add_contexts
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.text_tuners import TEXT_TUNERS, TextTunerOptions, add_text_tuners

HEAD, TIP = TextClassifier.__name__, TipAdapter.__name__
OFF = {"context": NONE, "clip_adapter": NONE, "projection_tuning": False}
"""Further options that act on text features, or beside them → the value that turns them off."""


@dataclass(frozen=True)
class TextMemoryOptions:
    """How the text tower trains."""

    text_memory: float = option(
        8.0,
        "GiB of activations of class texts that are kept for the backward pass. What is beyond is computed again, "
        "which takes longer and gives the same gradients.",
        cls="runtime",
        least=0.0,
    )


def classifies_by_text(cfg: CfgNode) -> bool:
    """Whether the classifier compares image features with text features, in the space that they share."""
    return cfg.classifier in (HEAD, TIP) and not cfg.zero_shot


def in_text_mode(cfg: CfgNode) -> bool:
    """Whether the classifier is made of text features that may train. Zero-shot has a classifier of its own."""
    return bool(cfg.classifier == HEAD) and not cfg.zero_shot


def check_text_options(cfg: CfgNode, spec: BackboneSpec) -> None:
    """Refuse what does not go together with text mode, and without it what acts on the text features.

    Args:
        cfg: a resolved config.
        spec: its backbone.

    Raises:
        UserError: says what to change.
    """
    if not in_text_mode(cfg) and (asked := _asked(cfg)):
        raise UserError(
            f"{', '.join(asked)}: only classifier {HEAD} reads the text features while they train; set it, or leave "
            "this out"
        )
    if not classifies_by_text(cfg):
        return
    if not isinstance(spec, OpenClipBackbone):
        raise UserError(
            f"classifier {cfg.classifier} needs a text encoder, and {cfg.backbone} has none; choose a CLIP backbone"
        )
    if cfg.init_head not in (None, "text_feat"):
        raise UserError(f"classifier {cfg.classifier} consists of text features; leave out init_head {cfg.init_head}")
    if cfg.classifier == TIP:
        _check_tip(cfg)
        return
    if cfg.context != NONE and cfg.prompt != "default":
        raise UserError(f"context {cfg.context} has sentences of its own; leave out prompt {cfg.prompt}")
    if cfg.num_experts > 1 and not cfg.expert_split:
        raise UserError(
            f"classifier {HEAD} is the same for all experts, so num_experts {cfg.num_experts} needs blocks of the "
            "image encoder in which they differ: set expert_split to their number, or num_experts 1"
        )


def _check_tip(cfg: CfgNode) -> None:
    """Refuse what would train, or differ between experts, where text features and a cache of images classify."""
    trains = [name for name in (*TUNERS, "peft") if cfg[name]]
    if trains or cfg.num_epochs:
        raise UserError(
            f"classifier {TIP} trains nothing; set num_epochs 0"
            + (f", and leave out {', '.join(trains)}" if trains else "")
        )
    if cfg.num_experts > 1:
        raise UserError(f"classifier {TIP} is the same for all experts; set num_experts 1")


def _asked(cfg: CfgNode) -> list[str]:
    """The options that are set and act on the text features."""
    return [*(name for name in TEXT_TUNERS if cfg[name]), *(name for name, off in OFF.items() if cfg[name] != off)]


def starts_at_random(cfg: CfgNode) -> bool:
    """Whether the classifier of a run starts from random numbers."""
    if in_text_mode(cfg):
        return bool(cfg.context != NONE and cfg.context_words is None)
    return cfg.init_head is None


def connect_texts(
    cfg: CfgNode, backbone: Backbone, head: nn.Module, class_names: Sequence[str], sentences: Sentences
) -> TextTower | None:
    """Give a head that reads text features what it needs: a text tower, adapters of features, or the scale.

    Args:
        cfg: a resolved config.
        backbone: the backbone; adapters and contexts change its encoder.
        head: the head, which is changed in place.
        class_names: names of the C classes.
        sentences: one or more sentences of each class; empty on the meta device if they are not known.

    Returns:
        The text tower; None for other heads.
    """
    if isinstance(head, TipAdapter) and head.scale is None:
        head.scale = backbone.text_encoder.logit_scale if backbone.text_encoder else 1.0
    if not isinstance(head, TextClassifier):
        return None
    tower = build_text_tower(cfg, backbone, class_names, sentences)
    head.attach(tower)
    add_feature_adapters(backbone.encoder, head, tower, options_from(FeatureAdapterOptions, cfg), cfg.seed)
    return tower


def build_text_tower(cfg: CfgNode, backbone: Backbone, class_names: Sequence[str], sentences: Sentences) -> TextTower:
    """The text tower of text mode, with its tuners and the texts of the classes.

    Args:
        cfg: a resolved config.
        backbone: the backbone.
        class_names: names of the C classes.
        sentences: one or more sentences of each class; empty on the meta device if they are not known.

    Raises:
        UserError: the backbone has no text encoder that can be a host.
    """
    if backbone.text_tower is None:
        raise UserError(
            f"classifier {HEAD} runs text encoders of OpenAI's kind only, and that of {cfg.backbone} is another; "
            "choose CosineClassifier with init_head text_feat"
        )
    tower = backbone.text_tower()
    tower.memory = int(cfg.text_memory * GIB)
    with torch.device("cpu"):  # ids have values on the meta device, too
        tower.set_texts(tokenized(tower.tokenizer, sentences or fill(class_names, "default")))
    tuners = {
        name: options_from(type(TUNERS[tuner].options), cfg, tuner, separator="_")
        for name, tuner in TEXT_TUNERS.items()
        if cfg[name]
    }
    add_text_tuners(tower, tuners, options_from(TextTunerOptions, cfg), len(class_names), cfg.seed)
    contexts = options_from(ContextOptions, cfg)
    if contexts.kind == COOP:  # after the tuners, which freeze everything else
        add_contexts(tower, contexts, class_names, cfg.seed)
    if contexts.kind == MAPLE:
        add_maple(tower, backbone.encoder, contexts, class_names, cfg.seed)
    if value_of(cfg, f"{HEAD.lower()}.samples") is not None and not tower.one_sentence_each:
        raise UserError("textclassifier.samples takes one sentence for each class; choose another prompt")
    return tower


@torch.no_grad()
def with_fixed_texts(model: ClassificationModel) -> ClassificationModel:
    """The same model with the text features as the weight of a cosine classifier, and without a text tower.

    A model whose classifier has an adapter of images, which no cosine classifier has, is returned as it is.

    Args:
        model: the model; it stays as it is.
    """
    head = heads_of(model.head)[0]
    if not isinstance(head, TextClassifier) or head.adapter is not None:
        return model
    assert head.scale is not None, "attached"
    fixed = CosineClassifier(1, 1, head.scale)
    fixed.weight = nn.Parameter(head.class_features().detach().clone(), requires_grad=False)
    experts = model.num_experts
    return with_modules(model, head=fixed if experts == 1 else ExpertHeads([fixed] * experts), text=None)


def with_modules(module: ClassificationModel, **modules: nn.Module | None) -> ClassificationModel:
    """A copy of a module that shares all of its tensors, with other modules in some places."""
    other = copy.copy(module)
    other._modules = {**module._modules, **modules}
    return other
