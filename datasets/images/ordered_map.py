"""`ordered_map`: a function of many items in parallel threads, with a bounded number of results in memory."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

from tailtune.configs.machine import available_processors

ITEMS_PER_TASK = 32
"""Number of items that a thread works on before it takes the next ones, if their results are small."""

Result = TypeVar("Result")


def ordered_map(
    function: Callable[[int], Result], count: int, description: str, per_task: int = ITEMS_PER_TASK
) -> Iterator[Result]:
    """Call a function with 0 … count − 1. Image decoders let other threads run, so they gain from threads.

    A progress bar appears on a terminal if this takes longer than two seconds.

    Args:
        function: is called in several threads.
        count: number of items.
        description: text of the progress bar.
        per_task: most items that a thread works on at once. About 2 · processors · `per_task` results are in memory.

    Yields:
        The results in their order.
    """
    threads = available_processors()
    step = max(1, min(per_task, count // (4 * threads)))

    def some(start: int) -> list[Result]:
        return [function(item) for item in range(start, min(start + step, count))]

    waiting: deque[Future[list[Result]]] = deque()
    with (
        tqdm(total=count, desc=description, delay=2, leave=False, unit="image", disable=None) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for start in range(0, count, step):
                waiting.append(pool.submit(some, start))
                if len(waiting) > 2 * threads:
                    yield from _finished(waiting.popleft(), bar)
            while waiting:
                yield from _finished(waiting.popleft(), bar)
        finally:  # after Ctrl-C, what has not begun must not be waited for
            for task in waiting:
                task.cancel()


def _finished(task: "Future[list[Result]]", bar: "tqdm[None]") -> list[Result]:
    done = task.result()
    bar.update(len(done))
    return done
