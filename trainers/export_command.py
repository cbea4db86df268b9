"""`export RUN FORMAT` on the command line: exports a finished run without the words of its command."""

from collections.abc import Callable, Sequence

from tailtune.configs import Schema
from tailtune.configs.command_words import separated
from tailtune.configs.errors import UserError
from tailtune.configs.program import Parser, program

DESCRIPTION = "Write the model of a finished run for other programs, into RUN/export/FORMAT. Nothing is trained."


def run_export(argv: Sequence[str], load_schema: Callable[[], Schema]) -> int:
    """Export a finished run.

    Args:
        argv: the words that follow `export`.
        load_schema: gives the schema of all options.

    Returns:
        The exit code 0.

    Raises:
        UserError: there is no such run, it is not finished, or the format cannot hold its model.
    """
    parser = Parser(prog=f"{program()} export", description=DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="a run folder, or its name in output/")
    parser.add_argument(
        "format", metavar="FORMAT", help="onnx, merged, peft, lift, lift_plus or hub; docs/exports.md describes them"
    )
    parser.add_argument(
        "options", metavar="KEY VALUE", nargs="*", help="options of the export, such as export_fp16 True"
    )
    args = parser.parse_args(list(argv))
    from tailtune.trainers.runs.load_run import config_of
    from tailtune.trainers.runs.run_folder import OUTPUT, RunFolder, find_checkpoint
    from tailtune.trainers.stages import run_stages

    home, foreign = find_checkpoint(args.run, "export:")
    if foreign is not None:
        raise UserError(
            f"{foreign.path} is a checkpoint of another project: export it with `model_dir` and its options"
        )
    place, output = home.absolute(), OUTPUT.absolute()
    place = place.relative_to(output) if place.is_relative_to(output) else place  # as `output_dir` names it
    words = ["export", args.format, "output_dir", str(place), *separated(args.options)]
    cfg = config_of(home, load_schema(), words)
    if not RunFolder(cfg).finished():
        raise UserError(f"{home} is not finished: launch its command again, and export it then")
    run_stages([cfg])
    return 0
