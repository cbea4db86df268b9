"""Which data sets a shipped model config is meant for, above all."""

from tailtune.configs import names

MAIN = {
    "tiny_clip": ("digits_lt",),
    "zstiny_clip": ("digits_lt",),
    "resnet32": ("cifar100_ir100",),
    "resnet10": ("imagenet_lt",),
    "resnet50": ("imagenet_lt", "inat2018"),
    "resnext50": ("imagenet_lt",),
    "resnet152": ("places_lt",),
}
"""How a model's name begins → its data; any other model is for all, of which iNaturalist has the most classes."""
PAIRS = [
    (data, model)
    for model in names("model")
    for data in next((each for start, each in MAIN.items() if model.startswith(start)), ("inat2018",))
]
"""Data config and model config."""
