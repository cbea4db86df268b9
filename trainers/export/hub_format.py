"""Export format `hub`: a folder in the layout of a model repository of the Hugging Face Hub.

`tailtune.load` reads `config.yaml` and `checkpoint/`. If a plain network of a library can hold the model, the merged
weights are there, too; if the library is timm, `config.json` describes them to `timm.create_model`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from tailtune.configs.errors import UserError
from tailtune.configs.lazy_module import lazy_module
from tailtune.models.backbones.pretrained_weights import is_path
from tailtune.trainers.export import merged_format
from tailtune.trainers.export.exported_model import ExportedModel, SharedRun, before_head
from tailtune.trainers.export.loading_code import preprocessing
from tailtune.trainers.export.model_card import model_card
from tailtune.trainers.storage.atomic_io import FACTS, TENSORS, Digest, write_bytes, write_json
from tailtune.trainers.storage.manifest import Manifest, read_bytes, read_json

timm = lazy_module("timm")
CHECKPOINT, CONFIG, CARD = "checkpoint", "config.yaml", "README.md"
RUN_FILES = (CONFIG, "tailtune.json", f"{CHECKPOINT}/*")
"""Patterns of the files that `tailtune.load` reads."""
LOAD = """import tailtune
model = tailtune.load('.')
def predict(images):
    return model.predict_logits(images)"""
TIMM_VITS = {1e-5: "vit_base_patch16_clip_224", 1e-6: "vit_base_patch16_224"}
"""ε of the norms of a ViT → name of a ViT of timm with this ε. Everything else that differs is an argument."""
TOLERANCE = 1e-3
"""Largest allowed difference between the outputs of timm's network and of the model, relative to the largest one."""


def check(exported: ExportedModel) -> None:
    """Raise a `UserError` if others could not get the pre-trained weights of the model."""
    pretrained = exported.facts.get("pretrained")
    if pretrained is not None and is_path(pretrained):
        raise UserError(
            f"export hub: a checkpoint holds only what was trained, and the pre-trained weights are in your file "
            f"{pretrained}, which nobody else has; use export merged or onnx"
        )


@torch.no_grad()
def write(exported: ExportedModel, folder: Path) -> dict[str, Any]:
    """Write the files of the repository.

    Args:
        exported: the model.
        folder: the folder to write into.

    Returns:
        Facts for `facts.json`.

    Raises:
        UserError: the checkpoint is one of another project.
    """
    run = exported.run
    if run is None:
        raise UserError("export hub: the checkpoint is one of another project; use export merged or onnx")
    facts: dict[str, Any] = {"how_to_load": LOAD}
    timm_config = None
    if merged_format.can_hold(exported):
        facts = merged_format.write(exported, folder)
        timm_config = timm_config_of(exported, facts["network"])
    if timm_config is not None:
        write_json(folder / "config.json", timm_config)
        _check_timm(exported, folder, timm_config["num_classes"] > 0)
    _copy_run(run, folder)
    facts["timm"] = timm_config is not None
    facts["command"] = without_places(list(exported.command))
    card = model_card(exported, facts, run.metrics)
    write_bytes(folder / CARD, card.encode(errors="backslashreplace"))  # a class name may hold bytes that are no text
    return {**without_places(exported.facts), **facts}


def timm_config_of(exported: ExportedModel, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of `config.json`, by which timm creates the network with its merged weights.

    Args:
        exported: the model.
        about: description of the plain network, see `library_network.network`.

    Returns:
        None if timm has no name for the network.
    """
    arguments = dict(about["kwargs"])
    if about["create"] == "timm.create_model":
        name = arguments.pop("model_name")
        if "set_input_size" in about["then"]:
            arguments["img_size"] = exported.resolution
    elif about["create"] == "timm.models.VisionTransformer":
        name = TIMM_VITS.get(exported.encoder.net.norm.eps)
    else:
        name = None
    if name is None:
        return None
    classes = arguments.pop("num_classes")
    default, steps = timm.get_pretrained_cfg(name).to_dict(), preprocessing(exported)
    kept = ("fixed_input_size", "pool_size", "first_conv", "classifier")
    return {
        "architecture": name,
        "num_classes": classes,
        "num_features": exported.encoder.feature_dim,
        "label_names": list(exported.class_names),
        "pretrained_cfg": {
            **{key: default[key] for key in kept if default.get(key) is not None},
            "num_classes": classes,
            "input_size": [3, exported.resolution, exported.resolution],
            "interpolation": steps["interpolation"],
            "crop_pct": crop_share(exported.resolution, steps["resize_shorter_side"]),
            "crop_mode": "center",
            "mean": steps["mean"],
            "std": steps["std"],
        },
        "model_args": arguments,
    }


def crop_share(side: int, resized: int) -> float:
    """The share `crop_pct` from which timm computes the resized shorter side as ⌊side / share⌋."""
    share = side / resized
    return share if int(side / share) == resized else side / (resized + 0.5)


def _check_timm(exported: ExportedModel, folder: Path, classifies: bool) -> None:
    """Compare timm's network with the model.

    Raises:
        UserError: their outputs differ.
    """
    images, model = exported.images(2), exported.method.model
    net = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    if not classifies and before_head(exported):
        return  # the feature of the model comes after further steps
    expected = exported.method.predict(images) if classifies else model.features(images)
    difference = (net(model.normalised(images)) - expected).abs().max()
    if not difference <= TOLERANCE * expected.abs().max():
        raise UserError(f"export hub: the outputs of timm's network differ by {difference:.2g}; use export onnx")


def _copy_run(run: SharedRun, folder: Path) -> None:
    """Copy the checkpoint and the config of a run. Paths of this machine are replaced by names of files."""
    config = without_places(yaml.safe_load(read_bytes(run.home / CONFIG)))
    facts = read_json(run.home / CHECKPOINT / FACTS)
    facts |= {key: without_places(facts[key]) for key in ("after",) if key in facts}
    digests: dict[Path, Digest] = {
        folder / CONFIG: write_bytes(folder / CONFIG, yaml.safe_dump(config, sort_keys=False).encode()),
        folder / CHECKPOINT / TENSORS: write_bytes(
            folder / CHECKPOINT / TENSORS, read_bytes(run.home / CHECKPOINT / TENSORS)
        ),
        folder / CHECKPOINT / FACTS: write_json(folder / CHECKPOINT / FACTS, facts),
    }
    manifest = Manifest.new(folder)
    manifest.made = sorted({path.relative_to(folder).parts[0] for path in digests})
    manifest.seal(digests)


def without_places(value: Any) -> Any:
    """A value with the last part of each absolute path in place of the path, because others have no use for it."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, str) and value.startswith(("/", "~/")):
        return Path(value).name
    return value
