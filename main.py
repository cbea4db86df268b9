"""The command line of TailTune: `python main.py -d DATA -m MODEL [KEY VALUE ...]`."""

if __name__ == "__main__":  # before all other imports, so that Ctrl-C during the imports ends the process properly
    import _signal  # built in; importing `signal` would take longer
    import os

    _signal.signal(_signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))
    from tailtune.trainers.processes.exit import end_at_signals

    end_at_signals()

import os
import sys

if __name__ == "__mp_main__":  # a process spawned by multiprocessing, whose module path lacks this folder
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import argparse
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

import tailtune
from tailtune.configs import CfgNode, UserError
from tailtune.configs.command_words import separated
from tailtune.configs.launch_environment import check_environment
from tailtune.configs.library_messages import libraries_on_stdout
from tailtune.configs.lift_plus_words import translated
from tailtune.configs.program import Parser, launch_target, print_text, program
from tailtune.configs.shipped_configs import KINDS, list_of_configs, list_of_kind
from tailtune.trainers.cached_schema import cached_schema
from tailtune.trainers.processes.console_log import show_any_text
from tailtune.trainers.processes.exit import run_as_process, say
from tailtune.trainers.processes.interrupts import Interrupted, interruption
from tailtune.trainers.processes.launcher import LOST, connection_is_lost, one_is_lost
from tailtune.trainers.processes.slow_start import loading_shown
from tailtune.trainers.stages_of_words import stages_of

EXAMPLES = """
examples:
  python main.py -d digits_lt -m tiny_clip_peft                  train and evaluate, offline, on a CPU
  python main.py -d cifar100_ir100 -m clip_vit_b16_peft          CLIP ViT-B/16 with AdaptFormer (downloads both)
  python main.py -d imagenet_lt -m clip_vit_b16 lora=True root=/data/imagenet
  python main.py -d my_images/ -m clip_vit_b16_peft              your own images, one folder for each class
  python main.py -d digits_lt -m tiny_clip_peft test_only=True tte=True expand=3
  accelerate launch main.py -d places_lt -m clip_vit_b16_peft    several GPUs

  python main.py predict RUN photos > labels.csv                 label new images with a finished run (predict --help)
  python main.py serve RUN                                       label images that are sent over HTTP (serve --help)
  python main.py export RUN onnx                                 the model for onnxruntime and others (docs/exports.md)
  python main.py data verify my.yaml                             check your images before you train on them
  python main.py data --help                                     prepare, verify and make data sets
  python main.py compare output/run1 output/run2                 a table of runs, and tests over their test images
  python main.py report output/NAME                              write the report of a finished run again

The same command again resumes an unfinished run and shows the result of a finished one.
All options with their values in one run: --dry-run --all. Their meaning is in docs/options.md of the project.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line inside this process.

    Args:
        argv: the arguments without the program's name; None: those of this process.

    Returns:
        The exit code: 0 for success, 1 for data with problems, 2 for wrong input, 130 for an interruption.
    """
    with libraries_on_stdout():
        return exit_code_of(run_command, argv)


