"""Every option does something: for each key of the table a probe shows an effect beyond the printed config.

A probe names two values and a function that builds or runs with one of them and returns what came of it: parameters,
learning rates, pixels, counts, files, log lines. The two outcomes differ; `make test-slow` also looks that the same
value twice gives the same.
"""

import ast
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from small import other_value
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiers import slow_except
from torch import Tensor
from torch.utils.data import DataLoader
from yacs.config import CfgNode

from tailtune.configs import config_hash, load_configs, values_of
from tailtune.configs.errors import UserError
from tailtune.configs.key import RUNTIME, TEST, TRAIN
from tailtune.configs.option import declarations, option, options_from
from tailtune.configs.schema import Schema
from tailtune.configs.seeding import seeded
from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.data_bundle import DataInfo
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.loading.samplers import StepSampler
from tailtune.datasets.test_distributions.build import build_distributions
from tailtune.datasets.test_distributions.settings import DistributionSettings
from tailtune.models import BACKBONES, ClassificationModel, build_model, resolve
from tailtune.models.backbones.open_clip_backbone import OpenClipBackbone
from tailtune.models.heads.classifiers import HEADS
from tailtune.models.tuners.table import TUNERS
from tailtune.models.tuners.text_tuners import TEXT_TUNERS
from tailtune.scripts.make_options import FILE, render
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.evaluation.adaptation_table import ADAPTS
from tailtune.trainers.evaluation.ensembles import ENSEMBLES
from tailtune.trainers.evaluation.report_of_evaluation import add_report
from tailtune.trainers.flat_minima import class_shares, noise_factor, rho_at, sam_mode
from tailtune.trainers.head_preparation import prepare_head
from tailtune.trainers.losses import LOSSES
from tailtune.trainers.methods import METHODS, Method, build_method
from tailtune.trainers.methods.h2t import H2T
from tailtune.trainers.micro_batch_probe import budget_of
from tailtune.trainers.optimizers_and_schedules import OPTIMIZERS, SCHEDULES, Plan, build_optimizer, set_lr
from tailtune.trainers.option_schema import TABLES, declared
from tailtune.trainers.run import run
from tailtune.trainers.runs.merged_runs import MergeOptions, merged
from tailtune.trainers.storage.resume_states import ResumeStates
from tailtune.trainers.training_options import TrainingOptions

SCHEMA = declared()
KEYS = {key: SCHEMA[key] for key in SCHEMA.settable() if not SCHEMA[key].method}
"""What a user may set, without the methods' own options, of which test_contract.py changes each."""
Words = tuple[object, ...]
get_tokenizer = cache(open_clip.get_tokenizer)


@dataclass(frozen=True)
class Probe:
    first: object
    second: object
    see: Callable[[CfgNode], Any]
    """Config → an outcome; of a dict every entry has to differ."""
    pairs: Words = ()
    """Other options of both."""
    data: str = "fake_lt"
    model: str = "tiny_clip"


# --- a small world: two image folders, lists, names, weights -------------------------------------------------------

LISTS = "dataset: ImageList\nroot: images\ntrain_list: train.txt\ntest_list: test.txt\n"
SPECIES = [{"id": 0, "name": "Mus", "genus": "M"}, {"id": 1, "name": "Abax", "genus": "A"}]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that probes name."""
    folder = tmp_path_factory.mktemp("options")
    for images, (label, number) in product(("images", "other"), product(range(2), range(6))):
        path = folder / images / f"{label}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (20 * number, 50 * label, 200 if images == "other" else 90)).save(path)
    (folder / "images" / "0" / "5.png").write_bytes(b"no image")
    listed = {"train": (3, 2), "test": (4, 4), "train2": (5, 4), "test2": (2, 1), "val": (1, 1), "bad": (6, 2)}
    listed |= {"one/far": (2, 2), "two/far": (4, 1), "some_forward2": (4, 2)}
    for name, counts in listed.items():
        (folder / name).parent.mkdir(exist_ok=True)
        lines = [f"{label}/{i}.png {label}\n" for label, count in enumerate(counts) for i in range(count)]
        (folder / f"{name}.txt").write_text("".join(lines))
    (folder / "reversed.txt").write_text("".join(reversed((folder / "test.txt").read_text().splitlines(True))))
    (folder / "lists.yaml").write_text(LISTS)
    (folder / "names.txt").write_text("cat\ndog\n")
    for number in (1, 2):
        (folder / f"counts{number}.json").write_text(json.dumps([9 * number, 3]))
        strings = {"0": ["whiskers", "a tail"], "1": [f"{number} ears"]}
        (folder / f"strings{number}.json").write_text(json.dumps(strings))
    (folder / "categories.json").write_text(json.dumps(SPECIES))
    save_file(tiny_clip_state(), folder / "own.safetensors")
    return folder


def tiny_clip_state() -> dict[str, Tensor]:
    """Other random weights of the embedded backbone than `pretrained none` gives."""
    spec = BACKBONES["TinyCLIP"]
    assert isinstance(spec, OpenClipBackbone) and spec.config is not None
    with seeded("own weights"):
        clip = open_clip.CLIP(**json.loads(spec.config.read_text()))
        return {name: tensor.contiguous() for name, tensor in clip.state_dict().items()}


@pytest.fixture(autouse=True)
def world(files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Work beside the files, without run folders, on the CPU; torch's settings are put back.

    The tokenizer's table, which never differs, is read once.
    """
    monkeypatch.chdir(files)
    clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("open_clip.get_tokenizer", get_tokenizer)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    filled = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


def clear() -> None:
    """No run folder of before: a run that is there already is not repeated."""
    shutil.rmtree("output", ignore_errors=True)


def configure(data: str, model: str, *pairs: object) -> CfgNode:
    """Random weights, so that nothing is read; a later pair beats an earlier one."""
    return resolve(load_configs(data, model, ["pretrained", "none", *map(str, pairs)], declared())[-1])


# --- what can be seen of data --------------------------------------------------------------------------------------


def info(cfg: CfgNode) -> DataInfo:
    return build_data(cfg).info


def names(cfg: CfgNode) -> Any:
    return info(cfg).class_names


def counts(cfg: CfgNode) -> Any:
    return info(cfg).class_counts.tolist()


def outline(cfg: CfgNode) -> Any:
    return build_info(cfg).class_counts.tolist()


