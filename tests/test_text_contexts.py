"""Learnt contexts (CoOp, MaPLe): published logits and gradients of a small CLIP, starts, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Cli
from small import filled
from small_text import CLASSES, fixture_image_encoder, fixture_images, fixture_tower
from torch import Tensor

from tailtune.configs.errors import UserError
from tailtune.models import build_model
from tailtune.models.backbones.text_tower import TextTower
from tailtune.models.heads.text_classifier import TextClassifier
from tailtune.models.maple import add_maple
from tailtune.models.text_contexts import ContextOptions, add_contexts
from tailtune.trainers.losses import Prior, log_prior

COUNTS = torch.tensor([50.0, 10.0, 2.0])


def with_contexts(seed: int, **options: Any) -> TextTower:
    """The tower with four context vectors, filled as the fixtures say."""
    tower = fixture_tower()
    add_contexts(tower, ContextOptions("coop", 4, **options), CLASSES, 0)
    vectors = tower.context.vectors
    with torch.no_grad():
        vectors.copy_(filled((len(vectors) // 4, 4, 48), seed, 0.5).flatten(0, 1))
    return tower


def logits(tower: TextTower, images: Tensor | None = None) -> Tensor:
    head = TextClassifier(32, 3, None)
    head.attach(tower)
    return head(fixture_image_encoder()(fixture_images()))


ROWS = {
    "end": (-25.124710, -26.683258, -22.615238),
    "front": (-24.201523, -24.671656, -20.270035),
    "middle": (-24.927767, -25.186005, -20.573475),
}


@pytest.mark.parametrize("position", ROWS)
def test_logits_of_coop_are_those_of_the_original(position: str) -> None:
    found = logits(with_contexts(130, position=position))[0]
    assert torch.allclose(found, torch.tensor(ROWS[position]), atol=1e-3)


PLACES = {
    "end": [[1, 2, 3, 4]] * 3,
    "front": [[3, 4, 5, 6], [4, 5, 6, 7], [3, 4, 5, 6]],
    "middle": [[1, 2, 5, 6], [1, 2, 6, 7], [1, 2, 5, 6]],
}


@pytest.mark.parametrize("position", PLACES)
def test_the_vectors_stand_where_coop_puts_them(position: str) -> None:
    tower = with_contexts(130, position=position)
    learnt = tower.ids >= tower.vocabulary
    assert [learnt[row].nonzero().flatten().tolist() for row in tower.rows.tolist()] == PLACES[position]
    assert tower.ends[tower.rows].tolist() == [8, 9, 8]
    assert tower.shared == {"end": 5, "front": 1, "middle": 3}[position]


def test_vectors_of_each_class_are_its_own() -> None:
    found = logits(with_contexts(131, per_class=True))
    wanted = [[-16.148020, -21.025351, -15.844521], [-18.659273, -24.073284, -18.239609]]
    assert torch.allclose(found, torch.tensor(wanted), atol=1e-3)


def test_from_the_words_of_the_prompt_coop_starts_at_zero_shot() -> None:
    for per_class in (False, True):
        tower = fixture_tower()
        add_contexts(tower, ContextOptions("coop", words="a photo of a", per_class=per_class), CLASSES, 0)
        assert torch.allclose(tower.class_features(), fixture_tower().class_features(), atol=1e-6)


@pytest.mark.parametrize("memory", [1 << 30, 0])
def test_the_gradient_is_that_of_the_original(memory: int) -> None:
    tower = with_contexts(130)
    tower.memory = memory
    prior = Prior(log_prior(COUNTS), COUNTS)
    scores = logits(tower.train()) + prior.log_prior.float()
    loss = F.cross_entropy(scores, torch.tensor([2, 0]))
    assert loss.item() == pytest.approx(0.754688, abs=1e-4)
    (gradient,) = torch.autograd.grad(loss, [tower.context.vectors])
    assert torch.allclose(gradient[0, :4], torch.tensor([0.027020, -0.015175, 0.013510, -0.023595]), atol=1e-5)
    assert gradient.norm().item() == pytest.approx(0.188841, abs=1e-5)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        (("context", "coop", "context_words", "a photo of a", "context_len", 3), "has 4 tokens; leave context_len out"),
        (("context", "coop"), "is longer than the 16 tokens of the text encoder; choose fewer"),
        (("context", "coop", "context_len", 4, "prompt", "ensemble"), "has sentences of its own"),
    ],
)
def test_what_does_not_go_together_is_refused(pairs: tuple[object, ...], message: str, config: Any) -> None:
    with pytest.raises(UserError, match=message), torch.device("meta"):
        build_model(config("fake_lt", "tiny_clip", "classifier", "TextClassifier", *pairs), CLASSES)


def test_contexts_alone_train(launch: Cli, tmp_path: Path) -> None:
    words = "-d fake_lt -m tiny_clip classifier TextClassifier context coop context_len 4 num_epochs 1 output_dir coop"
    done = launch(words, "max_test_images 20")
    assert done.returncode == 0, done.stderr
    assert '"tuner": 128' in (tmp_path / "output" / "coop" / "metrics.json").read_text()
    wise = launch(words, "test_only True ensemble wise")
    assert wise.returncode == 2 and "began at random" in wise.stderr


def test_numbers_of_parameters(config: Any) -> None:
    for pairs, count in (((), 16 * 512), (("context_len", 4), 2048), (("context_per_class", True), 3 * 16 * 512)):
        cfg = config("fake_lt", "clip_vit_b16", "classifier", "TextClassifier", "context", "coop", *pairs)
        with torch.device("meta"):
            assert build_model(cfg, CLASSES).counts()["trainable"] == count


def maple() -> tuple[TextTower, Any]:
    """Both encoders with MaPLe's contexts in two blocks, filled as the fixture says."""
    tower, encoder = fixture_tower(), fixture_image_encoder()
    add_maple(tower, encoder, ContextOptions("maple", depth=2), CLASSES, 0)
    contexts = tower.context
    with torch.no_grad():
        for block, seed in enumerate((140, 143)):
            contexts.vectors[block].copy_(filled((2, 48), seed, 0.5))
            contexts.couplings[block].weight.copy_(filled((64, 48), seed + 1, 0.2))
            contexts.couplings[block].bias.copy_(filled((64,), seed + 2))
    return tower, encoder