def exit_code_of(
    command: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None, interrupted: str = "interrupted"
) -> int:
    """Run a command of this file or of a script. Convert wrong input and interruptions to a message and an exit code.

    Args:
        command: function that takes the arguments and returns an exit code.
        argv: the arguments; None: those of this process.
        interrupted: the line that is printed after Ctrl-C.

    Returns:
        The command's own exit code, 2 for wrong input, or 130 for an interruption.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM then acts like Ctrl-C
    show_any_text()
    try:
        check_environment()
        return command(sys.argv[1:] if argv is None else argv)
    except BaseException as error:
        outcome = exit_code_and_line(error, interrupted)
        if outcome is None:
            raise
        exit_code, line = outcome
        say(line)
        return exit_code


def run_this_process() -> int:
    """Run the command line of this process. Exceptions are left to `exit_code_and_line`."""
    with libraries_on_stdout():
        check_environment()
        return run_command(sys.argv[1:])


def exit_code_and_line(error: BaseException, interrupted: str = "interrupted") -> tuple[int, str] | None:
    """Determine how a command ends after an exception.

    Args:
        error: the exception.
        interrupted: the line that is printed after Ctrl-C, if the exception does not tell how to go on.

    Returns:
        The exit code, and the line for standard error; None if the exception is a bug in TailTune.
    """
    if isinstance(error, (KeyboardInterrupt, Interrupted)):
        return 130, interruption(interrupted, str(error))
    if isinstance(error, RuntimeError) and (connection_is_lost(error) or one_is_lost(seconds=2)):
        return 2, LOST
    return (2, f"error: {' '.join(str(error).split())}") if isinstance(error, UserError) else None


def run_command(argv: Sequence[str]) -> int:
    """Parse the arguments. Then list the configs, check a run, train and evaluate, or run another command.

    Args:
        argv: the arguments.

    Returns:
        The exit code 0; 1 if `data verify` has found problems, or `predict` unreadable images.

    Raises:
        UserError: wrong input.
    """
    if argv and argv[0] in COMMANDS:
        module, _, function = COMMANDS[argv[0]].partition(":")
        exit_code: int = getattr(import_module(module), function)(argv[1:], cached_schema)
        return exit_code
    flags, pairs = split_arguments(argv)
    args = make_parser().parse_args(flags)
    if args.version:
        print_text(f"tailtune {tailtune.__version__}")
        return 0
    if args.list is not None:
        print_text(list_of_kind(args.list) if args.list else list_of_configs())
        return 0
    if args.data is None or args.model is None:
        raise UserError("give a data config with -d and a model config with -m; --list shows them")
    args.model, pairs = translated(args.backbone, args.model, pairs)
    with loading_shown():
        schema = cached_schema()
    with stages_of(args.data, args.model, pairs, schema, keep=not args.dry_run) as stages:
        return dry_run(stages, args.all) if args.dry_run else run_all(stages)


def dry_run(stages: list[CfgNode], all_options: bool) -> int:
    """Check a run without training. Print its settings and its estimated cost.

    Args:
        stages: the configs of all stages.
        all_options: print every option, not only the options that differ from their defaults.

    Returns:
        The exit code 0.
    """
    with loading_shown():
        from tailtune.trainers import dry_run as dryrun
        from tailtune.trainers.config_checks import validate
        from tailtune.trainers.dry_run_report import report

    methods = validate(stages)
    result, derived = dryrun.dry_run(stages[-1], methods[-1])
    print_text(f"{report(stages, methods, result, derived, all_options)}\n{json.dumps(result)}")
    return 0


def run_all(stages: list[CfgNode]) -> int:
    """Run the stages one after another. Stages that are already finished are skipped.

    Args:
        stages: the configs of all stages.

    Returns:
        The exit code 0.
    """
    from tailtune.trainers.stored_result import shown_again

    if shown_again(stages[-1]):
        return 0
    with loading_shown():
        from tailtune.trainers.stages import run_stages  # imports torch

    run_stages(stages)
    return 0


def make_parser() -> Parser:
    """Create the parser of the flags. `KEY VALUE` pairs are removed before parsing."""
    name = program()
    parser = Parser(
        prog=name,
        description="Fine-tune a foundation model on long-tailed images.",
        epilog=EXAMPLES.replace("accelerate launch main.py", f"accelerate launch {launch_target()}").replace(
            "python main.py", name
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=f"{name} -d DATA -m MODEL [KEY VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("-d", "--data", metavar="DATA", help="name in configs/data, a YAML, or a folder of classes")
    parser.add_argument("-m", "--model", metavar="MODEL", help="name in configs/model, or a YAML; with -b a method")
    parser.add_argument("-b", "--backbone", metavar="BACKBONE", help="the line is one of LIFT+: -d DATA -b … -m METHOD")
    parser.add_argument(
        "--list",
        metavar="KIND",
        nargs="?",
        const="",
        help=f"show the data and model configs, one line each; with KIND the models of one kind: {', '.join(KINDS)}",
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, show what a run would be and cost")
    parser.add_argument("--all", action="store_true", help="with --dry-run: show every option")
    parser.add_argument("--version", action="store_true", help="show the version")
    return parser


COMMANDS: Mapping[str, str] = MappingProxyType(
    {
        "data": "tailtune.datasets.commands.entry:run_data_command",
        "predict": "tailtune.trainers.predict_command:run_predict",
        "serve": "tailtune.trainers.serve_command:run_serve",
        "export": "tailtune.trainers.export_command:run_export",
        "compare": "tailtune.trainers.comparison.command:run_compare",
        "report": "tailtune.trainers.report_command:run_report_command",
    }
)
"""First word of a command → the function that runs it. Its module is imported when the command is given. The function
takes the arguments after that word, and a function that gives the schema of all options."""
FLAGS_WITH_VALUE = ("-d", "--data", "-m", "--model", "-b", "--backbone")


def _is_kind(flags: list[str], pairs: list[str]) -> bool:
    """Whether the word that follows is the KIND of `--list`."""
    return flags[-1:] == ["--list"] and not pairs


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate flags from `KEY VALUE` or `KEY=VALUE`. Flags may be anywhere between the pairs.

    A word such as `-1e-3` after a key is the value of this key, not a flag. The word after `--list` is its kind.

    Args:
        argv: the arguments.

    Returns:
        The flags with their values, for argparse; and the words of the `KEY VALUE` pairs.
    """
    flags: list[str] = []
    pairs: list[str] = []
    words = iter(argv)
    for word in words:
        if word in FLAGS_WITH_VALUE:
            flags += [word, *([value] if (value := next(words, None)) is not None else [])]
        elif word.startswith("-") and (len(pairs) % 2 == 0 or word.startswith("--")) or _is_kind(flags, pairs):
            flags.append(word)
        else:
            pairs += separated([word]) if len(pairs) % 2 == 0 else [word]
    return flags, pairs


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # worker processes are forked after the tokenizer has run
    for library in ("TRANSFORMERS", "HF_HUB"):  # these libraries print their warnings on standard error
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    show_any_text()
    run_as_process(run_this_process, exit_code_and_line)
