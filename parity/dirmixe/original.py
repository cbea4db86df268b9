"""The original's side of parity_dirmixe.py: a process of its own whose working folder is a checkout of DirMixE.

As parity_experts_original.py, whose patches and launch of their train.py it uses; what is drawn in fp32 comes first.
"""

import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailtune.parity.experts.networks import Tensors
from tailtune.parity.experts.original import SMALL, patch, rates, train

Case = dict[str, Any]
TRIALS = {"uniform": 3, "forward": 3, "backward": 3}


def main(folder: Path) -> None:
    """All that parity_dirmixe.py asks for in asked.json; one file a case comes out."""
    Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.sort = functools.partial(torch.sort, stable=True)
    sys.modules["pandas"] = MagicMock(__spec__=ModuleSpec("pandas", None))
    for kind in (torchvision.datasets.CIFAR10, torchvision.datasets.CIFAR100):
        kind.__init__ = without_images  # type: ignore[method-assign]
    sys.path[0] = str(Path.cwd())  # `model`, `trainer`, `utils` … are the original's here
    job, given = json.loads((folder / "asked.json").read_text()), load_file(folder / "inputs.safetensors")
    for name, kind in {"pool": pool, "sets": test_sets}.items():
        for case in job[name]:
            save_file(kind(case, folder), folder / case["file"])
    facts: Case = {"phases": {epochs: phases(epochs) for epochs in job["phases"]}, "rates": {}}
    patch()
    for index, case in enumerate(job["losses"]):
        torch.manual_seed(index)
        save_file(loss(case, given), folder / case["file"])
    for index, case in enumerate(job["cases"]):
        torch.manual_seed(1000 + index)
        save_file(train(case, job, given, folder), folder / case["file"])
    for case in job["rates"]:
        facts["rates"][case["config"]] = rates(case, job, folder, {**case["theirs"], "arch": SMALL})
    (folder / "facts.json").write_text(json.dumps(facts))


def without_images(self: Any, root: str, train: bool = True, *_: Any, **__: Any) -> None:
    """In the place of CIFAR: every image is its position, and classes take turns."""
    size = 50000 if train else 10000
    classes = 100 if isinstance(self, torchvision.datasets.CIFAR100) or getattr(self, "cls_num", 10) == 100 else 10
    self.data, self.targets = np.arange(size).reshape(-1, 1), [index % classes for index in range(size)]


def criterion(counts: list[int], settings: Case) -> Any:
    return importlib.import_module("model.loss").LogitAdjustExpertLoss(counts, **settings)


def drawn(pool: list[tuple[Tensor, int]]) -> Tensors:
    priors, experts = zip(*pool, strict=True)
    return {"experts": torch.tensor(experts), "priors": torch.stack(list(priors))}


def pool(case: Case, _: Path) -> Tensors:
    """The pool of an epoch after each shuffle; before it their data set has chosen its images, if it is CIFAR's."""
    np.random.seed(0)
    counts = case["counts"]
    if case["chooses"]:
        own = getattr(importlib.import_module("data_loader.imbalance_cifar"), f"IMBALANCECIFAR{len(counts)}")
        counts = own("", imb_type="exp", imb_factor=0.01).get_cls_num_list()
    given = criterion(counts, case["theirs"])
    given.generate_weights_pool(case["per_epoch"])
    found: Tensors = {"counts": torch.tensor(counts)}
    for epoch in range(case["epochs"]):
        given.start_new_epoch(epoch + 1, 201)
        found |= {f"{name}.{epoch}": each for name, each in drawn(given.pool).items()}
    return found


def phases(epochs: int) -> list[int]:
    """Epochs, from 1 on, in which the semi-variance counts."""
    given = criterion([2, 1], {})
    given.pool = []
    found = []
    for epoch in range(1, epochs + 1):
        given.start_new_epoch(epoch, epochs + 1)  # as their trainer calls it
        found += [] if given.flag else [epoch]
    return found


def loss(case: Case, given: Tensors) -> Tensors:
    """Of random logits, and its gradient."""
    np.random.seed(0)
    own = criterion(case["counts"], case["theirs"])
    own.generate_weights_pool(1)
    own.start_new_epoch(case["epoch"], 201)
    logits = given[case["logits"]].clone().requires_grad_()
    value = own(None, given[case["labels"]], {"logits": logits.transpose(0, 1)})
    value.backward()
    assert logits.grad is not None
    return {"loss": value.detach(), "gradient": logits.grad, **drawn(own.pool)}


# --- test sets -------------------------------------------------------------------------------------------------------


def test_sets(case: Case, folder: Path) -> Tensors:
    """Images of all trials to learn from and to evaluate, as positions in the list that the script reads."""
    script = importlib.import_module(case["script"])
    script.fix_numpy_seed(0)
    more, place = _lists(case, folder) if case["list"] else ({}, lambda chosen: torch.from_numpy(chosen.data[:, 0]))
    found: Tensors = {}
    for trial, component in enumerate(_components()):
        ratio = 1 if component == "uniform" else case["ratio"]
        given = {"batch_size": 128, "training": False, "test_imb_factor": ratio, "reverse": component == "backward"}
        loader = getattr(script, case["loader"])("", num_workers=0, **given, **more)
        found[f"learn.{trial}"], found[f"evaluate.{trial}"] = map(place, (loader.train_dataset, loader.val_dataset))
    return found


def _components() -> Iterator[str]:
    for component, trials in TRIALS.items():
        yield from [component] * trials


def _lists(case: Case, folder: Path) -> tuple[Case, Callable[[Any], Tensor]]:
    """A training list of the right counts in the place of theirs; and how an image is found in the test list."""
    path = folder / "train.txt"
    path.write_text("".join(f"- {k}\n" * count for k, count in enumerate(case["counts"])))
    lines = Path(case["list"]).read_text().splitlines()
    position = {line.split()[0]: index for index, line in enumerate(lines)}
    return {"train_txt": str(path)}, lambda chosen: torch.tensor([position[each] for each in chosen.img_path])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
