"""`data …` on the command line: parses the words, and runs one of the commands for data."""

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from tailtune.configs import Schema, load_data_config, names, options_of_data
from tailtune.configs.errors import UserError, lookup
from tailtune.configs.program import Parser, print_text, program
from tailtune.datasets.commands.foreign_shards import index_folder
from tailtune.datasets.commands.new import NewRequest, config_name, new_data, split_command
from tailtune.datasets.commands.prepare import PrepareRequest, prepare
from tailtune.datasets.commands.published_files import PUBLISHED_SETS
from tailtune.datasets.commands.result_files import write_json
from tailtune.datasets.commands.shard import ShardRequest, parse_size, shard_data, yaml_name
from tailtune.datasets.commands.verify import VerifyRequest, verify
from tailtune.datasets.data_settings import DataSettings, SplitSettings
from tailtune.datasets.sources.image_folder import SPLITS

LoadSchema = Callable[[], Schema]

OVERVIEW = """usage: {program} data verify|new|prepare|shard …

  data verify NAME|YAML|FOLDER    check lists and images before you train on them
  data new FOLDER                 make a YAML and lists from a folder of images
  data prepare NAME --root DIR    download what may be downloaded of a published data set, and check it
  data shard NAME|YAML|FOLDER --out DIR    write the images as tar shards with an index

Each has its own --help."""

SHARD_SIZE = "256MB"
EXIT_CODES = "exit codes: 0 no problem, 1 problems were found, 2 wrong input"


