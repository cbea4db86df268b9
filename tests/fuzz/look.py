"""Reads the test images of `my.yaml` through the loader, and prints as JSON which of them cannot be read.

python tests/fuzz/look.py [KEY VALUE …]
"""

import copy
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tailtune.configs import load_configs
from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_data
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.datasets.sources.image_sources import FileSource
from tailtune.datasets.sources.named_source import BadImage
from tailtune.models import resolve
from tailtune.trainers.option_schema import declared


def main(pairs: list[str]) -> None:
    """Read each image with `on_bad_image skip`, and then with `raise`."""
    words = ["pretrained", "none", *pairs, "on_bad_image", "skip"]
    cfg = resolve(load_configs("my.yaml", "tiny_clip_peft", words, declared())[-1])
    bundle = build_data(cfg)
    view = bundle.test
    assert isinstance(view.source, FileSource)
    paths = [view.source.paths[position] for position in view.indices.tolist()]
    skipped, seen = [], 0
    for batch in eval_loader(view, 8, cfg.num_workers):
        skipped += [paths[i] for i, weight in zip(batch["index"], batch["weight"], strict=True) if not weight]
        seen += len(batch["index"])
    raising = copy.copy(view)
    raising.skip_bad = False
    raised = {}
    for index, path in enumerate(paths):
        try:
            raising[index]
        except BadImage as error:
            raised[path] = str(error)
    stopped = ""
    try:
        for _ in eval_loader(raising, 8, cfg.num_workers):
            pass
    except UserError as error:
        stopped = str(error)
    train = sorted(bundle.splits.unreadable.keys() - set(paths))
    print(json.dumps({"train": train, "skipped": skipped, "raised": raised, "stopped": stopped, "seen": seen}))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
