"""Runs whose classifier is made of text features: training, resuming, evaluation, exports, and what is refused."""

import json
from pathlib import Path
from typing import Any

import torch
from conftest import Cli

import tailtune

TEXT = "-d fake_lt -m tiny_clip classifier TextClassifier num_epochs 2 batch_size 32 max_test_images 40"
NAMES = tuple(f"class {k}" for k in range(10))


def metrics(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return found


def test_a_run_trains_resumes_is_evaluated_and_exported(launch: Cli, tmp_path: Path) -> None:
    words = (TEXT, "text_lora True adaptformer True")
    done = launch(*words, "output_dir whole")
    assert done.returncode == 0, done.stderr
    whole = metrics(tmp_path / "output" / "whole")
    half = launch(*words, "output_dir half max_steps 5")
    assert half.returncode == 0
    again = launch(*words, "output_dir whole test_only True")
    assert again.returncode == 0
    launch(*words, "output_dir whole export merged"), launch(*words, "output_dir whole export onnx")
    model = tailtune.load(tmp_path / "output" / "whole")
    images = torch.randn(3, 3, 32, 32)
    logits = model.predict_logits(images)
    assert torch.equal(logits, model.predict_logits(images)) and logits.shape == (3, 10)
    head = tmp_path / "output/whole/export/merged"
    facts = json.loads((head / "facts.json").read_text()) if head.exists() else {}
    assert not facts, "AdaptFormer has no place in a plain network"
    onnx = json.loads((tmp_path / "output/whole/export/onnx/facts.json").read_text())
    assert onnx["head"]["type"] == "CosineClassifier" and onnx["head"]["scale"] > 1
    assert whole["params"]["head"] == 0 and whole["params"]["trainable"] == whole["params"]["tuner"]
