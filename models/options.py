"""Options of the model: the backbone, its input, the classifier, the experts, and where tuners act."""

from dataclasses import dataclass

from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_int, as_mapping, as_path, as_span, as_str, as_triple
from tailtune.models.tuners.tuner_options import RULES


@dataclass(frozen=True)
class ModelOptions:
    """Backbone and classifier."""

    backbone: str = option(
        "CLIP-ViT-B/16",
        "Image encoder: a name of the table, `open_clip:NAME`, `open_clip:FILE.json` for a CLIP of your own, or "
        "`timm:NAME`.",
        table="BACKBONES",
    )
    pretrained: str | None = option(
        "default",
        "Weights of the backbone: `default`, a tag of open_clip, or a local file. None means random weights.",
        as_path,
        optional=True,
    )
    resolution: int | None = option(
        None,
        "Side of the square input image, in pixels. None means that of the backbone's pre-training.",
        as_int,
        least=1,
        most=4096,
        held_with="encoder",
    )
    pixel_mean: list[float] | None = option(
        None,
        "Mean of the red, green and blue pixels (0 to 1) that is subtracted from an image. None means that of the "
        "backbone's pre-training.",
        as_triple,
        held_with="encoder",
    )
    pixel_std: list[float] | None = option(
        None,
        "Standard deviation of the red, green and blue pixels (0 to 1) that an image is divided by. None means that of "
        "the backbone's pre-training.",
        as_triple,
        held_with="encoder",
    )
    classifier: str = option(
        "CosineClassifier", "Layer that makes logits from the feature.", table="HEADS", held_with="head"
    )
    init_head: str | None = option(
        None, "What the classifier's weights start from. None means random weights.", as_str, table="HEAD_INITS"
    )
    prompt: str = option(
        "default",
        "Sentences that the text encoder reads for each class, for init_head text_feat and zero_shot: a name of the "
        "table, or a sentence with {} for the class name.",
        table="PROMPTS",
        held_with="texts",
    )
    descriptors: str | None = option(
        None,
        "JSON file that maps each class name to a list of sentences, for prompt descriptor.",
        as_path,
        stages="all",
    )
    zero_shot: bool = option(False, "The text features classify the images, and nothing is trained.")


@dataclass(frozen=True)
class ExpertOptions:
    """Several classifiers on one backbone."""

    num_experts: int = option(
        1, "Number of classifiers (experts) whose logits are averaged.", least=1, most=64, zero_shot=False
    )
    expert_split: int | None = option(
        None,
        "Number of last stages or blocks that each expert has for itself; 0 means its classifier only. None means the "
        "number that the backbone suggests.",
        as_int,
        least=0,
        most=100,
        zero_shot=False,
        read_with=("num_experts",),
    )
    reduce_dimension: bool = option(
        False, "The experts' own stages of our ResNets have fewer channels.", zero_shot=False
    )


@dataclass(frozen=True)
class TunerPlaceOptions:
    """Where tuners act, and tuners of the peft library."""

    partial: int | list[int] | None = option(
        None,
        "Blocks of the backbone that tuners act on: a number k for the last k, or a range [start,end). None means all.",
        as_span,
        most=1000,
        zero_shot=False,
    )
    tuner_rules: str = option(
        "lift",
        "Rules for the sizes and the first weights of tuners that nobody gives: those of LIFT depend on all blocks of "
        "the backbone, and those of LIFT+ (lift_plus) on the blocks that a tuner acts on.",
        choices=RULES,
        zero_shot=False,
    )
    peft: str | None = option(
        None,
        "Tuner of the peft library that is put around layers of the backbone.",
        as_str,
        table="PEFTS",
        zero_shot=False,
        held_with="encoder",
    )
    peft_args: dict[str, object] | None = option(
        None,
        "Configuration of the tuner that `peft` names, such as {r: 8, target_modules: [qkv]}.",
        as_mapping,
        zero_shot=False,
        held_with="encoder",
    )
