"""The table of the embedded model on long-tailed digits: every row, three seeds, as Markdown.

    python scripts/reproduce_digits_lt.py [--seeds 0 1 2] [--print]

Runs what is not finished (each run is an ordinary run folder below output/) and ends with the table; `--print` only
shows the commands.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs import load_configs  # noqa: E402
from main import main as run_command  # noqa: E402
from trainers.folder import RunFolder  # noqa: E402

DATA = "digits_lt"
ROWS = {  # name → model config and options; a row without seeds has nothing that a seed could change
    "zero-shot": "zstiny_clip",
    "full fine-tuning, CE, random head": "tiny_clip_ft",
    "head only, LA": "tiny_clip",
    "AdaptFormer, CE": "tiny_clip_peft loss_type CE",
    "AdaptFormer, LA": "tiny_clip_peft",
}
COLUMNS = {"accuracy": "all", "many_acc": "many", "med_acc": "medium", "few_acc": "few", "worst_case_acc": "worst"}


def commands(row: str, seeds: list[int]) -> list[list[str]]:
    """The command lines of a row, without `python main.py`."""
    model, *pairs = ROWS[row].split()
    used = seeds[:1] if row == "zero-shot" else seeds
    return [["-d", DATA, "-m", model, *pairs, "seed", str(seed)] for seed in used]


def metrics(command: list[str]) -> dict[str, Any]:
    """What the run of a command wrote."""
    (cfg,) = load_configs(command[1], command[3], command[4:])
    return json.loads(RunFolder(cfg).metrics.read_text(encoding="utf-8"))


def cell(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(seeds: list[int]) -> str:
    lines = [f"| | trained | {' | '.join(COLUMNS.values())} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for row in ROWS:
        found = [metrics(command) for command in commands(row, seeds)]
        cells = [cell([each["test"][name] for each in found]) for name in COLUMNS]
        lines.append(f"| {row} | {found[0]['params']['trainable']:,} | {' | '.join(cells)} |")
    facts = f"Seeds {', '.join(map(str, seeds))}; commit {found[0]['commit']}; {found[0]['hardware']}; torch "
    return "\n".join([*lines, "", facts + found[0]["packages"]["torch"] + "."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--print", action="store_true", help="only show the commands")
    args = parser.parse_args()
    for command in (each for row in ROWS for each in commands(row, args.seeds)):
        print("python main.py", *command, flush=True)
        if not args.print and (code := run_command(command)):
            return code
    if not args.print:
        print(table(args.seeds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
