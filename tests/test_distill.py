"""A run that is taught by an earlier one: the teacher stays out of it, whatever it is, and comes back after a kill."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Cli
from safetensors.torch import load_file
from test_bad_input import one_line
from tiers import slow_except
from trajectories import killed_after
from yacs.config import CfgNode

from tailtune.datasets.build_data import build_data, build_info
from tailtune.models import build_model
from tailtune.trainers.methods import Earlier, build_method
from tailtune.trainers.methods.distill import Distill
from tailtune.trainers.storage.checkpoint import trained_state

Config = Callable[..., CfgNode]

QUICK = "pretrained none init_head none loss_type CE num_experts 3 batch_size 32 max_test_images 20 num_epochs 1"
STUDENT = f"-d fake_lt -m tiny_clip {QUICK} save_every 1 lr 0.05"
TEACHER = "after tiny_clip after.method ride after.pretrained none after.init_head none after.loss_type CE"
TEACHER += " after.max_steps 2 after.subset_cap 8 after.batch_size 16"
OTHERS = {
    "six experts": "after.num_experts 6",
    "another network": "after.backbone timm:test_efficientnet.r160_in1k after.resolution 32 after.num_experts 2",
}


def weights(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path("output") / run / "checkpoint" / "tensors.safetensors")


@pytest.mark.parametrize("teacher", slow_except([OTHERS["another network"]], OTHERS.values()), ids=OTHERS)
def test_a_killed_student_finds_its_teacher_again(teacher: str, launch: Cli) -> None:
    student = f"{STUDENT} subset_cap 4 batch_size 8 max_test_images 8"
    words = f"{student} method distill {TEACHER} {teacher}"
    assert launch(words, "output_dir whole").returncode == 0
    shutil.copytree("output/whole/stage1", "output/killed/stage1")  # the teacher, which is not repeated
    with killed_after(3):
        launch(words, "output_dir killed")
    done = launch(words, "output_dir killed")
    assert done.returncode == 0 and "resuming after step" in done.stdout, done.stderr
    found, wanted = weights("killed"), weights("whole")
    assert all(torch.equal(found[name], each) for name, each in wanted.items())
    assert launch(f"{student} method ride output_dir alone").returncode == 0
    alone = weights("alone")
    assert alone.keys() == wanted.keys(), "a checkpoint holds the student alone"
    assert not any(torch.equal(wanted[name], each) for name, each in alone.items()), "it was taught"
    assert launch(words, "output_dir whole test_only True max_test_images 4").returncode == 0


def test_the_teacher_is_no_part_of_the_student(config: Config) -> None:
    """Not among its parameters, modules or states; in eval mode and without gradient while the student trains."""
    pairs = ("pretrained", "none", "num_experts", 3, "loss_type", "CE", "adaptformer", True)
    cfg = config("fake_lt", "tiny_clip", *pairs, "method", "distill", "after", "tiny_clip")
    info = build_info(cfg)

    def built(cfg: CfgNode) -> object:
        return build_method(cfg, build_model(cfg, info.class_names), info)

    student, teacher = built(cfg), built(config("fake_lt", "tiny_clip", *pairs, "classifier", "L2NormedClassifier"))
    assert isinstance(student, Distill)
    before = trained_state(student).keys(), dict(student.named_modules()).keys()
    student.after(Earlier(False, dict, lambda: teacher.eval().requires_grad_(False)))
    assert (trained_state(student).keys(), dict(student.named_modules()).keys()) == before
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    student.train()({"image": images, "label": torch.arange(4), "weight": torch.ones(4)}).loss_sum.backward()
    assert not teacher.training and all(each.grad is None for each in teacher.parameters())
    assert all(each.grad is not None for each in student.parameters() if each.requires_grad)


REFUSED = [
    ("method distill", ["method distill", "`after`"]),
    (f"method distill distill.inner distill {TEACHER}", ["distill.inner distill", "wrap itself"]),
    (f"method distill distill.inner rid {TEACHER}", ["distill.inner", "did you mean 'ride'"]),
    (f"method distill distill.temperature 0 {TEACHER}", ["distill.temperature 0", "above 0"]),
    ("method sade loss_type LA", ["loss_type LA", "method sade", "CE"]),
    ("method sade loss_type BS", ["loss_type BS", "method sade", "CE"]),
    ("method sade loss_type LADE", ["loss_type LADE", "method sade", "CE"]),
    ("method ride ride.reweight_factor 1.5", ["ride.reweight_factor 1.5", "above 0"]),
    ("method ride micro_batch_size auto", ["micro_batch_size auto"]),
]


@pytest.mark.parametrize(("words", "parts"), REFUSED, ids=[words.split(" after ")[0] for words, _ in REFUSED])
def test_refusals(words: str, parts: list[str], launch: Cli) -> None:
    for mode in ("--dry-run", ""):
        one_line(launch(f"{STUDENT} {words} {mode}"), *parts)
        assert not Path("output").exists() or not [*Path("output").rglob("metrics.json")]


def test_a_teacher_of_other_images(launch: Cli) -> None:
    """Only when the student begins is it known what the teacher was trained on."""
    words = f"{STUDENT} method distill {TEACHER} after.num_experts 1 after.resolution 16 output_dir run"
    one_line(launch(words), "16 pixels", "has 32", "resolution")


def test_a_teacher_that_was_never_trained(launch: Cli, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The classifier of a zero-shot run is made of text; no checkpoint holds it."""
    teachers, after = [], Distill.after

    def kept(self: Distill, earlier: Earlier) -> None:
        after(self, earlier)
        teachers.append(self.teacher[0])

    monkeypatch.setattr(Distill, "after", kept)
    done = launch(f"{STUDENT} method distill after zstiny_clip max_steps 1 output_dir run")
    assert done.returncode == 0, done.stderr
    test = build_data(config("fake_lt", "tiny_clip", "max_test_images", 20)).test
    wanted = load_file("output/run/stage1/logits.safetensors")["row_max"]  # [N, 1]
    found = teachers[0].predict(torch.stack([test[index]["image"] for index in range(len(test))]))
    assert torch.allclose(found.amax(1, keepdim=True), wanted, atol=1e-4)
