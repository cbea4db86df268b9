"""The original's side of parity_h2t.py: a process of its own whose working folder is a checkout of H2T.

As parity_experts_original.py, whose patches it uses. Both stages run by the `main_worker` of their scripts, an epoch
being one batch; in memory their data set, their test and their files are replaced.
"""

import importlib
import json
import pathlib
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tailtune.parity.dirmixe.original import without_images
from tailtune.parity.experts.networks import Tensors, named, shake
from tailtune.parity.experts.original import patch

Case = dict[str, Any]
SHARES = (0.0, 0.25, 0.29, 0.3, 0.5, 1.0)


def main(folder: Path) -> None:
    """All that parity_h2t.py asks for in asked.json; one file a case comes out."""
    sys.modules["pathlib2"] = pathlib
    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        kind.__init__ = without_images  # type: ignore[method-assign]
    patch()
    sys.path[0] = str(Path.cwd())  # `datasets`, `models`, `utils` … are the original's here
    job, given = json.loads((folder / "asked.json").read_text()), load_file(folder / "inputs.safetensors")
    kinds = {"stages": stage, "losses": loss, "masks": masks, "figures": figures, "tails": tail}
    for name, kind in kinds.items():
        for index, case in enumerate(job[name]):
            torch.manual_seed(index)
            np.random.seed(index)
            found = kind(case, job, given)
            save_file({k: each.detach().clone().contiguous() for k, each in found.items()}, folder / case["file"])
    facts = [rates(case, job) for case in job["rates"]]
    (folder / "facts.json").write_text(json.dumps({"rates": facts}))


def configured(case: Case, *words: object) -> Any:
    """Their config of a file and of what is changed in it."""
    theirs = importlib.import_module("utils.logger")
    config = theirs._C.clone()
    config.set_new_allowed(True)
    if "config" in case:
        theirs.update_config(config, Namespace(cfg=case["config"], opts=[]))
    config.merge_from_list(list(words))
    return config


# --- their scripts ---------------------------------------------------------------------------------------------------


class OneAnEpoch:
    """Their data loader, of tensors: a batch for each epoch."""

    batch_size, dataset = 1, (None,)

    def __init__(self, batches: Iterator[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield next(self.batches)

    def __len__(self) -> int:
        return 1


def launch(case: Case, job: Case, config: Any, batches: Iterator[Any], **instead: Callable[..., Any]) -> None:
    """`main_worker` of a stage with functions of its script, and `load` of torch, replaced."""
    script = importlib.import_module(f"train_stage{case['stage']}")
    data = SimpleNamespace(
        train_instance=OneAnEpoch(batches), eval=None, cls_num_list=job["counts"][case["data"]], dist_sampler=None
    )
    load = instead.pop("load", None)
    config.resume = "train_stage1.py" if load else ""  # a file that is there
    own = {"CIFAR100_LT": lambda *_, **__: data, "save_checkpoint": lambda *_: None, **instead}
    with mock.patch.multiple(script, **own), mock.patch.object(torch, "load", load):
        script.main_worker(None, 0, config, mock.MagicMock(), "")


def stage(case: Case, job: Case, given: Tensors) -> Tensors:
    """Weights to start from, what is drawn, first gradients, and what three epochs of their loop lead to."""
    config = configured(case, "num_epochs", job["epochs"], *(each for pair in case["theirs"].items() for each in pair))
    out: Tensors = {}
    noted: dict[str, list[Any]] = {"Loss": [], "lr": [], "order": [], "share": []}

    class Meter(importlib.import_module("utils").AverageMeter):  # type: ignore[misc,name-defined]
        def update(self, value: Any, n: int = 1) -> None:
            noted.setdefault(self.name, []).append(value)

    def load(*_: Any, **__: Any) -> Case:
        networks = importlib.import_module("models.resnet_cifar")
        model, classifier = networks.resnet32_fe(), networks.Classifier(feat_in=64, num_classes=100)
        shake(model)
        shake(classifier)
        out.update(named("start", state(model, classifier)))
        out["before.logits"] = answer(model, classifier, given["images"][-1])
        torch.manual_seed(case["stage"])
        weights = {"state_dict_model": model.state_dict(), "state_dict_classifier": classifier.state_dict()}
        return {"best_acc1": 0, "its_ece": 0, "epoch": 0, **weights}

    def validate(_: Any, model: nn.Module, classifier: nn.Module, *__: Any) -> tuple[float, float]:
        if "after.conv1.weight" not in out:
            parts = {"": model, "classifier.": classifier}
            parameters = {f"{at}{n}": p for at, part in parts.items() for n, p in part.named_parameters()}
            out.update(named("gradient", {n: p.grad for n, p in parameters.items() if p.grad is not None}))
        out.update(named("after", state(model, classifier)))
        out["end.logits"] = answer(model, classifier, given["images"][-1])
        return 0.0, 0.0

    batches = zip(given["images"], given["labels"], [{"sample_image": each} for each in given["partners"]], strict=True)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "randperm", keeping(torch.randperm, noted["order"])))
        stack.enter_context(mock.patch.object(np.random, "beta", keeping(np.random.beta, noted["share"])))
        launch(case, job, config, batches, load=load, validate=validate, AverageMeter=Meter)
    drawn = {"orders": torch.stack(noted["order"]), "shares": torch.tensor(noted["share"])} if noted["order"] else {}
    return out | drawn | {"losses": torch.tensor(noted["Loss"]), "rates": torch.tensor(noted["lr"])}


def keeping(function: Callable[..., Any], into: list[Any]) -> Callable[..., Any]:
    """A function whose results are kept."""

    def kept(*args: Any, **kwargs: Any) -> Any:
        into.append(function(*args, **kwargs))
        return into[-1]

    return kept