def groups(cfg: CfgNode) -> Any:
    return {name: each.tolist() for name, each in info(cfg).groups.items()}


def group(name: str) -> Callable[[CfgNode], Any]:
    return lambda cfg: groups(cfg)[name]


def sizes(*splits: str) -> Callable[[CfgNode], Any]:
    def see(cfg: CfgNode) -> Any:
        views = {split: getattr(build_data(cfg), split) for split in splits}
        return {split: None if view is None else len(view) for split, view in views.items()}

    return see


def chosen_images(cfg: CfgNode) -> Any:
    return build_data(cfg).train.indices.tolist()


def merge_start(cfg: CfgNode) -> Any:
    """What 0 becomes when runs are merged into it, of which run k has trained the number k."""

    def read(checkpoint: Path) -> dict[str, Tensor]:
        return {"weight": torch.tensor([float(checkpoint.parent.name[-1])])}

    def named(options: MergeOptions) -> list[Path]:
        return [Path(name) for name in options.runs or ()]

    with mock.patch("tailtune.trainers.runs.merged_runs.folders", named):
        return merged({"weight": torch.zeros(1)}, options_from(MergeOptions, cfg), read)["weight"]


def pixels(split: str, index: int = 0) -> Callable[[CfgNode], Any]:
    return lambda cfg: getattr(build_data(cfg), split)[index]["image"]


def bad_images(cfg: CfgNode) -> Any:
    try:
        return [build_data(cfg).train[index]["weight"] for index in range(6)]
    except Exception as error:
        return type(error).__name__


def fingerprints(cfg: CfgNode) -> Any:
    return build_data(cfg).records["train"].fingerprint


def shifts(cfg: CfgNode) -> Any:
    """Test sets of other class frequencies."""
    data = build_data(cfg)
    found = build_distributions(DistributionSettings.of(cfg), data.info, data.test.labels)
    return [(each.name, each.positions.tolist(), each.origin) for each in found]


def drawn(cfg: CfgNode) -> Any:
    """Drawn test sets, and what is learnt from."""
    data = build_data(cfg)
    return [
        (each.positions.tolist(), each.learn_positions is not None and each.learn_positions.tolist())
        for each in data.test_distributions
    ]


# --- what can be seen of a model -----------------------------------------------------------------------------------


def built(cfg: CfgNode) -> ClassificationModel:
    return build_model(cfg, names(cfg))


def trains(cfg: CfgNode) -> Any:
    """Name → shape of what trains."""
    return {name: tuple(each.shape) for name, each in built(cfg).named_parameters() if each.requires_grad}


def trains_where(cfg: CfgNode) -> Any:
    return sorted(trains(cfg).items())


def positions(cfg: CfgNode) -> Any:
    """Which weights `mask` trains."""
    return built(cfg).encoder.tuners["mask"]["0"]["qkv"].positions


def aft_positions(cfg: CfgNode) -> Any:
    return built(cfg).encoder.tuners["aft"]["0"]["qkv"].positions


def adapter_start(cfg: CfgNode) -> Any:
    return built(cfg).encoder.tuners["adapter"]["0"]["mlp"].down_proj.weight


def on_meta(cfg: CfgNode) -> Any:
    with torch.device("meta"):
        return build_model(cfg, ["a", "b"]).counts()["total"]


def encoder_weights(cfg: CfgNode) -> Any:
    return built(cfg).encoder.net.patch_embed.proj.weight


def grid(cfg: CfgNode) -> Any:
    return {"positions": built(cfg).encoder.grid, "pixels": build_data(cfg).test[0]["image"].shape}


def head_kind(cfg: CfgNode) -> Any:
    return type(built(cfg).head).__name__


@torch.no_grad()
def logits(cfg: CfgNode) -> Any:
    return built(cfg)(build_data(cfg).test[0]["image"].unsqueeze(0))


@torch.no_grad()
def first_head(cfg: CfgNode) -> Any:
    """The head's weight before the first step."""
    data = build_data(cfg)
    model = build_model(cfg, data.info.class_names, descriptors=data.info.descriptors)
    prepare_head(build_method(cfg, model, data.info), data, make_accelerator(Devices.of(cfg)), 64, 0)
    return model.head.get_parameter("weight")


def seeds(cfg: CfgNode) -> Any:
    data, model = build_data(cfg), built(cfg)
    return {
        "head": model.head.get_parameter("weight"),
        "tuner": next(model.encoder.tuners.parameters()),
        "backbone": model.encoder.net.patch_embed.proj.weight,
        "order": StepSampler(data.train.labels, 32, 32, Plan.of(cfg, 32).seed).micro_batches(0),
        "augmentation": data.train[0]["image"],
    }


# --- what can be seen of training ----------------------------------------------------------------------------------


class Other(Method):
    """A second method, under the name `other`."""


def method_kind(cfg: CfgNode) -> Any:
    with mock.patch.dict(METHODS, {"other": Other}):
        return type(build_method(cfg, built(cfg), info(cfg))).__name__


def loss(cfg: CfgNode) -> Any:
    data = build_data(cfg)
    method = build_method(cfg, build_model(cfg, data.info.class_names), data.info)
    batch = next(iter(eval_loader(data.train_unaugmented, 64, 0)))
    return float(method(batch).loss_sum.detach())


def two_updates(cfg: CfgNode) -> Any:
    """A head's weight after two steps with gradients one and two, in an epoch of its own each."""
    method = build_method(cfg, built(cfg), info(cfg))
    plan = Plan.of(cfg, 32)
    optimizer = build_optimizer(method.param_groups(), plan)
    weight = method.model.head.get_parameter("weight")
    for epoch in range(2):
        set_lr(optimizer, plan, epoch)
        weight.grad = torch.full_like(weight, 1.0 + epoch)
        optimizer.step()
    return weight


def flatness(cfg: CfgNode) -> Any:
    """What `sam` moves the weights by: mode, length early and late, shares of two classes, noise in a later epoch."""
    plan, counts = Plan.of(cfg, 32), torch.tensor([9, 1])
    shares = class_shares(counts, plan.sam_gamma, plan.sam_lambda).tolist()
    return [
        sam_mode(plan.sam).gradients,
        rho_at(plan, 0),
        rho_at(plan, plan.epochs - 1),
        shares,
        noise_factor(plan, 60),
    ]


