"""`compile`: the same numbers up to rounding, the same names, few compilations, and one line where it cannot work."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from trajectories import killed_after
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.trainers import compilation
from tailtune.trainers.compilation import compiled_blocks
from tailtune.trainers.config_checks import outline
from tailtune.trainers.run import run
from tailtune.trainers.runs.load_run import make_method

Config = Callable[..., CfgNode]
STEP_CASES = {
    "vpt": "adaptformer False vpt_deep True",
    "dropout, recomputed": "adaptformer False clip_lora True clip_lora_dropout 0.5 grad_checkpoint True",
    "peft": "adaptformer False peft LoRA peft_args {'lora_dropout':0.5}",
    "last block": "partial 1",
    "experts": "num_experts 2 expert_split 1",
    "maple": "adaptformer False classifier TextClassifier init_head none context maple context_depth 2",
    "scales": "adaptformer False ssf_attn True ssf_mlp True ssf_ln True",
    "full_tuning": "adaptformer False full_tuning True",
    "weights": "adaptformer False mask True aft True",
}


def gradients_of(cfg: CfgNode, sizes: tuple[int, ...] = (6, 4, 6)) -> dict[str, Tensor]:
    """The losses of batches of some sizes, and the sums of their gradients."""
    method = make_method(cfg, build_info(cfg))
    method.model.init = None
    method.train().before_step(1)
    torch.manual_seed(0)
    for parameter in method.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)  # an update that starts as zero would hide its own gradients
    losses = {}
    with compiled_blocks(method, cfg.compile):
        for index, size in enumerate(sizes):
            images = torch.randint(0, 256, (size, 3, cfg.resolution, cfg.resolution), dtype=torch.uint8)
            batch = {"image": images, "label": torch.arange(size) % 3, "weight": torch.ones(size)}
            (loss := method(batch).loss_sum).backward()
            losses[f"loss {index}"] = loss.detach()
    return losses | {name: each.grad for name, each in method.named_parameters() if each.grad is not None}


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Instead of torch's compiler, one that leaves a function as it is; the shape of each input that it computes."""
    found: list[tuple[int, ...]] = []

    def compiled(compute: Callable[..., Tensor], keeps_graph: bool) -> Callable[..., Tensor]:
        def computed(block: Any, x: Tensor, *rest: Any) -> Tensor:
            found.append(tuple(x.shape))
            return compute(block, x, *rest)

        return computed

    monkeypatch.setattr(compilation, "compiled", compiled)
    return found


def test_training_batches_of_the_largest_size_are_compiled(shapes: list[tuple[int, ...]], config: Config) -> None:
    """Smaller ones and evaluation run as they are written; nothing stays behind."""
    cfg = config("fake_lt", "tiny_clip_peft", "pretrained", "none", "prec", "fp32", "compile", True)
    method = make_method(cfg, build_info(cfg))
    names, encoder = list(method.state_dict()), method.model.encoder
    images = torch.zeros(6, 3, cfg.resolution, cfg.resolution)
    with compiled_blocks(method, True):
        for size in (2, 6, 4, 6):
            encoder(images[:size])
        with torch.no_grad():
            encoder(images)
        assert list(method.state_dict()) == names
    assert [size for size, *_ in shapes] == [size for size in (2, 6, 6) for _ in range(encoder.depth)]
    encoder(images)
    assert len(shapes) == 3 * encoder.depth and "compute_block" not in vars(encoder)


def test_a_run_compiles_its_training_only(
    shapes: list[tuple[int, ...]], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the trainer: two steps, each with the two passes of SAM, and no image of the test."""
    monkeypatch.chdir(tmp_path)
    words = "pretrained none init_head none sam sam batch_size 8 max_steps 2 max_test_images 12 num_workers 0 compile"
    cfg = config("fake_lt", "tiny_clip_peft", *words.split(), True)
    run(cfg)
    depth = outline(cfg).model.encoder.depth
    assert [size for size, *_ in shapes] == [8] * (2 * 2 * depth)


def test_what_cannot_be_compiled_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("imagenet_lt", "clip_vit_b16_peft", "compile", True)
    with pytest.raises(UserError, match="compile works on ViTs only, and CLIP-RN50 does not run as one; leave it out"):
        outline(config(*words, "backbone", "CLIP-RN50", "adaptformer", False))
    monkeypatch.setattr(compilation, "is_sharded", lambda: True)
    with pytest.raises(UserError, match="compile does not go with FSDP: launch with --multi_gpu, or leave it out"):
        outline(config(*words))


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # compiled code of earlier runs would be found
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    torch.compiler.reset()
    with pytest.raises(UserError, match="^compile: torch cannot compile .*InvalidCxxCompiler") as found:
        gradients_of(config("fake_lt", "tiny_clip_peft", "pretrained", "none", "prec", "fp32", "compile", True))
    assert "\n" not in str(found.value)


@pytest.mark.slow
@pytest.mark.parametrize("case", STEP_CASES)
def test_blocks_of_one_structure_share_their_code(case: str, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, and run by torch as it is, so that the numbers are equal bit for bit."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(compilation, "BACKEND", "eager")
    monkeypatch.setattr(compilation, "OPTIONS", None)
    torch.compiler.reset()
    counters.clear()
    words = ("pretrained", "none", "prec", "fp32", *STEP_CASES[case].split(), "compile")
    plain, compiled = (gradients_of(config("fake_lt", "tiny_clip_peft", *words, flag)) for flag in (False, True))
    assert plain.keys() == compiled.keys() and len(plain) > 3
    assert not [name for name in plain if not torch.equal(plain[name], compiled[name])]
    assert 2 <= counters["stats"]["unique_graphs"] <= 3  # the last block, which reads one token; the first; others


@pytest.mark.slow
def test_compiled_and_plain_steps_mix(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdaptFormer and LoRA: runs that are compiled, and that are killed and go on with the other value of `compile`."""
    monkeypatch.chdir(tmp_path)
    words = "pretrained none prec fp32 lora True batch_size 8 save_every 1 max_steps 4 max_test_images 8 num_workers 0"

    def trained(name: str, *flags: bool) -> dict[str, Tensor]:
        for index, flag in enumerate(flags):
            cfg = config("fake_lt", "tiny_clip_peft", *words.split(), "output_dir", name, "compile", flag)
            with killed_after(None if index + 1 == len(flags) else 3):
                path = run(cfg)
        return load_file(path / "checkpoint" / "tensors.safetensors")

    plain = trained("plain", False)
    for name, flags in {"compiled": (True,), "on": (False, True), "off": (True, False)}.items():
        found = trained(name, *flags)
        assert found.keys() == plain.keys() and any("lora" in each for each in found)
        for key, tensor in plain.items():
            assert torch.allclose(found[key], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max())), (name, key)


@pytest.mark.slow
def test_two_backward_passes_of_code_that_another_run_has_compiled(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`sam focal` after a run without it, whose code is in torch's cache and allows one backward pass only."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    words = "pretrained none prec fp32 batch_size 8 max_steps 2 max_test_images 8 num_workers 0 output_dir"

    def trained(name: str, *more: object) -> dict[str, Tensor]:
        torch.compiler.reset()
        path = run(config("fake_lt", "tiny_clip_peft", *words.split(), name, *more))
        return load_file(path / "checkpoint" / "tensors.safetensors")

    trained("before", "compile", True)
    compiled, plain = (trained(str(flag), "sam", "focal", "compile", flag) for flag in (True, False))
    for key, tensor in plain.items():
        assert torch.allclose(compiled[key], tensor, rtol=1e-5, atol=1e-5 * float(tensor.abs().max())), key