def state(model: nn.Module, classifier: nn.Module) -> Tensors:
    return model.state_dict() | {f"classifier.{name}": each for name, each in classifier.state_dict().items()}


@torch.no_grad()
def answer(model: nn.Module, classifier: nn.Module, images: Tensor) -> Tensor:
    """Logits [B, 1, C] in evaluation mode."""
    logits: Tensor = classifier.eval()(model.eval()(images))
    return logits.unsqueeze(1)


def rates(case: Case, job: Case) -> Case:
    """Learning rates of the groups in every epoch, and what else the optimizer and the loader are given."""
    found: list[list[float]] = []
    given: Case = {}

    def train(_: Any, __: Any, ___: Any, ____: Any, optimizer: Any, *_____: Any) -> None:
        found.append([group["lr"] for group in optimizer.param_groups])
        given.update({name: optimizer.param_groups[0][name] for name in ("weight_decay", "momentum")})

    config = configured(case)
    launch(case, job, config, iter(()), train=train, validate=lambda *_: (0.0, 0.0))
    return {"rates": found, **given, "batch_size": config.batch_size}


# --- functions by themselves -----------------------------------------------------------------------------------------


def loss(case: Case, job: Case, given: Tensors) -> Tensors:
    """Of random logits, and its gradient; of ResLT also as it is."""
    settings = {name: each for name, each in case["theirs"].items() if "." in name}
    config = configured({}, *(each for k, v in settings.items() for each in (f"loss.{k}", v)))
    config.dataset = case["data"].split("_")[0]
    kind, counts = case["theirs"]["type"], job["counts"][case["data"]]
    more = {k: v for k, v in case["theirs"].items() if k not in settings and k != "type"}
    about = {} if kind == "LabelAwareSmoothing" else {"config": config}
    criterion = getattr(importlib.import_module("loss"), kind)(cls_num_list=counts, **about, **more)
    if hasattr(criterion, "_hook_before_epoch"):
        criterion._hook_before_epoch(job["reweighted"] + 1)
    logits = given[f"logits.{case['data']}"][:, : case["experts"]].clone().requires_grad_()
    target, out = given[f"labels.{case['data']}"], {}
    if kind == "ResLoss":
        out["as_it_is"] = criterion(list(logits.unbind(1)), target)
        criterion.softmax = Bare()
    output = list(logits.unbind(1)) if kind == "ResLoss" else logits.mean(1)
    value = criterion(output, target, {"logits": list(logits.unbind(1))} if kind == "RIDELoss" else None)
    value.backward()
    assert logits.grad is not None
    return out | {"loss": value, "gradient": logits.grad}


class Bare(nn.Module):
    """A softmax that takes off what their loss adds to it."""

    def forward(self, logits: Tensor) -> Tensor:
        return F.softmax(logits, 1) - 1e-7


def masks(case: Case, *_: Any) -> Tensors:
    """Which channels their function overwrites, of every share in turn: [E, D] of zeros and ones."""
    function, width, experts = importlib.import_module("methods").H2T, case["width"], case["experts"]
    torch.manual_seed(width)
    out = {}
    for share in SHARES:
        first = torch.zeros(experts, 1, width, 2, 2)
        second = torch.ones_like(first)
        found = function(first[0], second[0], share) if experts == 1 else function(first, second, share)
        out[f"share.{share}"] = found.view(experts, width, 2, 2).mean((2, 3))
    return out


def figures(case: Case, _: Case, given: Tensors) -> Tensors:
    """What `validate` returns and prints of given logits: accuracy, ECE, those of three groups; bins of the diagram."""
    script, config, logger, kept = importlib.import_module("train_stage2"), configured(case), mock.MagicMock(), []
    loader = list(zip(given["test.logits"].split(500), given["test.labels"].split(500), strict=True))
    same, in_full = nn.Identity(), lambda self, _: repr(self.item())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(script, "calibration", keeping(script.calibration, kept)))
        stack.enter_context(mock.patch.object(Tensor, "__format__", in_full))
        accuracy, ece = script.validate(loader, same, same, F.cross_entropy, config, logger)
    printed = " ".join(str(call.args[0]) for call in logger.info.call_args_list)
    groups = [float(re.findall(rf" {name}Acc ([0-9.e-]+)%", printed)[-1]) for name in "HMT"]
    bins = {name: torch.tensor(np.asarray(kept[0][name])) for name in ("counts", "accuracies", "confidences")}
    worst = 100 * kept[0]["max_calibration_error"]
    return bins | {"figures": torch.tensor([float(accuracy), float(ece), worst, *groups])}


def tail(case: Case, *_: Any) -> Tensors:
    """Images of the long tail as positions, class counts; class frequencies of the images beside those."""
    kind = case["data"].split("_")[0]
    module = importlib.import_module(f"datasets.{kind}")
    words = ("sampler.dual_sample.enable", True, "sampler.dual_sample.type", "long-tailed")
    chosen = getattr(module, f"IMBALANCE{kind.upper()}")(configured({}, *words), "", imb_factor=case["factor"])
    chosen.transform, chosen.target_transform = lambda image: image, None
    with mock.patch.object(module.Image, "fromarray", lambda image: image):
        beside = [chosen[index][2]["sample_label"] for index in range(len(chosen.targets))]
    reverse = torch.tensor(chosen.class_weight) / chosen.sum_weight
    counts = torch.tensor(chosen.get_cls_num_list())
    out = {"positions": torch.from_numpy(chosen.data[:, 0]), "counts": counts, "reverse": reverse}
    return out | {"shuffle": torch.tensor(beside).bincount() / len(beside)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