def decays(cfg: CfgNode) -> Any:
    """Parameters and weight decay of each group of the optimizer."""
    groups = build_optimizer(build_method(cfg, built(cfg), info(cfg)).param_groups(), Plan.of(cfg, 32)).param_groups
    return [(len(group["params"]), group["weight_decay"]) for group in groups]


def kernels(cfg: CfgNode) -> Any:
    """What torch is told to use, on a machine with a GPU that this need not be."""
    device(cfg)
    found = {"deterministic": torch.backends.cudnn.deterministic, "benchmark": torch.backends.cudnn.benchmark}
    return found | {"all kernels": torch.are_deterministic_algorithms_enabled()}


def device(cfg: CfgNode) -> Any:
    """The device that Accelerate is told to use, on a machine with two GPUs that this need not be."""
    used: list[int] = []
    cuda = mock.patch.multiple("torch.cuda", is_available=lambda: True, device_count=lambda: 2, set_device=used.append)
    rest = mock.patch.multiple("tailtune.trainers.distributed", Accelerator=mock.DEFAULT, set_seed=mock.DEFAULT)
    with cuda, rest, mock.patch.dict("os.environ"):
        make_accelerator(Devices.of(cfg))
        return {"told": os.environ.get("ACCELERATE_TORCH_DEVICE"), "current": used}


# --- what can be seen of a run -------------------------------------------------------------------------------------

SHORT: Words = ("num_epochs", 0, "max_test_images", 20)
"""No training: the head stays random."""
ONE: Words = ("num_epochs", 1, "max_steps", 1, "batch_size", 16, "max_test_images", 20, "lr", 0.1)


def ran(cfg: CfgNode, previous: Path | None = None) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    return run(cfg, previous)


def result(cfg: CfgNode) -> Any:
    return json.loads((ran(cfg) / "metrics.json").read_text())


FINISHED: dict[str, tuple[Path, Path]] = {}
"""Config → the folder of a finished run and a copy of it, which several probes start from."""


def ran_before(cfg: CfgNode) -> Path:
    """A finished run, as `ran` leaves it; it trains for the first probe only."""
    if str(cfg) not in FINISHED:
        copy = Path("finished", str(len(FINISHED))).absolute()
        FINISHED[str(cfg)] = ran(cfg), copy
        shutil.copytree(FINISHED[str(cfg)][0], copy)
    path, copy = FINISHED[str(cfg)]
    shutil.copytree(copy, path, dirs_exist_ok=True)
    return path


def steps(cfg: CfgNode) -> Any:
    return result(cfg)["train"]["steps"]


def own_logits(cfg: CfgNode) -> Any:
    """Logits of the run's own evaluation."""
    found = load_file(ran(cfg) / "logits.safetensors")
    return found["logits"].float() + found["row_max"].unsqueeze(-1)


def trained(cfg: CfgNode) -> Any:
    return torch.cat(
        [each.flatten().float() for each in load_file(ran(cfg) / "checkpoint/tensors.safetensors").values()]
    )


def batches(function: str, entry: str | None = None, kind: type[Method] = Method) -> Callable[[CfgNode], Any]:
    """Sizes of the batches that a method is given during a run, or one entry of them."""

    def see(cfg: CfgNode) -> Any:
        found: list[Any] = []
        original = getattr(kind, function)

        def recorded(self: Method, batch: Any) -> Any:
            size = len(batch["label"] if isinstance(batch, dict) else batch)
            found.append(batch[entry].tolist() if entry else size)
            return original(self, batch)

        with mock.patch.object(kind, function, recorded):
            ran(cfg)
        return found

    return see


def workers(cfg: CfgNode) -> Any:
    with mock.patch("tailtune.datasets.loading.data_loader.DataLoader", wraps=DataLoader) as loader:
        ran(cfg)
    return sorted({call.kwargs["num_workers"] for call in loader.call_args_list})


def said(text: str) -> Callable[[CfgNode], Any]:
    """Whether the log of a run has a text."""
    return lambda cfg: text in (ran(cfg) / "log.txt").read_text()


def validated(cfg: CfgNode) -> Any:
    return [each["epoch"] for each in result(cfg)["train"].get("validations", [])]


def kept(cfg: CfgNode) -> Any:
    return result(cfg)["train"].get("kept_epoch")


