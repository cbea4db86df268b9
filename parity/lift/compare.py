"""Side by side with the original LIFT on a CPU: features, logits, loss, gradients, three steps, and their surroundings.

    git clone https://github.com/shijxcs/LIFT /somewhere/LIFT
    python parity/lift/compare.py /somewhere/LIFT

Small random networks, the same values and inputs on both sides. The original runs in a process of its own
(parity_original.py) and leaves weights, gradients and checkpoints in files; parity_ours.py reads them through our own
loading and compares; parity_cases.py is the list. Prints a table, writes docs/parity.json, and exits with 1 if an error
is above the tolerance. Two minutes on one core.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from tailtune.parity.lift.cases import COUNTS, EPOCHS, GROUPS, Case, builds, cases, inputs, sizes  # noqa: E402
from tailtune.parity.lift.ours import compare, register, surroundings  # noqa: E402
from tailtune.parity.report import circumstances_of_figures, head, write  # noqa: E402

FIGURES = ("features", "logits", "loss", "gradients", "after_3_steps", "value")
TOLERANCES = {**dict.fromkeys(FIGURES, 1e-4), "float64": 1e-5}
PROCEDURE = (
    "Small networks with random weights, made by the original's classes (CLIP ViT: 3 blocks of width 128; CLIP ResNet: "
    "width 8) and by timm (ViT-Ti/16, its 'IN21K' kind), on a CPU in fp32. Tuner and head are moved off their special "
    "starts by noise of 0.05 on the original's side; its state dicts are loaded into ours by the importer of its "
    "checkpoints. features, logits: evaluation mode, before training. loss, gradients: the first of three batches of "
    "12 images of 10 long-tailed classes. after_3_steps: tuner, head, running statistics, loss and logits after the "
    "original's own Trainer.train() on these batches (SGD 0.01, momentum 0.9, weight decay 5e-4) and our three steps. "
    "An error is |ours - original| / |original| in the L2 norm, the largest over the tensors; a gradient with a norm "
    "below 1e-3 of the largest one's is measured by that, because some are zero but for rounding (biases of keys). "
    "float64: the largest of these errors, and of those of the change over the three steps, when both compute in fp64. "
    "value: what the other kinds compare (init: the head's weight; zero_shot: logits)."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="a checkout of https://github.com/shijxcs/LIFT")
    parser.add_argument("--commit", help="of the original, where the folder is no repository")
    parser.add_argument("--only", help="cases whose name contains this; nothing is written then")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [case for case in cases() if (arguments.only or "") in case["name"]]
    with tempfile.TemporaryDirectory() as scratch:
        folder, checkout = Path(scratch), arguments.original.absolute()
        facts = run_original(checkout, folder, chosen)
        register(folder)
        rows = [compare(folder, index, case, checkout) for index, case in enumerate(chosen)]
        rows += surroundings(folder, facts)
    print(table(rows))
    high = sum(above(row) for row in rows)
    print(f"\n{len(rows)} cases, {high} above the tolerance of 1e-4, or 1e-5 in fp64")
    if not arguments.only:
        original = {"repository": "https://github.com/shijxcs/LIFT", "commit": arguments.commit or head(checkout)}
        about = {"original": original, **circumstances_of_figures(), "tolerance": TOLERANCES, "procedure": PROCEDURE}
        write({**about, "cases": rows})
    return int(high > 0)


def run_original(checkout: Path, folder: Path, chosen: list[Case]) -> dict[str, Any]:
    """Let the original do its part; its tensors lie in `folder` afterwards."""
    job = {"backbones": builds(), "cases": chosen, "sizes": sizes()}
    job |= {"counts": COUNTS, "groups": GROUPS, "epochs": EPOCHS}
    (folder / "job.json").write_text(json.dumps(job))
    save_file(inputs(), folder / "inputs.safetensors")
    command = [sys.executable, str(ROOT / "benchmarks" / "parity_original.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the original stopped:\n{done.stderr[-3000:]}")
    return json.loads((folder / "original.json").read_text())


def above(row: Case) -> bool:
    return any(row[name] is not None and not row[name] <= limit for name, limit in TOLERANCES.items())


def table(rows: list[Case]) -> str:
    lines = [" " * 72 + "".join(f"{name:>14}" for name in TOLERANCES)]
    for row in rows:
        figures = "".join(f"{'' if row[name] is None else format(row[name], '.1e'):>14}" for name in TOLERANCES)
        mark = "  <-- above" if above(row) else ""
        lines.append(f"{row['kind']:9}{row['backbone']:17}{row['name']:46.46}{figures}{mark}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
