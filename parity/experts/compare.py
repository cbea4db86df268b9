"""Side by side with the original RIDE, SADE and BatchFormer on a CPU in fp64: logits, losses, gradients, three steps.

    git clone https://github.com/frank-xwang/RIDE-LongTailRecognition /somewhere/RIDE
    git clone https://github.com/Vanint/SADE-AgnosticLT /somewhere/SADE
    git clone https://github.com/zhihou7/BatchFormer /somewhere/BatchFormer
    python parity/experts/compare.py /somewhere/RIDE /somewhere/SADE /somewhere/BatchFormer

The configs of both sides as they are: whole networks, true class counts, random weights and images. Each original runs
in a process of its own (parity_experts_original.py) through its own train.py; parity_experts_ours.py reads what it
leaves in files and compares; parity_experts_cases.py is the list. Prints a table, writes the part `experts` of
docs/parity.json, and exits with 1 if an error is above the tolerance. About half an hour on two cores, and 10 GB of
files below --files (default: a temporary folder).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tailtune.configs import load_configs  # noqa: E402
from tailtune.datasets import build_info  # noqa: E402
from tailtune.models import resolve  # noqa: E402
from tailtune.parity.experts.cases import SADE_TIME, Case, cases, inputs, traces  # noqa: E402
from tailtune.parity.experts.ours import FIGURES, compare, compare_rates, compare_weights  # noqa: E402
from tailtune.parity.report import EXPERTS, circumstances_of_figures, head, run_original, write  # noqa: E402
from tailtune.trainers.options import declared  # noqa: E402

TOLERANCE = 1e-8
SOURCES = {
    "ride": "https://github.com/frank-xwang/RIDE-LongTailRecognition",
    "sade": "https://github.com/Vanint/SADE-AgnosticLT",
    "batchformer": "https://github.com/zhihou7/BatchFormer",
}
PARTS = {  # what runs → checkout, and the folder of it that it runs in
    "ride": ("ride", "."),
    "sade": ("sade", "."),
    "batchformer": ("batchformer", "long-tailed_recognition/RIDE-LongTailRecognition"),
    "balanced": ("batchformer", "long-tailed_recognition/BalancedSoftmax"),
}
PATCHES = [
    "fp64: the default dtype; torch.float, Tensor.float and torch.FloatTensor give fp64, so that no table is rounded",
    "no CUDA: Tensor.cuda and Module.cuda leave their object where it is",
    "masks: torch.uint8 gives booleans, which today's PyTorch wants",
    "torch.sort is stable: the inverse prior of SADE's classes with equal counts otherwise depends on the processor",
    "pandas, higher and h5py, which only log or are not called, are stand-ins",
    "the data loader is one of three batches of random images, with the class counts of the data set",
    "batch norms are moved off ones and zeros, their running statistics too",
    "the teacher's checkpoint is a random network, and the teacher is put into evaluation mode",
    "dropout of BatchFormer is 0",
    "the last bias of an expert assignment is shifted so that about half of the images ask a second expert",
    "general BatchFormer: files of class counts in its author's home are not read; the loss counts a third, because "
    "the code adds the means of both halves and of the whole",
]
PROCEDURE = (
    "The originals' own train.py with a config of theirs and the options of their README, up to the trainer; one epoch "
    "of three batches by their loop (8 images of 32 pixels, or 4 of 224, or 2 for networks of 50 layers and more; "
    "training-mode batch norms; SGD with the config's momentum, Nesterov, weight decay and first learning rate). Ours: "
    "the model config beside it and the same weights, epoch number and batches. logits: of every expert, evaluation "
    "mode. loss, gradients: the first batch. after_3_steps: all weights, running statistics, their changes, losses and "
    "logits. rates: learning rates of all parameter groups. value: share of images that ask another number of experts; "
    "of test_training_*.py the weights of the experts before softmax after each of up to five epochs. An error is "
    "|ours - original| / |original| in the L2 norm, the largest over the tensors; a gradient or a change below 1e-3 of "
    "the largest one's norm is measured by that."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, source in SOURCES.items():
        parser.add_argument(name, type=Path, help=f"a checkout of {source}")
    parser.add_argument("--commits", nargs=3, help="of the three, where the folders are no repositories")
    parser.add_argument("--only", default="", help="cases whose name or model contains this; nothing is written then")
    parser.add_argument("--files", type=Path, help="folder of the originals' tensors; what is there is not made again")
    args = parser.parse_args()
    checkouts = {name: getattr(args, name).absolute() for name in SOURCES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.files or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = compared(folder, checkouts, args.only)
    print(table(rows))
    high = sum(map(above, rows))
    print(f"\n{len(rows)} cases, {high} above the tolerance of {TOLERANCE}")
    if not args.only:
        commits = args.commits or [head(checkout) for checkout in checkouts.values()]
        originals = {n: {"repository": SOURCES[n], "commit": c} for n, c in zip(SOURCES, commits, strict=True)}
        about = {"originals": originals, **circumstances_of_figures(), "tolerance": TOLERANCE, "procedure": PROCEDURE}
        write({**about, "patches": PATCHES, "cases": rows}, EXPERTS)
    return int(high > 0)


def compared(folder: Path, checkouts: dict[str, Path], only: str) -> list[Case]:
    """All rows."""
    chosen = [case for case in cases() if only in f"{case['name']} {case['model']}"]
    if not (folder / "job.json").exists():
        run_originals(folder, checkouts, chosen, rest=not only)
    rows = []
    for case in chosen:
        rows.append(compare(folder, case))
        print(table(rows[-1:]), flush=True)
    if only:
        return rows
    facts = {name: json.loads((folder / f"{name}.json").read_text()) for name in PARTS}
    for case in traces():
        rows.append(compare_rates(case, facts[case["repository"]]["rates"][case["config"]]))
    return rows + [compare_weights(folder, script, data, model) for script, (data, model, _) in SADE_TIME.items()]


def run_originals(folder: Path, checkouts: dict[str, Path], chosen: list[Case], rest: bool) -> None:
    """Let the originals do their part; their tensors lie in `folder` afterwards."""
    names = {case["data"] for case in (*cases(), *traces())}
    bare = (resolve(load_configs(data, "tiny_clip", [], declared())[-1]) for data in names)
    job = {"cases": chosen, "counts": {cfg.data: build_info(cfg).class_counts.long().tolist() for cfg in bare}}
    job |= {"rates": traces() if rest else [], "scripts": SADE_TIME if rest else {}}
    save_file(inputs(), folder / "inputs.safetensors")
    (folder / "asked.json").write_text(json.dumps(job))
    for name, (source, below) in PARTS.items():
        run_original("parity_experts_original.py", [str(folder), name], checkouts[source] / below)
    (folder / "asked.json").rename(folder / "job.json")  # the sign that all is there


def above(row: Case, tolerance: float = TOLERANCE) -> bool:
    return any(row[name] is not None and not row[name] <= tolerance for name in FIGURES)


def table(rows: list[Case], tolerance: float = TOLERANCE) -> str:
    lines = []
    for each in rows:
        figures = "".join(f"{'' if each[name] is None else format(each[name], '.1e'):>14}" for name in FIGURES)
        mark = "  <-- above" if above(each, tolerance) else ""
        lines.append(f"{each['repository']:12}{each['model']:27}{each['name']:46.46}{figures}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    sys.exit(main())