def tracked(cfg: CfgNode) -> Any:
    """What a tracker of a name of ours is given, and whether there are files for TensorBoard."""
    given: list[str] = []

    class Noted(GeneralTracker):
        name, requires_logging_directory, tracker = "noted", False, None

        def __init__(self, run_name: str) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            given.append("lr" if "lr" in values else "nothing")

        def log(self, values: dict[str, float], step: int | None, **_: Any) -> None:
            given.extend(values)

    with mock.patch.dict("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"noted": Noted}):
        path = ran(cfg)
    return {"noted": given, "tensorboard": (path / "tensorboard").exists()}


def tags(cfg: CfgNode) -> Any:
    events = EventAccumulator(str(ran(cfg) / "tensorboard"))
    events.Reload()
    return sorted(events.Tags()["scalars"])


def cached_in(cfg: CfgNode) -> Any:
    """Which of two folders a cache on disk is in."""
    for name in ("here", "there"):
        shutil.rmtree(name, ignore_errors=True)
    ran(cfg)
    return [Path(name).exists() for name in ("here", "there")]


def printed(cfg: CfgNode) -> Any:
    return (ran(cfg) / "log.txt").read_text().count("epoch [")


def states(cfg: CfgNode) -> Any:
    """Steps after which a state was saved."""
    saved: list[int] = []
    original = ResumeStates.save

    def recorded(self: ResumeStates, step: int, *rest: Any) -> None:
        saved.append(step)
        original(self, step, *rest)

    with mock.patch.object(ResumeStates, "save", recorded):
        ran(cfg)
    return saved


def folder(cfg: CfgNode) -> Any:
    return ran(cfg).as_posix()


def after(cfg: CfgNode) -> Any:
    """The head that the last of all stages learnt."""
    words = ["pretrained", "none", *map(str, ONE), "after", str(cfg.after)]
    words += ["after.pretrained", "none", "after.max_steps", "2"] if cfg.after else []
    previous = None
    for stage in load_configs(cfg.data, cfg.model, words, declared()):
        previous = ran(stage, previous)
    assert previous is not None
    return load_file(previous / "checkpoint/tensors.safetensors")["model.head.weight"]


def second_command(cfg: CfgNode) -> Any:
    """The same run is finished already; what is there, and what is said, after this command."""
    first = load_configs(cfg.data, cfg.model, ["pretrained", "none", *map(str, ONE)], declared())[-1]
    ran_before(first)
    path = ran(cfg)
    return {
        "evaluations": sorted(each.parent.name for each in path.glob("tests/*/metrics.json")),
        "repeated": "finished before" not in (path / "log.txt").read_text(),
    }


def evaluations(cfg: CfgNode) -> Any:
    return second_command(cfg)["evaluations"]


def repeated(cfg: CfgNode) -> Any:
    return second_command(cfg)["repeated"]


def another_runs(cfg: CfgNode) -> Any:
    """Logits with the checkpoint of one of two runs."""
    for number in (1, 2):
        ran_before(configure(cfg.data, cfg.model, *ONE, "lr", number, "output_dir", f"run{number}"))
    found = load_file(ran(cfg) / "tests" / cfg.test_key / "logits.safetensors")
    return found["row_max"]


def ensemble_logits(cfg: CfgNode) -> Any:
    """Logits of an evaluation of a finished run, beside which there are others."""
    for number in range(3):
        ran_before(configure(cfg.data, cfg.model, *ONE, "output_dir", f"run{number}", "lr", number + 0.1))
    found = load_file(ran(cfg) / "tests" / cfg.test_key / "logits.safetensors")
    return found["logits"].float() + found["row_max"].unsqueeze(-1)


def weights_path(cfg: CfgNode) -> Any:
    """Weights that experts of random heads get on the test set as it is."""
    return result(cfg)["distributions"]["test"]["predictors"]["sade"]["path"]


def adapted(cfg: CfgNode) -> Any:
    """How likely adapted predictions find the labels."""
    return result(cfg)["distributions"]["test"]["predictors"][cfg.adapt]["nll"]


def aimed(cfg: CfgNode) -> Any:
    """The test set as it is, predicted for a target."""
    found = result(cfg)["distributions"]["test"]["predictors"]["target_prior"]
    return [found["prior"], found["temperature"]]


def exported(cfg: CfgNode) -> Any:
    return sorted(str(each.relative_to("output")) for each in (ran(cfg) / "export").rglob("*"))


def reported(cfg: CfgNode) -> Any:
    with pytest.MonkeyPatch.context() as patch:  # conftest.py leaves reports out
        patch.setattr("tailtune.trainers.evaluation.evaluate.add_report", add_report)
        return (ran(cfg) / "report.html").exists()


def onnx_size(cfg: CfgNode) -> Any:
    return (ran(cfg) / "export" / "onnx" / "model.onnx").stat().st_size


def uploaded(cfg: CfgNode) -> Any:
    """The repository to which the export would be uploaded."""
    found: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.get_token", lambda: "a token")
        patch.setattr("huggingface_hub.HfApi.create_repo", lambda self, name, **_: name)
        patch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, repo_id, **_: found.append(repo_id))
        ran(cfg)
    return found


# --- the table -----------------------------------------------------------------------------------------------------

