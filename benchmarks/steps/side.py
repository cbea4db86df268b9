"""`Side`: a training loop in a process of its own, which makes one step at a time."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from tailtune.configs.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


class Side:
    """A process that runs a training loop. Leaving the block of a `with` ends it.

    Args:
        module: module below `tailtune.benchmarks.steps` that runs the loop.
        row: what is trained, for the module.
        folder: working folder; for an original, its checkout.
        threads: threads of torch.

    Raises:
        UserError: the process ended before its first step.
    """

    def __init__(self, module: str, row: dict[str, Any], folder: Path, threads: int) -> None:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-m", f"tailtune.benchmarks.steps.{module}", json.dumps(row)]
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  it is read when the process has ended
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.said,
        )
        self.name = f"{module} of {row['name']}"
        self.facts = self._answer()

    def step(self, command: str = "") -> dict[str, Any]:
        """Make one step.

        Args:
            command: what the module is told; for a training loop, an entry of `clock.OBSERVED`.

        Returns:
            processor, wall: the time that it took in seconds; memory: the peak since the first step began, in bytes
                above the memory before it, or None where the system does not tell; and what else the module observed.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        self.said.seek(0)
        print(self.said.read()[-3000:], file=sys.stderr)
        raise UserError(f"{self.name} stopped; its last lines stand above")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.said.close()
