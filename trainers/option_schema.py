"""`declared`: the schema of all options, collected from the option classes and the tables. There is no other list."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from tailtune.configs import Schema, names
from tailtune.configs.key import Key
from tailtune.configs.loader_options import LoaderOptions
from tailtune.configs.option import Declaration, declarations
from tailtune.configs.value_parsers import as_bool
from tailtune.datasets.images.transforms import AUGMENTS
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.datasets.options import DataOptions, EvaluatedImageOptions
from tailtune.datasets.table import DATASETS
from tailtune.datasets.test_distributions.options import DirichletOptions, ShiftOptions
from tailtune.models import BACKBONES
from tailtune.models.backbones.prompts import PROMPTS
from tailtune.models.feature_adapters import FeatureAdapterOptions
from tailtune.models.heads.classifiers import HEADS
from tailtune.models.heads.head_init import HEAD_INITS
from tailtune.models.options import ExpertOptions, ModelOptions, TunerPlaceOptions
from tailtune.models.text_contexts import ContextOptions
from tailtune.models.text_mode import TextMemoryOptions
from tailtune.models.tuners.peft_table import PEFTS
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.text_tuners import TEXT_TUNERS, TextTunerOptions
from tailtune.trainers.evaluation.adaptation_table import ADAPTS, AdaptOptions
from tailtune.trainers.evaluation.ensembles import ENSEMBLES, EnsembleOptions
from tailtune.trainers.evaluation.target_prior import TARGETS, TargetOptions
from tailtune.trainers.evaluation.tta import TestTimeOptions
from tailtune.trainers.evaluation.validation import ValidationOptions
from tailtune.trainers.feature_store import FeatureOptions
from tailtune.trainers.flat_minima import SAM_MODES, SamChoice
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import METHODS
from tailtune.trainers.methods.options import MethodOptions
from tailtune.trainers.optimizers_and_schedules import OPTIMIZERS, SCHEDULES
from tailtune.trainers.runs.merged_runs import MergeOptions
from tailtune.trainers.trackers import TrackerOptions
from tailtune.trainers.training_options import RunOptions, TrainingOptions

TABLES: Mapping[str, Mapping[str, Any]] = {
    "ADAPTS": ADAPTS,
    "AUGMENTS": AUGMENTS,
    "BACKBONES": BACKBONES,
    "DATASETS": DATASETS,
    "ENSEMBLES": ENSEMBLES,
    "HEADS": HEADS,
    "HEAD_INITS": HEAD_INITS,
    "LOSSES": LOSSES,
    "METHODS": METHODS,
    "OPTIMIZERS": OPTIMIZERS,
    "PEFTS": PEFTS,
    "PROMPTS": PROMPTS,
    "SAMPLERS": SAMPLERS,
    "SAM_MODES": SAM_MODES,
    "SCHEDULES": SCHEDULES,
    "TARGETS": TARGETS,
}
"""Name in `Key.table` → table whose entries are the values of the option."""


def declared() -> Schema:
    """The schema of all options, in the order of the documentation."""
    return Schema(_declarations(), _coupled())


def _declarations() -> Iterator[Declaration]:
    yield from declarations(LoaderOptions, "Set by the loader")
    yield from declarations(DataOptions, "Data")
    yield from declarations(ModelOptions, "Model")
    yield from _of_entries(HEADS, "Model", "classifier")
    yield from declarations(ExpertOptions, "Experts")
    yield from declarations(TunerPlaceOptions, "Tuners")
    for name, tuner in TUNERS.items():
        yield Declaration(name, Key(as_bool, False, tuner.doc, zero_shot=False), "Tuners", name)
    for name, tuner in TUNERS.items():
        yield from declarations(type(tuner.options), "Tuners", name, separator="_", reader=name)
    yield from _of_text_tower()
    yield from declarations(MethodOptions, "Method, loss and sampler")
    for name, loss in LOSSES.items():
        if loss.options is not None:
            yield from declarations(type(loss.options), "Method, loss and sampler", name, reader=f"loss_type {name}")
    yield from declarations(MergeOptions, "Method, loss and sampler")
    yield from declarations(TrainingOptions, "Training")
    yield from _of_entries(OPTIMIZERS, "Training", "optimizer")
    yield from _of_entries(SCHEDULES, "Training", "schedule")
    yield from declarations(SamChoice, "Training")
    yield from _of_entries(SAM_MODES, "Training", "sam")
    yield from declarations(ValidationOptions, "Validation during training")
    yield from declarations(TestTimeOptions, "Evaluation")
    yield from declarations(EvaluatedImageOptions, "Evaluation")
    yield from declarations(ShiftOptions, "Test distributions")
    yield from declarations(
        DirichletOptions, "Test distributions", "dirichlet", separator="_", reader="test_dists dirichlet*"
    )
    yield from declarations(AdaptOptions, "Test-time adaptation")
    yield from _of_entries(ADAPTS, "Test-time adaptation", "adapt")
    yield from declarations(TargetOptions, "Target prior")
    yield from declarations(EnsembleOptions, "Ensembles")
    yield from _of_entries(ENSEMBLES, "Ensembles", "ensemble")
    yield from declarations(RunOptions, "How it runs")
    yield from declarations(FeatureOptions, "How it runs")
    yield from declarations(TrackerOptions, "How it runs")
    for name, method in METHODS.items():
        yield from declarations(method.Options, f"Method {name}", name, method=name, reader=f"method {name}")


def _of_entries(table: Mapping[str, Any], section: str, choice: str) -> Iterator[Declaration]:
    """The options of the entries of a table, one of which the option `choice` chooses."""
    for name, entry in table.items():
        yield from declarations(entry.Options, section, name, reader=f"{choice} {name}")


def _of_text_tower() -> Iterator[Declaration]:
    for name, of_images in TEXT_TUNERS.items():
        doc = f"The tuner {of_images} acts in the text tower of classifier TextClassifier."
        yield Declaration(name, Key(as_bool, False, doc, zero_shot=False), "Text tower", name)
    yield from declarations(TextTunerOptions, "Text tower")
    yield from _read_by_text_tuners()
    yield from declarations(ContextOptions, "Text tower")
    yield from declarations(FeatureAdapterOptions, "Text tower")
    yield from declarations(TextMemoryOptions, "Text tower")


def _read_by_text_tuners() -> Iterator[Declaration]:
    """The options that a tuner of the text tower reads: sizes of its own, and others of the image tower's tuner."""
    sizes = {declaration.field: declaration for declaration in declarations(TextTunerOptions, "Text tower")}
    for name, of_images in TEXT_TUNERS.items():
        yield replace(sizes["partial"], reader=name)
        for declaration in declarations(type(TUNERS[of_images].options), "Tuners", of_images, separator="_"):
            if declaration.field == "layers" or (declaration.field == "ratio" and of_images != "mask"):
                continue  # in the text tower only text_tuner_args sets them
            yield replace(sizes.get(declaration.field, declaration), entry="", reader=name, aliases=())


def _coupled() -> dict[str, Collection[str]]:
    """Option → the values that make the result depend on the images that a process holds at once, or a rule's name."""
    methods = [name for name, method in METHODS.items() if method.depends_on_batch]
    return {
        "method": methods,
        "loss_type": [name for name, loss in LOSSES.items() if loss.couples],
        "h2t.inner": methods,
        "peft_args": "dropout",
        "textclassifier.samples": "set",
        **{name: "set" for name, tuner in TUNERS.items() if tuner.on_batch or tuner.draws},
        **{name: "set" for name, tuner in TEXT_TUNERS.items() if TUNERS[tuner].draws},
    }


def choices_of(key: str, entry: Key) -> tuple[str, ...]:
    """The values from which an option is chosen, or the names that it knows; empty if every value is accepted."""
    return tuple(names("model")) if key == "after" else entry.choices or tuple(TABLES.get(entry.table, ()))