ADAPTED: Words = (*SHORT, "num_experts", 2, "adapt", "sade", "adapt_epochs", 2)
LISTED: dict[str, Any] = {"data": "lists.yaml"}
SHIFTED: Words = ("test_dists", "forward2")
DRAWN: Words = ("test_dists", "dirichlet")
STALE: Words = ("num_epochs", 3, "batch_size", 128, "max_test_images", 20, "lr", 0, "val_per_class", 1)
STALE += ("val_every", 1, "keep", "best:accuracy")
"""Nothing is learnt, so no epoch is better than the first."""
STEPPED: Words = ("schedule", "multistep")
FUSED: Words = (*ONE, "method", "h2t", "h2t.shift_bn", False, "after", "tiny_clip")
OF_RUN: Words = (*ONE, "output_dir", "run0", "test_only", True)
CONVOLUTIONAL: Words = ("backbone", "timm:test_resnet.r160_in1k", "init_head", "none")
EXPERTS: Words = ("backbone", "ResNet-20", "init_head", "none", "full_tuning", True, "num_experts", 2)
TEXTS: Words = ("classifier", "TextClassifier")
COOP: Words = (*TEXTS, "context", "coop")
TIP: Words = ("classifier", "TipAdapter", "num_epochs", 0)
PROBES: dict[str, Probe] = {
    "dataset": Probe("Fake", "Digits", names),
    "root": Probe("images", "other", pixels("train"), **LISTED),
    "subset_cap": Probe("none", 2, counts),
    "subset_seed": Probe(0, 1, chosen_images, ("subset_cap", 2)),
    "merge_runs": Probe("none", "run1", merge_start),
    "merge_share": Probe(0.7, 0.5, merge_start, ("merge_runs", "run1")),
    "merge_together": Probe(1, 2, merge_start, ("merge_runs", "run1,run2")),
    "lists": Probe("one", "two", counts, ("train_list", "far.txt"), **LISTED),
    "num_classes": Probe(10, 5, lambda cfg: built(cfg).head.get_parameter("weight").shape),
    "class_counts": Probe("counts1.json", "counts2.json", outline, **LISTED),
    "train_list": Probe("train.txt", "train2.txt", counts, **LISTED),
    "test_list": Probe("test.txt", "test2.txt", sizes("test"), **LISTED),
    "val_list": Probe("none", "val.txt", sizes("val"), **LISTED),
    "val_per_class": Probe(0, 1, sizes("val", "train")),
    "test_per_class": Probe(1, 2, sizes("test", "train"), ("test_list", "none", "train_list", "train2.txt"), **LISTED),
    "classnames": Probe("none", "names.txt", names, **LISTED),
    "label_field": Probe("id", "genus", names, **LISTED),
    "imb_factor": Probe(0.1, 0.5, counts),
    "on_bad_image": Probe("raise", "skip", bad_images, ("train_list", "bad.txt"), **LISTED),
    "data_fingerprint": Probe("size", "content", fingerprints, **LISTED),
    "augment": Probe("lift", "none", pixels("train")),
    "mda_func": Probe("convex", "max", pixels("train"), ("augment", "mda")),
    "interpolation": Probe("bilinear", "bicubic", pixels("test", 3)),
    "image_backend": Probe("torchvision", "pil", pixels("train")),
    "cache": Probe("none", "ram", said("cache ram: 159 images"), ONE),
    "cache_dir": Probe("here", "there", cached_in, (*ONE, "cache", "disk")),
    "feature_cache": Probe(True, False, said("features of 20 images"), ONE),
    "feature_cache_dir": Probe("here", "there", cached_in, ONE),
    "feature_cache_gb": Probe(0, 1, said("tokens of 159"), (*ONE, "augment", "none", "lora", True, "partial", 1)),
    "backbone": Probe("TinyCLIP", "CLIP-ViT-B/16", on_meta),
    "pretrained": Probe("none", "own.safetensors", encoder_weights),
    "resolution": Probe(32, 48, grid),
    "pixel_mean": Probe("none", "[0.1,0.2,0.3]", logits),
    "pixel_std": Probe("none", "[0.1,0.2,0.3]", logits),
    "method": Probe("classify", "other", method_kind),
    "after": Probe("none", "tiny_clip", after, ONE, model="tiny_clip_peft"),
    "classifier": Probe("CosineClassifier", "LinearClassifier", head_kind),
    "scale": Probe(25, 10, logits),
    "init_head": Probe("none", "class_mean", first_head),
    "prompt": Probe("default", "a blurry photo of a {}.", first_head),
    "descriptors": Probe("strings1.json", "strings2.json", first_head, ("prompt", "descriptor"), **LISTED),
    "zero_shot": Probe(False, True, trains_where),
    "num_experts": Probe(1, 2, logits),
    "expert_split": Probe(1, 2, trains_where, EXPERTS),
    "reduce_dimension": Probe(False, True, trains_where, EXPERTS),
    **{name: Probe(False, True, trains_where) for name in TUNERS},
    "bn_tuning": Probe(False, True, trains_where, CONVOLUTIONAL),
    "partial": Probe("none", "[1,3)", trains_where, ("lora", True)),
    **{f"{name}_layers": Probe("none", "[1]", trains_where, (name, True)) for name in TUNERS},
    "bn_tuning_layers": Probe("none", "[1]", trains_where, ("bn_tuning", True, *CONVOLUTIONAL)),
    "tuner_rules": Probe("lift", "lift_plus", trains_where, ("vpt_deep", True)),
    "vpt_init": Probe("uniform", "normal", logits, ("vpt_deep", True)),
    "adapter_init": Probe("normal", "uniform", adapter_start, ("adapter", True)),
    "vpt_len": Probe("none", 3, trains_where, ("vpt_deep", True)),
    "adapter_dim": Probe(8, "none", trains_where, ("adapter", True)),
    "adaptformer_scale": Probe("learnable", 0.5, trains_where, ("adaptformer", True)),
    "mask_ratio": Probe("none", 0.01, trains_where, ("mask", True)),
    "mask_seed": Probe("none", 1, positions, ("mask", True)),
    "aft_ratio": Probe("none", 0.01, trains_where, ("aft", True)),
    "aft_loc": Probe("all", "mlp", trains_where, ("aft", True)),
    "aft_seed": Probe(0, 1, aft_positions, ("aft", True)),
    "clip_lora_alpha": Probe(1, 2, trained, (*ONE, "clip_lora", True)),
    "clip_lora_params": Probe("[q,k,v]", "[q,v]", trains_where, ("clip_lora", True)),
    "clip_lora_dropout": Probe(0.25, 0, trained, (*ONE, "clip_lora", True)),
    **{name: Probe(False, True, trains_where, TEXTS) for name in TEXT_TUNERS},
    "text_partial": Probe("none", 1, trains_where, (*TEXTS, "text_lora", True)),
    "text_adapter_dim": Probe(4, 2, trains_where, (*TEXTS, "text_adapter", True)),
    "text_vpt_len": Probe(2, 3, trains_where, (*TEXTS, "text_vpt_deep", True)),
    "text_adaptformer_scale": Probe("learnable", 0.5, trains_where, (*TEXTS, "text_adaptformer", True)),
    "text_tuner_args": Probe("none", "{text_lora: {layers: 1}}", trains_where, (*TEXTS, "text_lora", True)),
    "text_mask_ratio": Probe("none", 0.01, trains_where, (*TEXTS, "text_mask", True)),
    "context": Probe("none", "coop", on_meta, (*TEXTS, "backbone", "CLIP-ViT-B/32")),
    "context_len": Probe(4, 3, trains_where, COOP),
    "context_words": Probe("a photo of a", "a picture of the", logits, COOP),
    "context_position": Probe("end", "front", logits, (*COOP, "context_len", 4)),
    "context_per_class": Probe(False, True, trains_where, (*COOP, "context_len", 4)),
    "context_depth": Probe(1, 2, trains_where, (*TEXTS, "context", "maple")),
    "clip_adapter": Probe("none", "residual", trains_where, TEXTS),
    "clip_adapter_dim": Probe("none", 2, trains_where, (*TEXTS, "clip_adapter", "residual")),
    "clip_adapter_ratio": Probe(0.2, 0.5, logits, (*TEXTS, "clip_adapter", "original")),
    "projection_tuning": Probe(False, True, trains_where, TEXTS),
    "text_memory": Probe(8, 0, lambda cfg: built(cfg).text.largest_again, TEXTS),
    "textclassifier.scale": Probe("none", 10, logits, TEXTS),
    "textclassifier.samples": Probe("none", 2, trained, (*ONE, *TEXTS, "text_lora", True)),
    "tipadapter.shots": Probe(1, 2, own_logits, TIP),
    "tipadapter.alpha": Probe(1.17, 2, own_logits, TIP),
    "tipadapter.beta": Probe(1, 2, own_logits, TIP),
    "tipadapter.balanced": Probe(True, False, own_logits, TIP),
    "tipadapter.scale": Probe("none", 10, own_logits, TIP),
    "peft": Probe("none", "LoRA", trains_where),
    "peft_args": Probe("{r: 4}", "{r: 8}", trains_where, ("peft", "LoRA")),
    "seed": Probe(0, 1, seeds, ("lora", True)),
    "deterministic": Probe(True, False, kernels),
    "prec": Probe("fp32", "bf16", trained, ONE),
    "residual_dtype": Probe("none", "fp32", trained, (*ONE, "prec", "bf16")),
    "num_epochs": Probe(1, 2, steps, ("batch_size", 512, "max_test_images", 20)),
    "max_steps": Probe(1, 2, steps, ("batch_size", 16, "max_test_images", 20)),
    "batch_size": Probe(128, 64, steps, ("num_epochs", 1, "max_test_images", 20)),
    "compile": Probe(False, True, lambda cfg: Plan.of(cfg, 8).compile),
    "grad_checkpoint": Probe(False, True, lambda cfg: built(cfg).encoder.run_part),
    "memory_budget_gb": Probe(
        1, 2, lambda cfg: budget_of(cfg.memory_budget_gb, torch.device("cpu")), ("micro_batch_size", "auto")
    ),
    "micro_batch_size": Probe("none", 4, batches("forward"), ONE),
    "lr": Probe(0.1, 0.2, two_updates),
    "weight_decay": Probe(5e-4, 0.1, two_updates),
    "optimizer": Probe("sgd", "adamw", two_updates),
    "decay_rule": Probe("none", "matrices", decays, ("classifier", "LinearClassifier")),
    "momentum": Probe(0.9, 0, two_updates),
    "nesterov": Probe(False, True, two_updates),
    "schedule": Probe("cosine", "constant", two_updates),
    "lr_steps": Probe("[1]", "[2]", two_updates, STEPPED),
    "lr_gamma": Probe(0.1, 0.5, two_updates, (*STEPPED, "lr_steps", 1)),
    "warmup_epochs": Probe(0, 2, two_updates),
    "warmup_steps": Probe(0, 4, two_updates),
    "adam_betas": Probe("[0.9,0.999]", "[0.5,0.9]", two_updates, ("optimizer", "adamw")),
    "adam_eps": Probe(1e-8, 0.1, two_updates, ("optimizer", "adamw")),
    "lr_factors": Probe("none", "{head: 0.1}", two_updates),
    "sampler": Probe("shuffle", "balanced", batches("forward", "index"), ONE),
    "pair_sampler": Probe("shuffle", "balanced", batches("forward", "partner", H2T), FUSED),
    "sam": Probe("none", "sam", flatness),
    "sam_rho": Probe(0.05, 0.1, flatness, ("sam", "sam")),
    "sam_rho_late": Probe("none", 0.1, flatness, ("sam", "sam")),
    "sam_gamma": Probe(1, 2, flatness, ("sam", "focal")),
    "sam_lambda": Probe(0.5, 0.8, flatness, ("sam", "focal")),
    "gnm_scale": Probe(0.1, 0.2, flatness, ("sam", "gnm")),
    "gnm_half_life": Probe(59, 20, flatness, ("sam", "gnm")),
    "loss_type": Probe("LA", "CE", loss),
    "tau": Probe(1, 0.5, loss),
    "smooth_head": Probe(0.3, 0.1, loss, ("loss_type", "LAS")),
    "smooth_tail": Probe(0.0, 0.1, loss, ("loss_type", "LAS")),
    "drw_epoch": Probe("none", 0, loss),
    "val_every": Probe("none", 1, validated, (*ONE, "max_steps", "none", "val_per_class", 1)),
    "keep": Probe("last", "best:nll", kept, (*ONE, "max_steps", "none", "val_per_class", 1, "val_every", 1)),
    "patience": Probe("none", 1, steps, STALE),
    "tte": Probe(False, True, own_logits, SHORT),
    "tte_mode": Probe("fivecrop", "tencrop", own_logits, (*SHORT, "tte", True)),
    "expand": Probe("none", 4, own_logits, (*SHORT, "tte", True)),
    "randaug_times": Probe(1, 3, own_logits, (*SHORT, "tte", True, "tte_mode", "randaug")),
    "test_prec": Probe("fp32", "bf16", own_logits, SHORT),
    "test_train": Probe(False, True, lambda cfg: len(own_logits(cfg)), ("num_epochs", 0)),
    "crop_margin": Probe("none", 9, own_logits, SHORT),
    "max_test_images": Probe("none", 20, lambda cfg: len(own_logits(cfg)), ("num_epochs", 0)),
    "many_above": Probe(20, 10, group("many")),
    "few_below": Probe(8, 12, group("few")),
    "group_imb_factor": Probe("none", 0.5, groups),
    "adapt": Probe("none", "sade", lambda cfg: "distributions" in result(cfg), (*SHORT, "num_experts", 2)),
    "adapt_views": Probe("sade_imagenet", "none", weights_path, ADAPTED),
    "adapt_epochs": Probe(3, 2, weights_path, ADAPTED),
    "adapt_lr": Probe(0.1, 0.2, weights_path, ADAPTED),
    "adapt_weight_decay": Probe(5e-4, 0.1, weights_path, ADAPTED),
    "adapt_entropy": Probe(0, 1, weights_path, ADAPTED),
    "adapt_batch_size": Probe(128, 8, weights_path, ADAPTED),
    "adapt_seed": Probe(0, 1, weights_path, ADAPTED),
    "test_dists": Probe("uniform", "forward5", shifts),
    "shift_ratios": Probe("[2]", "[2, 3]", shifts, ("test_dists", "all")),
    "shift_order": Probe("counts", "label", shifts, SHIFTED),
    "shift_max": Probe("none", 5, shifts, SHIFTED),
    "shift_factors": Probe("none", "{forward2: 0.3}", shifts, SHIFTED),
    "shift_files": Probe("none", "some_{name}.txt", shifts, SHIFTED, **LISTED),
    "shift_seed": Probe(0, 1, shifts, SHIFTED),
    "dirichlet_trials": Probe(3, 2, drawn, DRAWN),
    "dirichlet_ratio": Probe(100, 2, drawn, DRAWN),
    "dirichlet_concentration": Probe("none", 1000, drawn, DRAWN),
    "dirichlet_least": Probe(1, 2, drawn, DRAWN),
    "dirichlet_list": Probe("none", "reversed.txt", drawn, (*DRAWN, "on_bad_image", "skip"), **LISTED),
    "dirichlet_learn": Probe("independent", "equal", drawn, DRAWN),
    "target_prior": Probe("uniform", "estimate", aimed, SHORT),
    "calibrate": Probe(True, False, aimed, (*SHORT, "target_prior", "uniform", "val_per_class", 2)),
    "ensemble": Probe("none", "wise", ensemble_logits, OF_RUN),
    "ensemble_alpha": Probe(0.5, 0.2, ensemble_logits, (*OF_RUN, "ensemble", "logits")),
    "ensemble_runs": Probe("run1", "run1,run2", ensemble_logits, (*OF_RUN, "ensemble", "soup")),
    "test_only": Probe(False, True, evaluations, ONE),
    "model_dir": Probe("output/run1", "output/run2", another_runs, (*ONE, "test_only", True)),
    "export": Probe("lift", "merged", exported, SHORT),
    "report": Probe("none", "html", reported, SHORT),
    "export_fp16": Probe(False, True, onnx_size, (*SHORT, "export", "onnx")),
    "push_to_hub": Probe("ann/first", "ann/second", uploaded, (*SHORT, "export", "hub")),
    "output_dir": Probe("none", "here", folder, SHORT),
    "resume": Probe(True, False, repeated, ONE),
    "gpu": Probe("none", 1, device),
    "num_workers": Probe(0, 1, workers, ONE),
    "profile_data": Probe(False, True, said("data of epoch 1"), ("num_epochs", 1, "max_test_images", 20)),
    "print_freq": Probe(10, 1, printed, ("num_epochs", 1, "max_test_images", 20)),
    "save_every": Probe("none", 1, states, ("max_steps", 2, "batch_size", 16, "max_test_images", 20)),
    "test_batch_size": Probe(64, 7, batches("expert_logits"), SHORT),
    "trackers": Probe("tensorboard", "noted", tracked, ONE),
    "tensorboard_tags": Probe("plain", "lift", tags, ONE),
}


