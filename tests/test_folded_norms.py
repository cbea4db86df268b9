"""Batch norms whose statistics a converter has folded into the convolutions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.models import build_model, find_backbone
from tailtune.scripts.unfold_batch_norms import main

CONVNET = "timm:test_resnet.r160_in1k"
NAMES = [f"class {k}" for k in range(10)]


def norms_of(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


@pytest.fixture
def folded(tmp_path: Path) -> Path:
    """Weights as a converter for inference writes them: each norm adds a bias and does nothing else."""
    network = find_backbone(CONVNET).build(None, 32, 0, False).encoder.get_submodule("net")
    draws = torch.Generator().manual_seed(1)
    for norm in norms_of(network):
        norm.bias.data.normal_(generator=draws)
        norm.weight.data.fill_(1)  # timm begins some with 0
    save_file({name: each.contiguous() for name, each in network.state_dict().items()}, tmp_path / "folded.safetensors")
    return tmp_path / "folded.safetensors"


def test_folded_norms_do_not_train_before_they_are_unfolded(
    folded: Path, tmp_path: Path, config: Callable[..., CfgNode], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["backbone", CONVNET, "resolution", "32"]

    def made(pretrained: Path | str, *more: str) -> nn.Module:
        cfg = config("digits_lt", "in1k_mobilenetv2", *words, "init_head", "none", "pretrained", pretrained, *more)
        return build_model(cfg, NAMES).encoder

    with pytest.raises(UserError, match="are folded into the convolutions.*unfold_batch_norms"):
        made(folded, "bn_tuning", "True")
    made(folded, "full_tuning", "True")
    made("none", "bn_tuning", "True")

    out = tmp_path / "unfolded.safetensors"
    command = ["-d", "digits_lt", "-m", "in1k_mobilenetv2", str(out), *words, "imb_factor", "0.2"]
    assert main([*command, "pretrained", str(folded)]) == 0
    before, after = made(folded).eval(), made(out, "bn_tuning", "True").eval()
    images = torch.rand(64, 3, 32, 32, generator=torch.Generator().manual_seed(2)) - 0.5
    with torch.no_grad():
        features = before(images)
        assert torch.allclose(after(images), features, atol=1e-4 * float(features.abs().max()))
    assert all(norm.running_var.min() >= 0 and norm.running_mean.any() for norm in norms_of(after))

    assert main([*command, "pretrained", str(folded)]) == 2 and "exists" in capsys.readouterr().err
    again = [*command[:4], str(tmp_path / "other.safetensors"), *command[5:]]
    assert main([*again, "pretrained", str(out)]) == 2 and "no folded batch norms" in capsys.readouterr().err
    assert set(load_file(out)) == set(load_file(folded)) and not (tmp_path / "other.safetensors").exists()
