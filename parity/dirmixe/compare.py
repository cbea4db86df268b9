"""Side by side with the original DirMixE on a CPU: test priors, losses, gradients, networks, rates, drawn test sets.

    git clone https://github.com/scongl/DirMixE /somewhere/DirMixE
    python parity/dirmixe/compare.py /somewhere/DirMixE

As parity_experts.py, whose comparison of whole networks it uses: the original runs in a process of its own
(parity_dirmixe_original.py), parity_dirmixe_ours.py compares, parity_dirmixe_cases.py is the list. Prints a table,
writes the part `dirmixe` of docs/parity.json, and exits with 1 if an error is above the tolerance. Ten minutes on two
cores.
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

from tailtune.parity.dirmixe.cases import inputs, job  # noqa: E402
from tailtune.parity.dirmixe.ours import compare_loss, compare_phases, compare_pool, compare_sets  # noqa: E402
from tailtune.parity.experts.cases import Case  # noqa: E402
from tailtune.parity.experts.compare import TOLERANCE, above, table  # noqa: E402
from tailtune.parity.experts.ours import compare, compare_rates  # noqa: E402
from tailtune.parity.report import DIRMIXE, circumstances_of_figures, head, run_original, write  # noqa: E402

SCALAR = "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"
"""Features that NumPy is to do without in the original's process: vectorised sorts order equal counts otherwise."""
SOURCE = "https://github.com/scongl/DirMixE"
PATCHES = [
    "no CUDA: Tensor.cuda and Module.cuda leave their object where it is; torch.sort is stable",
    "losses and networks in fp64, batch norms and data loader as in the part `experts`; pools and test sets in fp32",
    "the config of iNaturalist names a kind of data that the loss refuses: ImageNet in its place",
    "NumPy sorts without vector instructions, as when the published lists were made: it decides between equal counts",
    "CIFAR's images are their positions, and its classes take turns; pandas, which only logs, is a stand-in",
    "training lists are made from our class counts",
]
PROCEDURE = (
    "logits, loss, gradients, after_3_steps, rates: as in the part `experts`, with the original's draws on both sides. "
    "Loss of logits: 60 draws, 16 samples. value: of pools the largest difference of any w or k in three epochs of the "
    "whole pool; of the semi-variance the epochs, of 200, 180 and 100, in which one side counts it and the other does "
    "not; of test sets the share of the 9 trials' sets (to learn from and to evaluate) that are not the same images."
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
    high = sum(map(above, rows))
    print(f"\n{len(rows)} cases, {high} above the tolerance of {TOLERANCE}")
    if not args.only:
        about = {"originals": {"dirmixe": {"repository": SOURCE, "commit": head(args.checkout)}}}
        about |= {**circumstances_of_figures(), "tolerance": TOLERANCE, "procedure": PROCEDURE, "patches": PATCHES}
        write({**about, "cases": rows}, DIRMIXE)
    return int(high > 0)


def compared(folder: Path, checkout: Path, only: str) -> list[Case]:
    """All rows, each printed when it is there."""
    asked = job(checkout, only)
    if not (folder / "facts.json").exists():
        save_file(inputs(asked["counts"]), folder / "inputs.safetensors")
        (folder / "asked.json").write_text(json.dumps(asked))
        run_original("parity_dirmixe_original.py", [str(folder)], checkout, NPY_DISABLE_CPU_FEATURES=SCALAR)
    facts, given = json.loads((folder / "facts.json").read_text()), load_file(folder / "inputs.safetensors")
    rows: list[Case] = []

    def add(found: Case) -> None:
        rows.append(found)
        print(table(rows[-1:]), flush=True)

    add(compare_phases(facts["phases"]))
    for each in asked["pool"]:
        add(compare_pool(each, load_file(folder / each["file"])))
    for each in asked["losses"]:
        add(compare_loss(each, load_file(folder / each["file"]), given))
    for each in asked["sets"]:
        add(compare_sets(each, load_file(folder / each["file"])))
    for each in asked["rates"]:
        add(compare_rates(each, facts["rates"][each["config"]]))
    for each in asked["cases"]:
        add(compare(folder, each))
    return rows


if __name__ == "__main__":
    torch.set_grad_enabled(True)
    sys.exit(main())