CHOSEN: tuple[tuple[Any, Callable[[CfgNode], Any], Callable[[str], Words]], ...] = (
    (LOSSES, loss, lambda name: ("loss_type", name)),
    (TUNERS, trains_where, lambda name: (name, True)),
    (HEADS, trained, lambda name: (*ONE, "classifier", name)),
    (OPTIMIZERS, two_updates, lambda name: ("optimizer", name)),
    (SCHEDULES, two_updates, lambda name: ("schedule", name)),
    (ADAPTS, adapted, lambda name: (*ADAPTED, "adapt_batch_size", 8, "adapt", name)),
    (ENSEMBLES, ensemble_logits, lambda name: (*OF_RUN, "ensemble", name)),
)
"""Table, what shows an option of its entries, name of an entry → the words that choose it."""


def probe_of_entry(key: str) -> Probe:
    """A probe of a number or flag that an entry of a table owns, so that a new entry needs no line here."""
    (entry,) = SCHEMA.entries[key]
    see, words = next((see, words) for table, see, words in CHOSEN if entry in table)
    return Probe(SCHEMA[key].default, other_value(SCHEMA[key]), see, words(entry))


PROBES.update({key: probe_of_entry(key) for key in KEYS if key not in PROBES and SCHEMA.entries[key]})


