"""open_clip's model of a CLIP with random weights."""

from contextlib import nullcontext
from typing import Any

from tailtune.configs.errors import UserError
from tailtune.configs.lazy_module import lazy_module
from tailtune.configs.seeding import seeded
from tailtune.models.backbones.open_clip_image_encoders import vision_config
from tailtune.models.backbones.pretrained_weights import hub_or_cache

open_clip = lazy_module("open_clip")
hub_errors = lazy_module("huggingface_hub.errors")


def random_clip(arch: str, config: dict[str, Any], resolution: int, seed: int) -> Any:
    """open_clip's model with random weights, of the class that its own factory would choose.

    Args:
        arch: open_clip's model name, for the error.
        config: open_clip's config of the whole model.
        resolution: side of the images, in pixels.
        seed: of the random weights.

    Raises:
        UserError: the text encoder is described on the Hugging Face hub, which cannot be reached.
    """
    text = config["text_cfg"]
    model_class = open_clip.CustomTextCLIP if config.get("custom_text") or "hf_model_name" in text else open_clip.CLIP
    model_class = open_clip.CoCa if "multimodal_cfg" in config else model_class
    arguments = {name: value for name, value in config.items() if name != "custom_text"}
    if "hf_model_name" in text:
        arguments["text_cfg"] = {**text, "hf_model_pretrained": False}
    try:
        with seeded(seed, "backbone"), hub_or_cache() if "hf_model_name" in text else nullcontext():
            return model_class(**{**arguments, "vision_cfg": vision_config(config, resolution)})
    except (OSError, hub_errors.HfHubHTTPError) as error:
        raise UserError(
            f"the text encoder of {arch} ({text['hf_model_name']}) is described on the Hugging Face hub, which cannot "
            "be reached; choose another backbone, or go online once"
        ) from error
