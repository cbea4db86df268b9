"""Side by side with the original H2T on a CPU: both stages, masks, losses, rates, test figures, the long tail.

    git clone https://github.com/Keke921/H2T /somewhere/H2T
    git -C /somewhere/H2T checkout f96309a
    python parity/h2t/compare.py /somewhere/H2T

The commit is the last that runs: the next one's networks stop with a TypeError. As parity_dirmixe.py: the original runs
in a process of its own (parity_h2t_original.py), parity_h2t_ours.py compares, parity_h2t_cases.py is the list. Prints a
table, writes the part `h2t` of docs/parity.json, and exits with 1 if an error is above the tolerance. Two minutes.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from tailtune.parity.experts.cases import Case  # noqa: E402
from tailtune.parity.experts.compare import above, table  # noqa: E402
from tailtune.parity.h2t.cases import inputs, job  # noqa: E402
from tailtune.parity.h2t.ours import (  # noqa: E402
    compare_figures,
    compare_loss,
    compare_masks,
    compare_rates_and_more,
    compare_stage,
    compare_tail,
)
from tailtune.parity.report import H2T, circumstances_of_figures, head, run_original, write  # noqa: E402

TOLERANCE = 1e-9
SOURCE = "https://github.com/Keke921/H2T"
PATCHES = [
    "fp64, no CUDA and boolean masks as in the part `experts`",
    "pathlib2, which only saves a copy of the code, is pathlib",
    "the config takes keys that it does not know: one YAML has `cos`",
    "the data set is one batch of random images for each of three epochs, with the class counts of the data",
    "the checkpoint that both stages read is a random network with shaken batch norms; none is written",
    "ResLT: the 1e-7 that is added to each probability before the logarithm is taken off again",
    "of test figures: tensors are printed with all digits",
    "CIFAR's images are their positions, and its classes take turns",
]
PROCEDURE = (
    "logits, loss, gradients, after_3_steps, rates: as in the part `experts`; of the stages by the original's "
    "`main_worker` with a YAML of its own and three epochs of one batch of 8 images each, so that the schedule's first "
    "three rates count (stage 2: a cosine over three epochs). The λ and orders of stage 1 are the original's, the "
    "masks of stage 2 come from the same seed. value: of stages the running statistics; of learning rates weight "
    "decay, momentum and batch size; of channels the share that one side alone overwrites, for shares 0 to 1; of test "
    "figures (accuracy, of 36 head, 35 medium and 29 tail classes too, 15-bin ECE, MCE and diagram) the largest "
    "error; of the long tail the share of images that differ; of samplers the class probabilities. Their "
    "`reweight_epoch` r is drw_epoch r + 1 here: they count epochs from 0 and ask for later ones."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help=f"a checkout of {SOURCE}")
    parser.add_argument("--only", default="", help="cases whose kind, name or data contains this; nothing is written")
    parser.add_argument("--files", type=Path, help="folder of the original's tensors; what is there is not made again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (args.files or Path(scratch)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        rows = compared(folder, args.checkout.absolute(), args.only)
    print(table(rows, TOLERANCE))
    high = sum(above(row, TOLERANCE) for row in rows)
    print(f"\n{len(rows)} cases, {high} above the tolerance of {TOLERANCE}")
    if not args.only:
        about: Case = {"originals": {"h2t": {"repository": SOURCE, "commit": head(args.checkout)}}}
        about |= {**circumstances_of_figures(), "tolerance": TOLERANCE, "procedure": PROCEDURE, "patches": PATCHES}
        write({**about, "cases": rows}, H2T)
    return int(high > 0)


def compared(folder: Path, checkout: Path, only: str) -> list[Case]:
    """All rows."""
    asked = job(only)
    if not (folder / "facts.json").exists():
        save_file(inputs(), folder / "inputs.safetensors")
        (folder / "asked.json").write_text(json.dumps(asked))
        run_original("parity_h2t_original.py", [str(folder)], checkout)
    rates, given = json.loads((folder / "facts.json").read_text())["rates"], load_file(folder / "inputs.safetensors")

    def of(kind: str) -> list[tuple[Case, dict[str, torch.Tensor]]]:
        return [(each, load_file(folder / each["file"])) for each in asked[kind]]

    rows = [compare_stage(*each, given) for each in of("stages")]
    rows += [compare_masks(*each) for each in of("masks")]
    rows += [compare_loss(*each, given) for each in of("losses")]
    rows += [compare_rates_and_more(*each) for each in zip(asked["rates"], rates, strict=True)]
    rows += [compare_figures(*each, given) for each in of("figures")]
    return [*rows, *(row for each in of("tails") for row in compare_tail(*each))]


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    sys.exit(main())