def probed(key: str, value: object) -> CfgNode:
    probe = PROBES[key]
    return configure(probe.data, probe.model, *probe.pairs, key, value)


def same(a: Any, b: Any) -> bool:
    return a.shape == b.shape and torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_every_option_has_a_probe() -> None:
    assert PROBES.keys() == KEYS.keys()


Outcome = dict[str, Any]
DEFAULTS: dict[tuple[object, str], Outcome] = {}
"""Function and config → outcome of a first value; options with the same first config share it."""


def outcome(key: str, value: object) -> Outcome:
    clear()
    found = PROBES[key].see(probed(key, value))
    return found if isinstance(found, dict) else {"": found}


def first_outcome(key: str) -> Outcome:
    given = PROBES[key].see, str(probed(key, PROBES[key].first))
    if given not in DEFAULTS:
        DEFAULTS[given] = outcome(key, PROBES[key].first)
    return DEFAULTS[given]


ELSEWHERE = {
    "test_adapt.py": ("adapt", "adapt_epochs"),
    "test_cli.py": ("after", "model_dir", "test_train"),
    "test_curves.py": ("trackers",),
    "test_ensembles.py": ("ensemble", "ensemble_alpha", "ensemble_runs"),
    "test_exchange.py": ("export",),
    "test_export_infer.py": ("export_fp16",),
    "test_image_cache.py": ("cache",),
    "test_peft.py": ("peft",),
    "test_report.py": ("report",),
    "test_share.py": ("push_to_hub",),
    "test_validation.py": ("keep", "patience", "val_every"),
}
"""Default tests → options whose effect they look at. The probes of these train whole runs: `make test-slow`."""


@pytest.mark.parametrize("key", slow_except(sorted(PROBES.keys() - set().union(*ELSEWHERE.values())), PROBES))
def test_an_option_has_an_effect(key: str) -> None:
    first, second = first_outcome(key), outcome(key, PROBES[key].second)
    assert first.keys() == second.keys() and first
    for name in first:
        assert not same(first[name], second[name]), f"{name or 'the outcome'} is the same for both values"


@pytest.mark.slow
@pytest.mark.parametrize("key", PROBES)
def test_a_probe_is_reproducible(key: str) -> None:
    first, again = (outcome(key, PROBES[key].first) for _ in range(2))
    assert first.keys() == again.keys() and all(same(first[name], again[name]) for name in first)


# --- the table of options itself -----------------------------------------------------------------------------------


def test_a_class_says_which_names_change() -> None:
    """`train`: the run's name and the hash; `test`: the evaluation's key; `runtime`: none of them."""
    for key, probe in PROBES.items():
        first, second = (probed(key, value) for value in (probe.first, probe.second))
        changed = {
            "run_name": first.run_name != second.run_name,
            "hash": config_hash(first) != config_hash(second),
            "test_key": first.test_key != second.test_key,
        }
        cls = SCHEMA[key].cls
        names_test = cls == TEST or key == "model_dir"  # an evaluation of another run has a name of its own
        assert changed == {"run_name": cls == TRAIN, "hash": cls == TRAIN, "test_key": names_test}, key


