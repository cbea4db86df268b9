"""`build_model`: from a config to encoder + tuners + head. Below this file nothing sees the config."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from torch import nn

from tailtune.configs import CfgNode
from tailtune.configs.errors import UserError, lookup, naming
from tailtune.configs.option import options_from
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.generic import GenericEncoder
from tailtune.models.backbones.prompts import DESCRIPTOR, Sentences, fill
from tailtune.models.backbones.spec import Backbone, Split, Stats
from tailtune.models.backbones.table import BACKBONES, find_backbone
from tailtune.models.classification_model import ClassificationModel
from tailtune.models.heads.classifiers import HEADS, CosineClassifier
from tailtune.models.heads.expert_heads import ExpertHeads
from tailtune.models.heads.initialisation import HEAD_INITS, NEEDS_TEXT, HeadInit
from tailtune.models.tuners.peft_adapter import PeftAdapter
from tailtune.models.tuners.peft_wrapper import add_peft
from tailtune.models.tuners.table import TUNERS, add_tuners
from tailtune.models.tuners.tuner_options import TunerOptions

__all__ = ["BACKBONES", "ClassificationModel", "build_model", "find_backbone", "resolve", "tuner_options"]

HALF = (0.5, 0.5, 0.5)


def build_model(
    cfg: CfgNode,
    class_names: Sequence[str],
    fast: bool = True,
    descriptors: Sentences | None = None,
    pixels: Stats = (HALF, HALF),
) -> ClassificationModel:
    """The model of a config, ready to train; on the meta device it has shapes only.

    Args:
        cfg: a resolved config.
        class_names: C names.
        fast: False builds the plain formulation of the encoder, for comparison.
        descriptors: sentences of each class, for `prompt descriptor`; not needed on the meta device.
        pixels: mean and deviation of the data, for a backbone that was trained on none.

    Raises:
        UserError: an unknown name, weights that are not there, or parts that do not fit each other.
    """
    if cfg.pixel_std and min(cfg.pixel_std) <= 0:
        raise UserError(f"pixel_std {cfg.pixel_std} divides the pixels: all three numbers must be above 0")
    spec = find_backbone(cfg.backbone)
    inputs = spec.inputs(cfg.pretrained)
    sentences = _sentences(cfg, class_names, descriptors)
    tuners = [name for name in (*TUNERS, "peft") if cfg[name]]
    patch_size = inputs.patch_size
    if patch_size and cfg.resolution % patch_size and cfg.resolution != inputs.resolution:
        raise UserError(  # the rest of the image would be cut off in silence
            f"resolution {cfg.resolution} must be a multiple of {patch_size}, the patch size of {cfg.backbone}"
        )
    split = Split(cfg.num_experts, cfg.expert_split, cfg.reduce_dimension)
    backbone = spec.build(cfg.pretrained, cfg.resolution, cfg.seed, cfg.zero_shot, fast, split)
    encoder = backbone.encoder
    if cfg.residual_dtype and isinstance(encoder, GenericEncoder):
        raise UserError(f"residual_dtype is of the ViT host's own forward, which {cfg.backbone} does not use; leave it")
    if cfg.zero_shot:
        head = _zero_shot_head(cfg, backbone, tuners, len(class_names))
    else:
        add_tuners(encoder, tuner_options(cfg, tuners, len(class_names), encoder), cfg.partial, cfg.seed)
        head = _head(cfg, encoder.feature_dim, len(class_names))
    peft = _peft(cfg, encoder)
    encoder.set_precision()
    own = backbone.stats or pixels
    stats = (cfg.pixel_mean or own[0], cfg.pixel_std or own[1])
    return ClassificationModel(encoder, head, stats, _head_init(cfg, backbone, sentences), backbone.random, peft)


def resolve(cfg: CfgNode) -> CfgNode:
    """The config with what it leaves to the backbone filled in: resolution, interpolation, expand."""
    with naming("backbone"):
        inputs = find_backbone(cfg.backbone).inputs(cfg.pretrained)
    cfg = cfg.clone()
    cfg.defrost()
    for key in ("resolution", "interpolation", "expand"):
        if cfg[key] is None:
            cfg[key] = getattr(inputs, key)
    cfg.freeze()
    return cfg


def tuner_options(cfg: CfgNode, names: Iterable[str], classes: int, encoder: Encoder) -> dict[str, TunerOptions]:
    """Name → options, for those names that are tuners of ours; LIFT's rules where the config leaves them open."""
    sizes = (classes, encoder.depth, encoder.feature_dim)
    return {
        name: options_from(type(TUNERS[name].options), cfg, name, separator="_").filled(*sizes)
        for name in names
        if name in TUNERS
    }


def _zero_shot_head(cfg: CfgNode, backbone: Backbone, tuners: Sequence[str], classes: int) -> nn.Module:
    if tuners:
        raise UserError(f"zero_shot trains nothing, so {', '.join(tuners)} would be left out; set one of them to False")
    if cfg.num_experts > 1:
        raise UserError(f"zero_shot has the one classifier of the text tower; leave out num_experts {cfg.num_experts}")
    assert backbone.embed_dim is not None  # else `project` would have been refused
    scale = backbone.text.logit_scale if backbone.text else 1.0
    return CosineClassifier(backbone.embed_dim, classes, scale).requires_grad_(False)


def _head(cfg: CfgNode, dim: int, classes: int) -> nn.Module:
    """The head, or one for each expert, which differ by their random start."""
    make = lookup(HEADS, cfg.classifier, "classifier")
    options = asdict(options_from(make.Options, cfg, cfg.classifier))
    with seeded(cfg.seed, "head"):
        heads = [make(dim, classes, **options) for _ in range(cfg.num_experts)]
    return heads[0] if cfg.num_experts == 1 else ExpertHeads(heads)


def _peft(cfg: CfgNode, encoder: Encoder) -> PeftAdapter | None:
    if cfg.peft is None and cfg.peft_args:
        raise UserError("peft_args are of a tuner of the peft library, and none is asked for; name one, as `peft LoRA`")
    return add_peft(encoder, cfg.peft, cfg.peft_args or {}, cfg.partial, cfg.resolution, cfg.seed) if cfg.peft else None


def _head_init(cfg: CfgNode, backbone: Backbone, sentences: Sentences) -> HeadInit | None:
    name = "text_feat" if cfg.zero_shot else cfg.init_head
    if name is None:
        return None
    rows = lookup(HEAD_INITS, name, "init_head")
    if name in NEEDS_TEXT and backbone.embed_dim is None:
        raise UserError(f"init_head {name} needs a text tower, and {cfg.backbone} has none; try class_mean")
    return HeadInit(rows, backbone.text if name in NEEDS_TEXT else None, sentences)


def _sentences(cfg: CfgNode, class_names: Sequence[str], descriptors: Sentences | None) -> Sentences:
    """What the text tower reads about each class. Raises `UserError` for an unknown prompt."""
    if cfg.prompt != DESCRIPTOR:
        return fill(class_names, cfg.prompt)
    if not cfg.descriptors:
        raise UserError("prompt descriptor needs `descriptors`, a JSON file of class name → list of strings")
    return descriptors or ()