def run_data_command(argv: Sequence[str], load_schema: LoadSchema) -> int:
    """Run one of the commands for data.

    Args:
        argv: the words that follow `data`.
        load_schema: gives the schema of all options.

    Returns:
        The exit code: 0, or 1 if problems were found.

    Raises:
        UserError: wrong input.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print_text(OVERVIEW.format(program=program()))
        return 0
    return lookup(COMMANDS, argv[0], "data command")(argv[1:], load_schema)


def _parser(command: str, description: str, epilog: str = "") -> Parser:
    return Parser(
        prog=f"{program()} data {command}",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _run_verify(argv: Sequence[str], load_schema: LoadSchema) -> int:
    parser = _parser("verify", "Check the lists and the images of a data set.", EXIT_CODES)
    parser.add_argument("data", metavar="NAME|YAML|FOLDER", help="a data config, your YAML, or a folder with train/")
    parser.add_argument("pairs", metavar="KEY VALUE", nargs="*", help="options of the data, such as root and lists")
    parser.add_argument("--split", choices=SPLITS, action="append", help="read only the list of this split")
    parser.add_argument("--lists", action="store_true", help="check the lists only, and look for no image")
    parser.add_argument("--decode", action="store_true", help="decode every image, to find damaged ones")
    parser.add_argument(
        "--near", action="store_true", help="also find images of different splits that look nearly the same (decodes)"
    )
    parser.add_argument("--report", metavar="FILE", type=Path, help="write everything that was found as JSON")
    args = parser.parse_intermixed_args(list(argv))
    if args.lists and (args.decode or args.near):
        raise UserError("--lists looks for no image; leave out --decode and --near, or --lists")
    if Path(args.data).is_dir() and args.data not in names("data") and not (Path(args.data) / "train").is_dir():
        raise UserError(f"{args.data} holds no folder train; `{split_command(args.data)}` makes splits of it")
    cfg = load_data_config(args.data, args.pairs, load_schema())
    request = VerifyRequest(
        DataSettings.of(cfg),
        SplitSettings.of(cfg),
        only=tuple(args.split or ()),
        images=not args.lists,
        decode=args.decode,
        near=args.near,
        many_above=cfg.many_above,
        few_below=cfg.few_below,
    )
    findings = verify(request)
    if args.report:
        write_json(args.report, findings.as_json())
    print_text(findings.as_text())
    return int(bool(findings.problems()))


def _run_new(argv: Sequence[str], load_schema: LoadSchema) -> int:
    parser = _parser("new", "Make a YAML, list files and a picture of the class frequencies from class folders.")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="holds one folder of images for each class")
    parser.add_argument("--output", metavar="DIR", type=Path, help="the new folder (default: ./<name>_data)")
    amount = "a share below 1, or a number"
    parser.add_argument("--test", type=float, default=0.2, help=f"test images of each class: {amount} (0.2)")
    parser.add_argument("--val", type=float, default=0.0, help=f"validation images of each class: {amount} (none)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another split (0)")
    parser.add_argument(
        "--groups",
        metavar="REGEX|FILE.csv",
        help="images of one group come into one split: the first parenthesis of a regular expression in the path, or "
        "a CSV file with the columns file and group",
    )
    parser.add_argument("--decode", action="store_true", help="decode every image, and leave out damaged ones")
    args = parser.parse_args(list(argv))
    name = config_name(args.folder)
    output = args.output or Path(f"{name}_data")
    defaults = load_schema().defaults
    shots = {key: defaults[key] for key in ("many_above", "few_below")}
    chosen = {key: getattr(args, key) for key in ("folder", "test", "val", "seed", "groups", "decode")}
    text = new_data(NewRequest(output=output, **chosen, **shots))
    print_text(f"{text}\ntrain on it: {program()} -d {shlex.quote(str(output / name) + '.yaml')} -m clip_vit_b16_peft")
    return 0


def _run_prepare(argv: Sequence[str], load_schema: LoadSchema) -> int:
    parser = _parser("prepare", "Get the files of a published data set that may be downloaded, and check them.")
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(PUBLISHED_SETS)}")
    parser.add_argument("--root", metavar="DIR", type=Path, required=True, help="the folder for the files and images")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--from", dest="local", metavar="DIR", type=Path, help="use the copies in this folder")
    source.add_argument(
        "--mirror", metavar="URL", help="download from this address, which has the files by their names"
    )
    parser.add_argument(
        "--only", metavar="PATTERN", action="append", help="only files whose names fit, such as '*_val.txt'"
    )
    args = parser.parse_args(list(argv))
    for line in prepare(PrepareRequest(args.name, args.root, args.local, args.mirror, tuple(args.only or ()))):
        print_text(line)
    print_text(f"check it: {program()} data verify {args.name} root {shlex.quote(str(args.root))}")
    return 0


def _run_shard(argv: Sequence[str], load_schema: LoadSchema) -> int:
    parser = _parser(
        "shard", "Write the images of a data set as tar shards with an index, and the YAML that trains from them."
    )
    parser.add_argument("data", metavar="NAME|YAML|FOLDER", help="a data config, your YAML, or a folder with train/")
    parser.add_argument("pairs", metavar="KEY VALUE", nargs="*", help="options of the data, such as root and lists")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="DIR", type=Path, help="the new folder for the shards")
    target.add_argument(
        "--index-only",
        action="store_true",
        help="FOLDER holds tar files in WebDataset's format; write only their index",
    )
    parser.add_argument("--max-size", metavar="SIZE", help=f"most bytes of a shard ({SHARD_SIZE})")
    args = parser.parse_intermixed_args(list(argv))
    if args.index_only and args.max_size:
        raise UserError("--index-only writes no shard; leave out --max-size")
    try:
        max_bytes = parse_size(args.max_size or SHARD_SIZE)
    except ValueError:
        raise UserError(f"--max-size {args.max_size}: give a number of bytes such as 256MB or 1GiB") from None
    if args.index_only:
        folder = Path(args.data)
        values = options_of_data(str(folder), args.pairs, load_schema()) if folder.is_dir() else {}
        print_text(index_folder(folder, {key: values[key] for key in values if key not in ("dataset", "root")}))
        config = folder / yaml_name(folder.resolve().name)
    else:
        cfg = load_data_config(args.data, args.pairs, load_schema())
        values = options_of_data(args.data, args.pairs, load_schema())
        print_text(shard_data(ShardRequest(DataSettings.of(cfg), args.out, max_bytes, values)))
        config = args.out / yaml_name(cfg.data)
    print_text(f"train from them: {program()} -d {shlex.quote(str(config))} -m clip_vit_b16_peft")
    return 0


COMMANDS: Mapping[str, Callable[[Sequence[str], LoadSchema], int]] = MappingProxyType(
    {"verify": _run_verify, "new": _run_new, "prepare": _run_prepare, "shard": _run_shard}
)
"""Word after `data` → the function that runs the command."""