def test_an_entry_is_complete() -> None:
    for key, entry in SCHEMA.items():
        assert entry.cls in (TRAIN, TEST, RUNTIME), key
        assert entry.doc[0].isupper() and entry.doc.endswith(".") and len(entry.doc.split()) > 2, f"{key}: a sentence"
        assert not entry.table or (entry.table in TABLES and not entry.choices), key
        if entry.default is not None:
            assert entry.parse(entry.default) == entry.default == entry.parse(str(entry.default)), key
            assert not entry.choices or entry.default in entry.choices, key
            numbers = entry.default if isinstance(entry.default, list) else [entry.default]
            assert all(entry.least is None or number >= entry.least for number in numbers), key
            assert all(entry.most is None or number <= entry.most for number in numbers), key
        assert entry.logits or entry.cls == TEST, key
        assert not entry.recorded or entry.cls == RUNTIME, f"{key}: others are written down anyway"


def test_tuner_flags_are_the_tuners() -> None:
    flags = {key for key, entry in KEYS.items() if entry.default is False and entry.cls == TRAIN}
    others = {"zero_shot", "reduce_dimension", "nesterov", "context_per_class", "projection_tuning"}
    assert flags - others == TUNERS.keys() | TEXT_TUNERS.keys()


def test_aliases_are_other_names_of_options() -> None:
    assert set(SCHEMA.aliases.values()) <= set(SCHEMA.settable()) and not SCHEMA.aliases.keys() & SCHEMA.keys()
    assert configure("fake_lt", "tiny_clip", "test_ensemble", True).tte is True


@pytest.mark.parametrize(
    ("other", "key", "value"),
    [
        ("las.smooth_head", "smooth_head", 0.1),
        ("la.tau", "tau", 0.5),
        ("gcl.scale", "scale", 9.0),
        ("lora.dim", "adapter_dim", 3),
        ("adaptformer.dim", "adapter_dim", 3),
        ("mask.seed", "mask_seed", 3),
        ("multistep.lr_gamma", "lr_gamma", 0.5),
        ("dirichlet.trials", "dirichlet_trials", 2),
        ("sade_online.lr", "adapt_lr", 0.5),
    ],
)
def test_an_option_of_a_table_entry_has_its_dotted_name_too(other: str, key: str, value: float) -> None:
    named, flat = (configure("fake_lt", "tiny_clip", word, value) for word in (other, key))
    assert named[key] == value and named == flat and named.run_name == flat.run_name


def test_a_dotted_name_in_a_method_s_group_is_the_method_s() -> None:
    """Method `sade` and the test-time adaptation of that name: only the method's own options are `sade.…`."""
    with pytest.raises(UserError, match="unknown option 'sade.lr'"):
        configure("fake_lt", "tiny_clip", "sade.lr", 1)


def test_a_config_holds_every_option() -> None:
    options = {f"{name}.{each.name}" for name, method in METHODS.items() for each in fields(method.Options)}
    assert options <= SCHEMA.keys() == values_of(configure("fake_lt", "tiny_clip")).keys()


def test_two_options_of_one_name_are_refused() -> None:
    @dataclass(frozen=True)
    class First:
        lr: float = option(0.5, "Another learning rate.")

    @dataclass(frozen=True)
    class Second:
        share: float = option(0.5, "A share of something.")

    training = list(declarations(TrainingOptions, "Training"))
    with pytest.raises(ValueError, match="two options are called lr"):
        Schema([*training, *declarations(First, "First")], {})
    with pytest.raises(ValueError, match="'seed'"):  # a group of the name of an option
        Schema([*training, *declarations(Second, "Second", "seed")], {})


def reads(path: Path) -> Iterator[str]:
    """Names that a file takes from a config or from the options of an entry: attributes, and strings but for names
    that are given to options."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    named = {id(word.value) for word in ast.walk(tree) if isinstance(word, ast.keyword) and word.arg == "key"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in READERS:
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in named:
            yield node.value


READERS = ("cfg", "self.cfg", "stage", "here", "options", "self", "recipe", "self.recipe", "AlphaOptions()")
"""What options are read from, in the code's own words."""


def test_every_option_is_read_somewhere() -> None:
    packages = ("configs", "datasets", "models", "trainers")
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    found = {name for path in [*files, ROOT / "main.py"] for name in reads(path)} | Plan.__dataclass_fields__.keys()
    fields_of = {each.name: each.field for each in SCHEMA.declarations}
    assert sorted(key for key in KEYS if not {key, fields_of[key]} & found) == []


def test_the_documentation_is_current() -> None:
    assert FILE.read_text(encoding="utf-8") == render(), "run make docs"


def test_a_run_cut_short_ends_like_any_other() -> None:
    """`max_steps` within an epoch: the last step is printed, saved, checked and counted."""
    path = ran(configure("fake_lt", "tiny_clip", "max_steps", 2, "batch_size", 16, "max_test_images", 20))
    found = json.loads((path / "metrics.json").read_text())
    assert found["stopped_early"] and found["train"]["steps"] == 2 and found["train"]["images_per_second"] > 0
    assert [each.name for each in (path / "state").iterdir()] == ["00000002"]
    assert "batch [2/" in (path / "log.txt").read_text()


def test_starting_over_keeps_a_log() -> None:
    pairs = ("max_steps", 1, "batch_size", 16, "max_test_images", 20)
    first, again = (ran(configure("fake_lt", "tiny_clip", *pairs, "resume", resume)) for resume in (True, False))
    text = (again / "log.txt").read_text()
    assert first == again and text.count("run folder") == 1 and not text.startswith("\0")


def test_names_of_evaluations() -> None:
    def key(*pairs: object) -> str:
        return configure("fake_lt", "tiny_clip", *pairs).test_key

    assert key() == key("lr", 1) == key("tte", False) == "default"
    assert key("tte", True, "many_above", 5) == key("many_above", 5, "tte", True) == "many_above_5_tte_True"
    assert key("test_train", True) == "train"
    assert key("tte", True, "test_train", True, "many_above", 5) == "train_many_above_5_tte_True"


def test_an_evaluation_from_stored_logits_says_so_and_what_is_cut() -> None:
    """Other groups need no second pass over the images; that the test set was cut is noted there too."""
    path = ran(configure("fake_lt", "tiny_clip", *ONE))
    ran(configure("fake_lt", "tiny_clip", *ONE, "many_above", 5))
    notes = json.loads((path / "tests" / "many_above_5_max_test_images_20" / "metrics.json").read_text())["notes"]
    assert [any(text in note for note in notes) for text in ("from the logits of", "max_test_images 20")] == [True] * 2