def test_logits_of_maple_are_those_of_the_original() -> None:
    tower, encoder = maple()
    head = TextClassifier(32, 3, None)
    head.attach(tower)
    wanted = [[3.410626, -3.108422, 10.555305], [0.878108, -3.767944, 7.657247]]
    assert torch.allclose(head(encoder(fixture_images())), torch.tensor(wanted), atol=2e-3)


def test_maple_replaces_the_first_words_only() -> None:
    tower, encoder = fixture_tower(), fixture_image_encoder()
    before = tower.ids[tower.rows]
    add_maple(tower, encoder, ContextOptions("maple", words="a photo of a", depth=1), CLASSES, 0)
    learnt = tower.ids[tower.rows] >= tower.vocabulary
    assert learnt.nonzero()[:, 1].tolist() == [1, 2] * 3
    assert torch.equal(tower.ids[tower.rows].masked_fill(learnt, 0), before.masked_fill(learnt, 0))
    assert torch.allclose(tower.class_features(), fixture_tower().class_features(), atol=1e-6)


def test_maple_has_as_many_parameters_as_the_original(config: Any) -> None:
    for depth, count in ((9, 3_555_072), (3, 1_185_024), (12, 4_740_096)):
        pairs = ("classifier", "TextClassifier", "context", "maple", "context_depth", depth)
        with torch.device("meta"):
            assert build_model(config("fake_lt", "clip_vit_b16", *pairs), CLASSES).counts()["trainable"] == count


MAPLE = "-d fake_lt -m tiny_clip classifier TextClassifier context maple context_depth 2 num_epochs 1"


def test_maple_trains_in_both_encoders_and_survives_a_checkpoint(launch: Cli, tmp_path: Path) -> None:
    words = MAPLE
    done = launch(words, "output_dir maple max_test_images 20")
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "output/maple/metrics.json").read_text()
    again = launch(words, "output_dir maple max_test_images 19 test_only True")
    assert again.returncode == 0, again.stderr
    assert '"tuner": 8576' in first
    refused = launch(words, "output_dir maple export merged")
    assert refused.returncode == 2 and "no place for the prompts of context maple" in refused.stderr


@pytest.mark.slow
def test_maple_is_exported(launch: Cli) -> None:
    assert launch(MAPLE, "output_dir maple max_test_images 20 export onnx").returncode == 0
