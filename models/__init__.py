"""`build_model`: from a config to encoder, tuners and head. Nothing below this file sees the config."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from torch import nn

from tailtune.configs import CfgNode, with_values
from tailtune.configs.errors import UserError, lookup, prefix_errors
from tailtune.configs.loader_options import BY_BACKBONE
from tailtune.configs.option import options_from
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.backbone_types import Backbone, ExpertSplit, InputSpec, PixelStats
from tailtune.models.backbones.encoder import Encoder
from tailtune.models.backbones.prompts import DESCRIPTOR, Sentences, fill
from tailtune.models.backbones.recomputation import computed_again
from tailtune.models.backbones.table import BACKBONES, find_backbone
from tailtune.models.backbones.whole_network_encoder import WholeNetworkEncoder
from tailtune.models.classification_model import ClassificationModel
from tailtune.models.heads.classifiers import HEADS, CosineClassifier
from tailtune.models.heads.expert_heads import ExpertHeads, heads_of
from tailtune.models.heads.head_init import HEAD_INITS, NEEDS_TEXT, HeadInit
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.text_mode import check_text_options, classifies_by_text, connect_texts
from tailtune.models.tuners.peft_adapter import PeftAdapter
from tailtune.models.tuners.peft_wrapper import add_peft
from tailtune.models.tuners.table import TUNERS, add_tuners
from tailtune.models.tuners.tuner_options import Case, TunerOptions

__all__ = ["BACKBONES", "ClassificationModel", "build_model", "find_backbone", "resolve", "tuner_options"]

HALF = (0.5, 0.5, 0.5)


def build_model(
    cfg: CfgNode,
    class_names: Sequence[str],
    fast: bool = True,
    descriptors: Sentences | None = None,
    pixel_stats: PixelStats = (HALF, HALF),
) -> ClassificationModel:
    """Build the model of a config, ready to train. On the meta device it has shapes only, and no weights are read.

    Args:
        cfg: a resolved config.
        class_names: names of the C classes.
        fast: False builds the plain formulation of a ViT, for comparison.
        descriptors: sentences of each class, for `prompt descriptor`; not needed on the meta device.
        pixel_stats: mean and deviation of the data, for a backbone without pre-trained weights.

    Raises:
        UserError: an unknown name, weights that are not there, or options that do not go together.
    """
    spec = find_backbone(cfg.backbone)
    _check_input(cfg, spec.inputs(cfg.pretrained))
    sentences = _sentences(cfg, class_names, descriptors)
    tuners = [name for name in (*TUNERS, "peft") if cfg[name]]
    split = ExpertSplit(cfg.num_experts, cfg.expert_split, cfg.reduce_dimension)
    check_text_options(cfg, spec)
    project = cfg.zero_shot or classifies_by_text(cfg)
    backbone = spec.build(cfg.pretrained, cfg.resolution, cfg.seed, project, fast, split)
    encoder = backbone.encoder
    _set_computation(cfg, encoder)
    if cfg.zero_shot:
        head = _zero_shot_head(cfg, backbone, tuners, len(class_names))
    else:
        add_tuners(encoder, tuner_options(cfg, tuners, len(class_names), encoder), cfg.partial, cfg.seed)
        head = _head(cfg, encoder.feature_dim, len(class_names))
    peft = _peft(cfg, encoder)
    tower = connect_texts(cfg, backbone, heads_of(head)[0], class_names, sentences)
    for each in (encoder, tower):
        if each is not None:
            each.set_precision()
    mean, std = backbone.pixel_stats or pixel_stats
    stats = (cfg.pixel_mean or mean, cfg.pixel_std or std)
    init = _head_init(cfg, backbone, sentences)
    return ClassificationModel(encoder, head, stats, init, backbone.random_base, peft, tower)


def _set_computation(cfg: CfgNode, encoder: Encoder) -> None:
    """Let blocks be computed again in the backward pass, if wanted. Raises a `UserError` for what it cannot compute."""
    as_whole = isinstance(encoder, WholeNetworkEncoder)
    if cfg.residual_dtype and as_whole:
        raise UserError(f"residual_dtype works on ViTs only, and {cfg.backbone} does not run as one; leave it out")
    if cfg.grad_checkpoint and cfg.prec == "fp16" and as_whole:  # its weights are other tensors in the backward pass
        raise UserError(f"grad_checkpoint does not go with prec fp16 on {cfg.backbone}; use prec amp or bf16")
    if cfg.grad_checkpoint:
        encoder.compute_parts_by(computed_again)


def _check_input(cfg: CfgNode, inputs: InputSpec) -> None:
    """Raise a `UserError` for pixels that the backbone cannot take."""
    if cfg.pixel_std and min(cfg.pixel_std) <= 0:
        raise UserError(f"pixel_std {cfg.pixel_std} divides the pixels: all three numbers must be above 0")
    patch_size = inputs.patch_size
    if patch_size and cfg.resolution % patch_size and cfg.resolution != inputs.resolution:
        raise UserError(  # the ViT would ignore the pixels that are left over
            f"resolution {cfg.resolution} must be a multiple of {patch_size}, the patch size of {cfg.backbone}"
        )


def resolve(cfg: CfgNode) -> CfgNode:
    """Fill in what a config leaves to the backbone: resolution, interpolation and expand.

    Args:
        cfg: a config; it stays as it is.

    Returns:
        A frozen copy with these three values.

    Raises:
        UserError: there is no such backbone.
    """
    with prefix_errors("backbone"):
        inputs = find_backbone(cfg.backbone).inputs(cfg.pretrained)
    return with_values(cfg, **{key: getattr(inputs, key) for key in BY_BACKBONE if cfg[key] is None})


def tuner_options(cfg: CfgNode, names: Iterable[str], classes: int, encoder: Encoder) -> dict[str, TunerOptions]:
    """The options of tuners, such as the LoRA rank: from the config, or by `tuner_rules` where it leaves them open.

    Args:
        cfg: a config.
        names: of tuners; those that are not entries of TUNERS are left out.
        classes: number of classes.
        encoder: the encoder on which the tuners will act.

    Returns:
        Entry of TUNERS → its options.
    """
    found: dict[str, TunerOptions] = {}
    for name in (name for name in names if name in TUNERS):
        options = options_from(type(TUNERS[name].options), cfg, name, separator="_")
        selected = len(TUNERS[name].blocks_of(encoder, options, cfg.partial))
        found[name] = options.filled(Case(classes, encoder.depth, selected, encoder.width, cfg.tuner_rules))
    return found


def _zero_shot_head(cfg: CfgNode, backbone: Backbone, tuners: Sequence[str], classes: int) -> nn.Module:
    """The cosine classifier of zero-shot, which never trains. Raises `UserError` where anything else would train."""
    if tuners:
        raise UserError(
            f"zero_shot trains nothing, so {', '.join(tuners)} would do nothing; set zero_shot or the tuners to False"
        )
    if cfg.num_experts > 1:
        raise UserError(f"zero_shot has a single classifier, made of texts; leave out num_experts {cfg.num_experts}")
    assert backbone.embed_dim is not None  # without a text encoder `project` has been refused
    scale = backbone.text_encoder.logit_scale if backbone.text_encoder else 1.0
    return CosineClassifier(backbone.embed_dim, classes, scale).requires_grad_(False)


def _head(cfg: CfgNode, dim: int, classes: int) -> nn.Module:
    """One head, or one for each expert; the heads of experts draw different random weights."""
    head_class = lookup(HEADS, cfg.classifier, "classifier")
    options = asdict(options_from(head_class.Options, cfg, cfg.classifier))
    with seeded(cfg.seed, "head"):
        if head_class is TextClassifier and cfg.num_experts > 1:
            return ExpertHeads([head_class(dim, classes, **options)] * cfg.num_experts)  # there is one set of texts
        heads = [head_class(dim, classes, **options) for _ in range(cfg.num_experts)]
    return heads[0] if cfg.num_experts == 1 else ExpertHeads(heads)


def _peft(cfg: CfgNode, encoder: Encoder) -> PeftAdapter | None:
    """The tuner of the peft library that `peft` names."""
    if cfg.peft is None and cfg.peft_args:
        raise UserError(
            "peft_args are options of a tuner of the peft library, and none is chosen; choose one, such as `peft LoRA`"
        )
    return add_peft(encoder, cfg.peft, cfg.peft_args or {}, cfg.partial, cfg.resolution, cfg.seed) if cfg.peft else None


def _head_init(cfg: CfgNode, backbone: Backbone, sentences: Sentences) -> HeadInit | None:
    """How the head is filled before training; None: it keeps its random weights."""
    name = "text_feat" if cfg.zero_shot or classifies_by_text(cfg) else cfg.init_head
    if name is None:
        return None
    initial_weight = lookup(HEAD_INITS, name, "init_head")
    if name in NEEDS_TEXT and backbone.embed_dim is None:
        raise UserError(f"init_head {name} needs a text encoder, and {cfg.backbone} has none; try class_mean")
    return HeadInit(initial_weight, backbone.text_encoder if name in NEEDS_TEXT else None, sentences)


def _sentences(cfg: CfgNode, class_names: Sequence[str], descriptors: Sentences | None) -> Sentences:
    """The sentences that the text encoder reads about each class. Raises `UserError` for an unknown prompt."""
    if cfg.prompt != DESCRIPTOR:
        return fill(class_names, cfg.prompt)
    if not cfg.descriptors:
        raise UserError("prompt descriptor needs `descriptors`, a JSON file of class name → list of strings")
    return descriptors or ()
