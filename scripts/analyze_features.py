"""Draws the features of a finished run: similarities of class means, distances of images to the mean of their class.

python scripts/analyze_features.py -d DATA -m MODEL [KEY VALUE ...]
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ in ("__main__", "__mp_main__"):  # tailtune.py is in the parent folder, which is not on the module path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from tailtune.configs import CfgNode, UserError, load_configs, with_values
from tailtune.datasets.build_data import build_data
from tailtune.main import Parser, exit_code_of, split_arguments
from tailtune.models import resolve
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.evaluation.feature_analysis import heat_map, histograms, split_features, summary
from tailtune.trainers.option_schema import declared
from tailtune.trainers.processes.console_log import start_console
from tailtune.trainers.runs.load_run import trained_method
from tailtune.trainers.runs.run_folder import RunFolder
from tailtune.trainers.runs.run_lock import RunLock
from tailtune.trainers.storage.atomic_io import new_folder, write_json

EXAMPLES = """
example:
  python main.py -d digits_lt -m tiny_clip_peft                       a run to look at
  python scripts/analyze_features.py -d digits_lt -m tiny_clip_peft   its features
  python scripts/analyze_features.py -d digits_lt -m zstiny_clip      those of zero-shot CLIP, to compare with

The words are those of the run. Written into <run>/analysis/:
  similarity.png   cosines between class means, classes sorted by training images
  distances.png    1 − cosine between an image and the mean of its class in the same split, for head and tail classes
  means.json       the means of both
"""

log = logging.getLogger("tailtune")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the arguments; None: those of this process.

    Returns:
        The exit code: 0 for success, 2 for wrong input, 130 for an interruption.
    """
    return exit_code_of(_command, argv)


def _command(argv: Sequence[str]) -> int:
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)  # hides its message about a new font cache
    analyze(configured(argv))
    return 0


def configured(argv: Sequence[str]) -> CfgNode:
    """The resolved config of the run. The option `tte` is disabled, because each image needs exactly one feature.

    Raises:
        UserError: a word is wrong, or an ensemble is asked for.
    """
    parser = Parser(
        prog="python scripts/analyze_features.py",
        description=__doc__.partition("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python scripts/analyze_features.py -d DATA -m MODEL [KEY VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("-d", "--data", metavar="DATA", required=True, help="data config of the run")
    parser.add_argument("-m", "--model", metavar="MODEL", required=True, help="model config of the run")
    flags, pairs = split_arguments(argv)
    args = parser.parse_args(flags)
    cfg = load_configs(args.data, args.model, pairs, declared())[-1]
    if cfg.ensemble is not None:
        raise UserError(f"the features are those of the trained weights, without ensemble {cfg.ensemble}; leave it out")
    return with_values(resolve(cfg), tte=False)


def analyze(cfg: CfgNode) -> Path:
    """Write two figures, and the means of both.

    Args:
        cfg: config of a finished run.

    Returns:
        The folder with the files.

    Raises:
        UserError: the run has no checkpoint, or `trained_method` cannot load it.
    """
    folder = RunFolder(cfg)
    if not cfg.zero_shot and folder.checkpoint_id() is None:
        raise UserError(f"nothing is trained in {folder.path}: run python main.py with the same words first")
    start_console(main=True)
    lock = RunLock(folder.path)
    try:
        folder.hold(lock)
        return _written(cfg, folder)
    finally:
        lock.release()


def _written(cfg: CfgNode, folder: RunFolder) -> Path:
    """Write the figures and their means. This process must hold the lock of the run folder."""
    accelerator = make_accelerator(Devices.of(cfg))
    data = build_data(cfg, folder.kept(), folder.class_counts())
    method = trained_method(cfg, folder.evaluated, data.info, accelerator.device)
    log.info("%s images through the encoder", f"{len(data.train_as_test) + len(data.test):,}")
    splits = {
        name: split_features(
            method, view, data.info.num_classes, accelerator.device, cfg.test_batch_size, cfg.num_workers
        )
        for name, view in (("train", data.train_as_test), ("test", data.test))
    }
    about = {"data": cfg.data, "model": cfg.model, "run": folder.origin, "checkpoint": folder.checkpoint_id()}
    title = f"{cfg.data} · {folder.source.name.removeprefix(f'{cfg.data}_')}"
    home = (folder.path if cfg.model_dir is None else folder.target()) / "analysis"
    folder.own(home.relative_to(folder.path).parts[0])
    with new_folder(home) as path:
        pictures = {
            "similarity": heat_map(splits, data.info.class_counts, data.info.class_names, title),
            "distances": histograms(splits, data.info.groups, title),
        }
        for name, figure in pictures.items():
            figure.savefig(path / f"{name}.png", dpi=150, bbox_inches="tight", pad_inches=0.15)
        write_json(path / "means.json", {**about, **summary(splits, data.info.groups)})
    log.info("wrote similarity.png, distances.png and means.json into %s", home)
    return home


if __name__ == "__main__":
    sys.exit(main())
