"""TailTune's command line: `python main.py -d DATA -m MODEL [KEY VALUE ...]`."""

if __name__ == "__main__":  # Ctrl-C may meet any import, so the first lines answer it
    import _signal  # built in; `signal` takes its time
    import os

    _signal.signal(_signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))
    from tailtune.trainers.processes.exit import end_at_signals

    end_at_signals()

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

from tailtune.configs import CfgNode, UserError, describe, load_configs, names
from tailtune.configs.launch_environment import check_environment
from tailtune.configs.library_messages import libraries_on_stdout
from tailtune.trainers.processes.console_log import show_any_text
from tailtune.trainers.processes.exit import run_as_process, say
from tailtune.trainers.processes.interrupts import Interrupted
from tailtune.trainers.processes.launcher import LOST, one_is_lost

EXAMPLES = """
examples:
  python main.py -d digits_lt -m tiny_clip_peft                  train and evaluate, offline, on a CPU
  python main.py -d cifar100_ir100 -m clip_vit_b16_peft          CLIP ViT-B/16 with AdaptFormer (downloads both)
  python main.py -d imagenet_lt -m clip_vit_b16 lora True root /data/imagenet
  python main.py -d my.yaml -m clip_vit_b16_peft                 your own images, see README
  python main.py -d digits_lt -m tiny_clip_peft test_only True tte True
  accelerate launch main.py -d places_lt -m clip_vit_b16_peft    several GPUs

The same command again resumes an unfinished run and shows the result of a finished one.
All options with their meaning: docs/options.md, or --dry-run for the values of one run.
"""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    with libraries_on_stdout():
        return answer(command, argv)


def answer(
    command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None, interrupted: str = "interrupted"
) -> int:
    """The exit code of a command, of ours or of a script: 2 with one line for bad input, 130 when interrupted."""
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill ends like Ctrl-C
    show_any_text()
    try:
        check_environment()
        return command(sys.argv[1:] if argv is None else argv)
    except BaseException as error:
        found = verdict(error, interrupted)
        if found is None:
            raise
        say(found[1])
        return found[0]


def process() -> int:
    """The command of this process; raises what `verdict` knows how to end in."""
    with libraries_on_stdout():
        check_environment()
        return command(sys.argv[1:])


def verdict(error: BaseException, interrupted: str = "interrupted") -> tuple[int, str] | None:
    """Exit code and line of an exception that a command ended in; None if it is a bug of ours."""
    if isinstance(error, KeyboardInterrupt):
        return 130, interrupted
    if isinstance(error, Interrupted):
        return 130, "interrupted; the same command continues"
    if isinstance(error, RuntimeError) and one_is_lost(seconds=2):  # it ends after its connections do
        return 2, LOST
    return (2, f"error: {' '.join(str(error).split())}") if isinstance(error, UserError) else None


def command(argv: Sequence[str]) -> int:
    flags, pairs = split_words(argv)
    args = make_parser().parse_args(flags)
    if args.list:
        show(listing())
        return 0
    if args.data is None or args.model is None:
        raise UserError("give a data config with -d and a model config with -m; --list shows them")
    # torchmetrics imports matplotlib, which on a new machine would talk about its font cache.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from tailtune.trainers.methods import declared  # torch and timm load here, after --help and --list

    stages = load_configs(args.data, args.model, pairs, declared())
    return dry_run(stages) if args.dry_run else run_all(stages)


def show(text: str) -> None:
    with suppress(BrokenPipeError):  # `main.py --list | head`
        print(text)


def dry_run(stages: list[CfgNode]) -> int:
    from tailtune.trainers import dry_run as dryrun
    from tailtune.trainers.validation import validate

    result, derived = dryrun.dry_run(stages[-1], validate(stages)[-1])
    show(f"{dryrun.describe(result, derived)}\n{json.dumps(result)}")
    return 0


def run_all(stages: list[CfgNode]) -> int:
    from tailtune.trainers.run import run
    from tailtune.trainers.runs.run_folder import RunFolder
    from tailtune.trainers.validation import validate

    folder = None
    last = stages[-1]
    finished = last.resume and RunFolder(last).finished()
    if last.test_only or finished:
        stages = [last]  # nothing is left to train
    if not finished:  # else `run` validates what it has to evaluate; a stored result is shown without the data
        validate(stages, trains=not last.test_only, here=True)
    for cfg in stages:
        RunFolder(cfg).check_owner()
    for cfg in stages:
        folder = run(cfg, previous=folder)
    return 0


def make_parser() -> Parser:
    parser = Parser(
        prog="main.py",
        description="Fine-tune a foundation model on long-tailed images.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python main.py -d DATA -m MODEL [KEY VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("-d", "--data", metavar="DATA", help="name of a file in configs/data, or a path to your YAML")
    parser.add_argument("-m", "--model", metavar="MODEL", help="name of a file in configs/model")
    parser.add_argument("--list", action="store_true", help="show the data and model configs, one line each")
    parser.add_argument("--dry-run", action="store_true", help="check everything, show the resolved config and costs")
    return parser


VALUED = ("-d", "--data", "-m", "--model")


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Flags for argparse, and `KEY VALUE` words. Flags may stand anywhere; after a key `-1e-3` is its value."""
    flags: list[str] = []
    pairs: list[str] = []
    words = iter(argv)
    for word in words:
        if word in VALUED:
            flags += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word.startswith("-") and (len(pairs) % 2 == 0 or word.startswith("--")):
            flags.append(word)
        else:
            pairs.append(word)
    return flags, pairs


def listing() -> str:
    lines = []
    for kind in ("data", "model"):
        found = names(kind)
        width = max(map(len, found))
        lines += [f"{kind}:", *(f"  {name:<{width}}  {describe(path)}" for name, path in found.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes fork after the tokenizer ran
    for library in ("TRANSFORMERS", "HF_HUB"):  # they write to standard error by themselves
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    show_any_text()
    run_as_process(process, verdict)
