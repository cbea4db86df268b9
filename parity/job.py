"""What an original is asked for and what it answers, in files of a folder: two processes that share no module.

asked.json            the cases, by kind, and the settings that all cases share
inputs.safetensors    images, labels and logits that both sides compute with
KIND.NUMBER.safetensors    the answer to a case that has tensors
facts.PART.json       the answers that are plain numbers, of one original
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

Case = dict[str, Any]
"""What one comparison needs to know, as JSON. `number` and `file` are added by `chosen`."""
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Job:
    """A folder with cases, settings and inputs, and with the original's answers once it has run."""

    folder: Path
    cases: Mapping[str, Sequence[Case]]
    """Kind → its cases."""
    settings: Mapping[str, Any]
    """What all cases share, for example the class counts of each data set."""
    inputs: Tensors

    @classmethod
    def read(cls, folder: Path, part: str) -> "Job":
        """The job in a folder, with the cases of one original only.

        Args:
            folder: where `write` was called.
            part: name of the original. A case without a `repository` is of every original.
        """
        asked = json.loads((folder / "asked.json").read_text())
        cases = {
            kind: [case for case in cases if case.get("repository", part) == part]
            for kind, cases in asked["cases"].items()
        }
        return cls(folder, cases, asked["settings"], load_file(folder / "inputs.safetensors"))

    def write(self) -> None:
        """Write what the original reads, and remove the facts of an earlier run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("facts.*.json"):
            path.unlink()
        (self.folder / "asked.json").write_text(json.dumps({"cases": self.cases, "settings": self.settings}))
        save_file(self.inputs, self.folder / "inputs.safetensors")

    # the original's side

    def answer(self, kind: str, function: Callable[[Case, "Job"], Tensors], seed: int = 0) -> None:
        """Write the tensors that the original computes for every case of a kind.

        A file that an earlier run wrote for the same case is kept.

        Args:
            kind: kind of the cases.
            function: (case, job) → tensors by name.
            seed: random seed of the case with number 0; the next case has the next seed.
        """
        for case in self.cases[kind]:
            path, unfinished = self.folder / case["file"], self.folder / "unfinished"
            if _answered_case(path) == case:
                continue
            torch.manual_seed(seed + case["number"])
            np.random.seed(seed + case["number"])
            tensors = {name: tensor.detach().clone().contiguous() for name, tensor in function(case, self).items()}
            save_file(tensors, unfinished, metadata={"case": json.dumps(case)})
            unfinished.replace(path)

    def write_facts(self, part: str, functions: Mapping[str, Callable[[Case, "Job"], Any]]) -> None:
        """Write the numbers that the original computes for every case of some kinds.

        Args:
            part: name of the original.
            functions: kind → (case, job) → any value that JSON can hold.
        """
        facts = {
            kind: {case["number"]: function(case, self) for case in self.cases[kind]}
            for kind, function in functions.items()
        }
        (self.folder / f"facts.{part}.json").write_text(json.dumps(facts))

    # our side

    def tensors(self, case: Case) -> Tensors:
        """The tensors that the original computed for a case."""
        return load_file(self.folder / case["file"])

    def fact(self, kind: str, case: Case) -> Any:
        """The numbers that the original computed for a case of a kind."""
        return self._facts[kind][str(case["number"])]

    @cached_property
    def _facts(self) -> dict[str, dict[str, Any]]:
        facts: dict[str, dict[str, Any]] = {}
        for path in self.folder.glob("facts.*.json"):
            for kind, values in json.loads(path.read_text()).items():
                facts.setdefault(kind, {}).update(values)
        return facts


def in_precisions(
    set_precision: Callable[[str], None], play: Callable[[Case, Job, str], Tensors]
) -> Callable[[Case, Job], Tensors]:
    """A function for `Job.answer` that computes a case in each of its precisions; names begin with the precision.

    Args:
        set_precision: makes the original compute in a precision, float32 or float64.
        play: (case, job, precision) → tensors by name.
    """

    def answer(case: Case, job: Job) -> Tensors:
        tensors: Tensors = {}
        for prec in case["prec"]:
            set_precision(prec)
            tensors |= {f"{prec}.{name}": tensor for name, tensor in play(case, job, prec).items()}
        return tensors

    return answer


def chosen(cases: Mapping[str, Sequence[Case]], only: str) -> dict[str, list[Case]]:
    """Give the cases numbers and files, and keep those that contain a text.

    The numbers are those among all cases. They decide the random seeds, so a case alone has the figures that it has
    among all.

    Args:
        cases: kind → its cases.
        only: a text, looked for in the kind, name, network and data of a case; empty for all cases.
    """
    return {
        kind: [
            case | {"number": number, "file": f"{kind}.{number}.safetensors"}
            for number, case in enumerate(of_kind)
            if only in _description(kind, case)
        ]
        for kind, of_kind in cases.items()
    }


def _description(kind: str, case: Case) -> str:
    words = (case.get(key, "") for key in ("kind", "name", "model", "backbone", "data"))
    return " ".join((kind, *words))


def _answered_case(path: Path) -> Case | None:
    """The case that a file of tensors was written for; None if there is no file."""
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        case: Case = json.loads(file.metadata()["case"])
    return case
