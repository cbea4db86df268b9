"""Prints a line on standard error when a process has ended: `python last_line.py PID LINE`.

`trainers/processes/launcher.py` starts it. It is a program of its own, because it outlives the process that does.
"""

import os
import sys
import time

LONGEST = 120
"""Seconds to wait; a launcher gives its processes 30."""
APART = 5
"""Seconds between the ends of processes whose launcher has gone."""


def has_ended(process: int) -> bool:
    """Whether a process, not a child of this one, is gone or waits to be collected (Linux)."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


if __name__ == "__main__":
    number, line = int(sys.argv[1]), sys.argv[2]
    end = time.monotonic() + LONGEST
    while not has_ended(number) and time.monotonic() < end:
        time.sleep(0.02)
    os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    os.close(2)  # whoever reads it need not wait
    time.sleep(APART)  # with the socket of `ranks.say_last`, so that a process that ends a little later says nothing
