"""Compares kernels of attention in training on a CPU: torch's own in bf16 and in fp32, and TailTune's in bf16.

    python benchmarks/attention.py [--threads 1] [--rounds 5]

A row is a forward and a backward pass with random queries, keys and values, which are parts of one tensor as in a ViT.
The kernels are measured in turn, and the fastest round of each counts, in milliseconds of the processor. The error of
the gradients is their relative distance (norm) to those of fp64.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tailtune.main import Parser, exit_code_of
from tailtune.models.backbones.attention import fused_attention
from tailtune.trainers.processes.kept_memory import keep_freed_memory
from tailtune.trainers.runs.metrics_file import hardware

SHAPES = {
    "embedded CLIP, 32 pixels": (128, 2, 17, 32),
    "width 192, 64 pixels": (256, 3, 65, 64),
    "ViT-B/32, 224 pixels": (32, 12, 50, 64),
    "ViT-B/16, 224 pixels": (16, 12, 197, 64),
    "ViT-L/14, 224 pixels": (4, 16, 257, 64),
    "ViT-L/14, 336 pixels": (2, 16, 577, 64),
    "text encoder, 77 tokens": (64, 8, 77, 64),
}
"""Name → images, heads, tokens, and width of a head."""
KERNELS: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "torch fp32": (torch.float32, F.scaled_dot_product_attention),
    "torch bf16": (torch.bfloat16, F.scaled_dot_product_attention),
    "ours bf16": (torch.bfloat16, fused_attention),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code, 2 for wrong input."""
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    parser = Parser(
        prog="python benchmarks/attention.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    keep_freed_memory()
    print(f"{hardware()}, torch {torch.__version__}; {args.rounds} rounds, {args.threads} threads")
    print(f"{'':<26}" + "".join(f"{name:>20}" for name in KERNELS))
    for shape, (images, heads, tokens, width) in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        packed, wanted = (
            torch.randn(images, tokens, *rest, generator=generator).bfloat16()
            for rest in ((3, heads, width), (heads * width,))
        )
        _, exact = _pass(F.scaled_dot_product_attention, packed.double(), wanted.double())
        best = dict.fromkeys(KERNELS, (float("inf"), torch.empty(0)))
        for _ in range(args.rounds):
            for name, (dtype, kernel) in KERNELS.items():
                measured = _pass(kernel, packed.to(dtype), wanted.to(dtype))
                best[name] = min(best[name], measured, key=lambda each: each[0])
        cells = ((1e3 * seconds, float((found - exact).norm() / exact.norm())) for seconds, found in best.values())
        print(f"{shape:<26}" + "".join(f"{took:>9.1f} ms {error:.5f}" for took, error in cells), flush=True)
    return 0


def _pass(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], packed: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """Seconds of a forward and backward pass, and the gradient of `packed` [B, N, 3, H, D]."""
    packed = packed.detach().requires_grad_()
    start = time.process_time()
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind()
    kernel(q, k, v).transpose(1, 2).flatten(2).backward(wanted)
    seconds = time.process_time() - start
    return seconds, cast(Tensor, packed.grad)


if __name__ == "__main__":
    sys.exit(main())
