"""The examples of docs/adding.md run as they stand there."""

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from yacs.config import CfgNode

from tailtune.configs import load_configs
from tailtune.trainers.methods import METHODS
from tailtune.trainers.options import declared
from tailtune.trainers.run import run

Config = Callable[..., CfgNode]
PAGE = (Path(__file__).parent.parent / "docs" / "adding.md").read_text(encoding="utf-8")
MOST_LINES = 40


def example(path: str) -> str:
    """The code block that begins with a comment of this path."""
    found = re.search(rf"^```\w+\n# {re.escape(path)}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert found, path
    return found[1]


def test_an_expert_method_is_short_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole example, trained for two steps on images of 32 pixels: its file, its line, its config, its result."""
    parts = ("trainers/methods/spread.py", "trainers/methods/__init__.py", "configs/model/resnet32_spread.yaml")
    code, _, config = map(example, parts)
    assert sum(len(example(each).splitlines()) for each in parts) <= MOST_LINES
    file = tmp_path / "spread.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("spread", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(METHODS, "spread", module.Spread)

    options = yaml.safe_load(config)
    options["test_dists"] = "uniform,backward5"
    quick = {"prec": "fp32", "max_steps": 2, "batch_size": 16, "num_workers": 0, "adapt_epochs": 1}
    options |= {"max_test_images": 30, "spread.strongest": 1.5, "output_dir": str(tmp_path / "run"), **quick}
    pairs = [str(word) for pair in options.items() for word in pair]
    cfg = load_configs("fake_lt", "resnet32_ce", pairs, declared())[-1]
    assert cfg.spread.strongest == 1.5
    result = json.loads((run(cfg) / "metrics.json").read_text())
    assert result["train"]["steps"] == 2
    assert len(result["distributions"]["backward5"]["predictors"]["sade"]["weights"]) == 3
