"""The model card of a shared model: README.md with the front matter of the Hugging Face Hub."""

import shlex
from collections.abc import Mapping
from typing import Any

from tailtune.configs.lazy_module import lazy_module
from tailtune.trainers.export.exported_model import ExportedModel

hub = lazy_module("huggingface_hub")
open_clip = lazy_module("open_clip")

MEASURES = {
    "accuracy": "Accuracy over all test images",
    "mean_acc": "Mean of the accuracies of the classes",
    "many_acc": "Accuracy of the classes with many training images",
    "med_acc": "Accuracy of the classes with a medium number",
    "few_acc": "Accuracy of the classes with few training images",
    "worst_case_acc": "Accuracy of the worst class",
    "macro_f1": "Macro F1",
    "ece": "Expected calibration error",
}
"""Metric of metrics.json, in % → its name in the card."""
LISTED = 100
"""Up to this number of classes, the card lists all of them."""


def model_card(exported: ExportedModel, facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """The card, as Markdown with YAML front matter.

    Args:
        exported: the model.
        facts: what the export says of it: `command`, `timm` and, for merged weights, `network`.
        metrics: content of metrics.json.
    """
    split = "train" if metrics["evaluation"].get("test_train") else "test"
    measured = {name: metrics["test"][name] for name in MEASURES if metrics["test"].get(name) is not None}
    parts = [
        f"---\n{_front_matter(exported, facts['timm'], measured, split)}\n---",
        f"# {_title(exported)}",
        _summary(exported),
        "## Use",
        _use(exported, facts),
        "## Results",
        f"Measured on the {split} images. All numbers are percentages.",
        _table(("", "%"), [(MEASURES[name], f"{value:.2f}") for name, value in measured.items()]),
        _groups(metrics["evaluation"]),
        "## Classes and training images",
        _classes(exported),
        "## Intended use",
        _intended(exported),
        "## Training",
        _training(facts, metrics),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _title(exported: ExportedModel) -> str:
    return f"{exported.facts['model']} trained on {exported.facts['data']}"


def _front_matter(exported: ExportedModel, for_timm: bool, measured: Mapping[str, float], split: str) -> str:
    """YAML by which the Hub finds the model and shows its results."""
    data = str(exported.facts["data"])
    results = [
        hub.EvalResult(
            task_type="image-classification",
            task_name="Image classification",
            dataset_type=data,
            dataset_name=data,
            dataset_split=split,
            metric_type="accuracy" if name.endswith(("acc", "accuracy")) else name,
            metric_name=MEASURES[name],
            metric_value=round(value, 2),
        )
        for name, value in measured.items()
    ]
    card = hub.ModelCardData(
        model_name=_title(exported),
        library_name="timm" if for_timm else "tailtune",
        pipeline_tag="image-classification",
        tags=["image-classification", "long-tailed-recognition", "tailtune", *(["timm"] if for_timm else [])],
        base_model=base_model(exported),
        eval_results=results,
    )
    return str(card.to_yaml())


def base_model(exported: ExportedModel) -> str | None:
    """Name of the pre-trained weights on the Hugging Face Hub; None if they are not there."""
    published = exported.base
    if published is None:
        return None
    if published.library == "timm":
        return f"timm/{published.name}"
    source = (open_clip.get_pretrained_cfg(published.name, published.tag) or {}).get("hf_hub")
    return "/".join(source.split("/")[:2]) if source else None


def _summary(exported: ExportedModel) -> str:
    about = exported.facts
    parts = [*about["tuners"], *([f"{about['peft']} of peft"] if about["peft"] else [])]
    tuned = "zero-shot, nothing was trained" if exported.zero_shot else f"fine-tuned with {', '.join(parts)}"
    tuned = tuned if parts or exported.zero_shot else "the pre-trained weights are frozen, or trained as a whole"
    weights = f"the weights `{about['pretrained']}`" if about["pretrained"] else "random weights"
    experts = f", {exported.experts} experts" if exported.experts > 1 else ""
    return (
        f"An image classifier for {len(exported.class_names):,} classes: backbone `{about['backbone']}` with "
        f"{weights} ({tuned}){experts}, classifier `{about['classifier']}`. It takes images of "
        f"{exported.resolution} × {exported.resolution} pixels. Trained with TailTune, for classes whose numbers of "
        "training images differ much."
    )


def _use(exported: ExportedModel, facts: Mapping[str, Any]) -> str:
    load = (
        "With TailTune (FOLDER is this folder, or the name USER/NAME of the repository):\n\n```python\n"
        "import tailtune\n"
        'from PIL import Image\n\nmodel = tailtune.load("FOLDER")\nimage = model.preprocess(Image.open("image.jpg"))\n'
        "probabilities = model.predict_logits(image.unsqueeze(0)).softmax(1)\n```"
    )
    if "network" not in facts:
        return load
    plain = "Without TailTune: `python infer.py IMAGE` prints the most probable classes."
    if not facts["timm"]:
        return f"{load}\n\n{plain}"
    within = facts["network"]["kwargs"]["num_classes"]
    what = "logits of the classes" if within else "features; `head.safetensors` has the classifier, see facts.json"
    code = (
        'import timm\n\nnet = timm.create_model("hf-hub:USER/NAME", pretrained=True).eval()  # or "local-dir:FOLDER"\n'
        "data = timm.data.resolve_model_data_config(net)\n"
        f"transform = timm.data.create_transform(**data, is_training=False)\n# net(images) returns the {what}"
    )
    return f"{load}\n\nWith timm alone:\n\n```python\n{code}\n```\n\n{plain}"


def _groups(evaluation: Mapping[str, Any]) -> str:
    many, few = evaluation.get("many_above"), evaluation.get("few_below")
    if many is None or few is None:
        return ""
    return f"Many: more than {many} training images of a class. Few: fewer than {few}. Medium: all others."


def _classes(exported: ExportedModel) -> str:
    counts = list(exported.class_counts)
    if not counts:
        return "The numbers of training images are not recorded. `facts.json` lists the classes."
    text = (
        f"{sum(counts):,} training images of {len(counts):,} classes, from {max(counts):,} to {min(counts):,} of a "
        "class."
    )
    if len(counts) > LISTED:
        return f"{text} `facts.json` lists all classes (`class_names`, `class_counts`)."
    rows = [(_cell(name), f"{count:,}") for name, count in zip(exported.class_names, counts, strict=True)]
    return f"{text}\n\n{_table(('class', 'training images'), rows)}"


def _intended(exported: ExportedModel) -> str:
    calibrated = (
        f"softmax(logits / T) with T = {exported.temperature:.4g} gives probabilities that were calibrated on "
        "validation images."
        if exported.temperature is not None
        else "The probabilities were not calibrated on validation images."
    )
    return (
        "For images like those of the training data, to choose one of the classes above. The model answers with one of "
        "them for any image. Classes with few training images are less reliable: see the results of the groups. "
        f"{calibrated} Licences and limits of the training data and of the pre-trained weights apply, too."
    )


def _training(facts: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    train = metrics.get("train")
    commit = f", commit `{metrics['commit']}`" if metrics.get("commit") else ""
    lines = [f"- Seed {metrics['seed']}{commit}, on {metrics['hardware']}."]
    if train:
        lines.append(f"- {train['epochs']} epochs, {train['steps']:,} steps, {train['seconds']:,.0f} s.")
    versions = ", ".join(f"{name} {version}" for name, version in metrics["packages"].items())
    lines.append(f"- Versions: {versions}.")
    return f"```bash\npython main.py {shlex.join(facts['command'])}\n```\n\n" + "\n".join(lines)


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [" | ".join(("", *cells, "")).strip() for cells in (head, ("---", "---:"), *rows)]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """A text that cannot end a cell or a row of a table."""
    return " ".join(text.replace("|", "\\|").split())
