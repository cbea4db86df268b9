"""Measures how long commands take that do little work, beside `python -c "import torch"`.

    python benchmarks/startup.py --rounds 5

Every round runs all commands once, so that a slower phase of the machine affects all of them. The output is the median
of the user time of each process in seconds, the ratio to that of `import torch`, and the ratio that should not be
exceeded. Compiled modules are kept, as Python does by default; the first round, which fills them, is not counted.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAIN = str(ROOT / "main.py")
DEMO = ("-d", "digits_lt", "-m", "tiny_clip_peft")
TO_FIRST_STEP = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from tailtune.main import main
from tailtune.trainers.methods import Method
Method.after_step = lambda self, step: os._exit(0)
main(sys.argv[1:])
"""
"""Program that trains like `main.py`, and ends after the first step."""
BASE = "import torch"
COMMANDS: dict[str, tuple[tuple[str, ...], float, int]] = {
    "unknown option": ((MAIN, *DEMO, "learning_rat", "0.1"), 0.3, 2),
    "unknown config": ((MAIN, "-d", "digits_lt", "-m", "tiny_clip_pet"), 0.3, 2),
    "finished before": ((MAIN, *DEMO, "max_steps", "5"), 0.4, 0),
    "--dry-run": ((MAIN, *DEMO, "--dry-run"), 1.6, 0),
    "test_only, saved logits": ((MAIN, *DEMO, "max_steps", "5", "test_only", "True", "few_below", "{round}"), 1.8, 0),
    "first training step": (("-c", TO_FIRST_STEP, *DEMO, "output_dir", "round{round}"), 2.2, 0),
}
"""Name → arguments of Python ({round} is replaced by a number), largest ratio, and exit code."""


def user_seconds(arguments: Sequence[str], folder: Path, exit_code: int = 0) -> float:
    """Run Python and measure the user time of this process and of the processes that it has waited for.

    Args:
        arguments: arguments of Python.
        folder: working directory.
        exit_code: the exit code that the process must have.

    Returns:
        Seconds.

    Raises:
        RuntimeError: the process had another exit code.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != exit_code:
        raise RuntimeError(f"{' '.join(arguments)} ended with exit code {process.returncode}, not {exit_code}")
    return usage.ru_utime


def measure(rounds: int) -> dict[str, float]:
    """Run all commands in turn.

    Args:
        rounds: number of counted rounds.

    Returns:
        Name of a command, or BASE → median of its user time, in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in (BASE, *COMMANDS)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        user_seconds((MAIN, *DEMO, "max_steps", "5"), folder)
        for number in range(rounds + 1):
            times[BASE].append(user_seconds(("-c", BASE), folder))
            for command, (arguments, _, exit_code) in COMMANDS.items():
                words = [word.replace("{round}", str(number + 3)) for word in arguments]
                times[command].append(user_seconds(words, folder, exit_code))
    return {command: statistics.median(seconds[1:]) for command, seconds in times.items()}


def main() -> None:
    """Read the arguments, measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    medians = measure(parser.parse_args().rounds)
    print(f"{'command':<26}{'user s':>8}{'ratio':>8}{'limit':>8}")
    print(f"{BASE:<26}{medians[BASE]:8.2f}{1:8.2f}")
    for name, (_, limit, _) in COMMANDS.items():
        print(f"{name:<26}{medians[name]:8.2f}{medians[name] / medians[BASE]:8.2f}{limit:8.2f}")


if __name__ == "__main__":
    main()
