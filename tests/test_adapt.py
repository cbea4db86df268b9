"""Weights of experts from unlabelled test images: fixture 9 of the specification, and what they depend on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from conftest import Cli, HasRun
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiers import slow_except
from torch import Tensor, nn
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.trainers.config_checks import outline
from tailtune.trainers.evaluation.adaptation import AdaptedPredictions, UnlabelledTest, restored_after
from tailtune.trainers.evaluation.expert_weights import (
    LEAST,
    Learner,
    Recipe,
    StreamLearner,
    adapt,
    objective,
)
from tailtune.trainers.evaluation.inference import Logits, rows_of
from tailtune.trainers.methods import METHODS, Method
from tailtune.trainers.methods.base import combine

E, B, C = 3, 4, 10
ROWS = {
    "cifar": (
        Recipe(5, 0.1, 5e-4),
        (0.855433, 0.859297, 0.864637, 0.871022, 0.877894),
        (0.499231, 0.324786, 0.175142),
        (0.390151, 0.327697, 0.282152),
    ),
    "inat": (
        Recipe(5, 0.2, 2e-4, entropy=0.01),
        (0.855433, 0.863106, 0.873176, 0.883812, 0.892886),
        (0.640779, 0.311722, 0.046826),
        (0.440191, 0.316762, 0.243047),
    ),
    "imagenet": (Recipe(5, 0.025, 5e-4), (0.861548,), (0.376158, 0.331930, 0.291702), (0.347736, 0.332691, 0.319573)),
    "places": (Recipe(5, 0.01, 4e-4), (0.857905,), (0.350520, 0.332848, 0.316565), (0.339087, 0.333147, 0.327766)),
}
"""Similarities of the passes (of the last ones), w and a."""

LEARNERS = (Learner, StreamLearner)


def fixture() -> tuple[Logits, Logits]:
    """z[b, e, c] = 3 sin(0.7 b + 0.13 c (e + 1)), counted from 1, and two views, the second with + 0.3 e."""
    e, b, c = (torch.arange(1.0, n + 1).view(shape) for n, shape in ((E, (E, 1)), (B, (B, 1, 1)), (C, (C,))))
    first, second = (3 * torch.sin(0.7 * b + 0.13 * c * (e + 1) + shift * e) for shift in (0, 0.3))
    labels, index = torch.tensor([0, 3, 7, 9]), torch.arange(B)
    return Logits(first, labels, index), Logits(torch.stack([first, second], 1), labels, index)


def noisy(n: int = 60, experts: int = 3, classes: int = 7) -> tuple[Logits, Logits]:
    """Logits of experts that are unequally sure and unequally steady."""
    draws = torch.Generator().manual_seed(1)
    labels = torch.arange(n) % classes
    clean = torch.randn(n, 1, experts, classes, generator=draws) + 3 * torch.eye(classes)[labels].view(n, 1, 1, classes)
    noise = torch.randn(n, 2, experts, classes, generator=draws) * torch.arange(1.0, experts + 1).view(-1, 1)
    index = torch.arange(n)
    return Logits(clean[:, 0], labels, index), Logits(clean + noise, labels, index)


def learnt(
    kind: type[Learner], recipe: Recipe, positions: Tensor | None = None, name: str = "x", **data: Any
) -> Learner:
    plain, views = noisy(**data)
    learner = kind(name, plain, plain.index if positions is None else positions, recipe)
    while learner.running:
        learner.learn(views)
    return learner


@pytest.mark.parametrize("name", ROWS)
def test_fixture(name: str) -> None:
    recipe, similarity, w, a = ROWS[name]
    plain, views = fixture()
    learner = Learner("all", plain, plain.index, recipe)
    while learner.running:
        learner.learn(views)
    assert learner.similarity[-len(similarity) :] == pytest.approx(similarity, rel=1e-5)
    assert learner.w.tolist() == pytest.approx(w, abs=2e-6)
    assert learner.weights.tolist() == pytest.approx(a, abs=2e-6) == learner.path[-1]
    assert len(learner.path) == len(learner.similarity) == 5


def test_the_objective_is_the_formula() -> None:
    _, views = noisy()
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    p = (views.logits.double() * weights.view(-1, 1)).sum(2).softmax(-1)
    similarity = torch.nn.functional.cosine_similarity(p[:, 0], p[:, 1], dim=-1, eps=1e-6).mean()
    entropy = -(p[:, 0] * p[:, 0].log()).mean() - (p[:, 1] * p[:, 1].log()).mean()
    found, own = objective(views.logits.double(), weights, 0.3)
    assert own.item() == pytest.approx(similarity.item(), rel=1e-12)
    assert found.item() == pytest.approx((-similarity - 0.3 * entropy).item(), rel=1e-12)


def test_certain_predictions_have_finite_gradients() -> None:
    """p = 0 in floating point, of which the plain p log p is not a number."""
    weights = torch.full((2,), 0.5, requires_grad=True)
    objective(torch.tensor([[[[900.0, 0.0]] * 2] * 2]), weights, 0.01)[0].backward()
    assert weights.grad is not None and weights.grad.isfinite().all()


@pytest.mark.parametrize("experts", [2, 3, 5])
def test_steady_experts_get_the_weight(experts: int) -> None:
    for kind in LEARNERS:
        weights = learnt(kind, Recipe(batch_size=16, lr=0.2), experts=experts).weights
        assert len(weights) == experts and weights.sum().item() == pytest.approx(1)
        assert weights.argmax() == 0 and weights.argmin() == experts - 1


def test_learning_ends_with_an_expert_that_has_no_say() -> None:
    learner = learnt(Learner, Recipe(epochs=40, batch_size=4, lr=1.0))
    lowest = [min(round(each, 2) for each in weights) for weights in learner.path]
    assert len(learner.path) < 40 and lowest[-1] < LEAST and all(each >= LEAST for each in lowest[:-1])
    stream = learnt(StreamLearner, Recipe(batch_size=1, lr=3.0))
    assert stream.lowest < LEAST and len(stream.predictions()[0]) == 60, "a stream goes on to its end"


@pytest.mark.parametrize("kind", LEARNERS)
def test_labels_are_not_used(kind: type[Learner]) -> None:
    (plain, views), recipe = noisy(), Recipe(batch_size=16)
    weights = []
    for labels in (plain.labels, plain.labels.flip(0), torch.zeros_like(plain.labels)):
        learner = kind("x", Logits(plain.logits, labels, plain.index), plain.index, recipe)
        while learner.running:
            learner.learn(Logits(views.logits, labels, views.index))
        weights.append(learner.weights)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("kind", LEARNERS)
def test_order_is_a_function_of_seed_name_and_pass(kind: type[Learner]) -> None:
    first, again = (learnt(kind, Recipe(batch_size=8)).weights for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, learnt(kind, Recipe(batch_size=8, seed=1)).weights)
    assert not torch.equal(first, learnt(kind, Recipe(batch_size=8), name="y").weights)
    learner = learnt(kind, Recipe(batch_size=8), positions=torch.tensor([3, 1, 50, 7]))
    orders = []
    for learner.epoch in (0, 1):
        batches = learner.batches()
        orders.append(torch.cat(list(batches)).tolist())
    assert sorted(orders[0]) == sorted(orders[1]) == [1, 3, 7, 50]


def test_a_last_partial_batch_counts() -> None:
    learner = learnt(Learner, Recipe(epochs=1, batch_size=16))
    assert [len(each) for each in learner.batches()] == [16, 16, 16, 12]


def test_a_stream_is_predicted_with_the_weights_of_its_time() -> None:
    plain, views = noisy()
    learner = StreamLearner("x", plain, plain.index, Recipe(batch_size=8, epochs=7))
    order = torch.cat(list(learner.batches()))
    learner.learn(views)
    logits, positions = learner.predictions()
    labels = plain.labels[rows_of(plain, positions)]
    assert not learner.running and len(learner.path) == 8, "one pass, and a point for each of the fewer than ten steps"
    assert torch.equal(labels, plain.labels[order])
    for first, weights in zip(range(0, 60, 8), learner.path, strict=True):
        chosen = order[first : first + 8]
        expected = combine(plain.logits[chosen], torch.tensor(weights))
        assert torch.allclose(logits[first : first + 8], expected, atol=1e-6)
    assert len(learnt(StreamLearner, Recipe(batch_size=1)).path) == 10


def shifts(*names: str) -> list[TestDistribution]:
    every = {"uniform": torch.arange(60), "head": torch.arange(0, 60, 7), "tail": torch.arange(6, 60, 7)}
    return [TestDistribution(name, torch.zeros(7), every[name], "") for name in names]


def run_adapt(kind: type[Learner], recipe: Recipe, *names: str) -> tuple[dict[str, Learner], list[int]]:
    plain, views = noisy()
    asked: list[int] = []

    def passes(number: int) -> Logits:
        asked.append(number)
        return views

    return adapt(kind, recipe, plain, shifts(*names), passes, Accelerator(cpu=True)), asked


@pytest.mark.parametrize("kind", LEARNERS)
def test_together_is_as_alone(kind: type[Learner]) -> None:
    recipe = Recipe(batch_size=4, epochs=3)
    together, asked = run_adapt(kind, recipe, "uniform", "head", "tail")
    assert asked == ([0] if kind is StreamLearner else [0, 1, 2]), "views are computed once for all"
    for name, learner in together.items():
        alone = run_adapt(kind, recipe, name)[0][name]
        assert torch.equal(alone.w, learner.w) and alone.facts() == learner.facts()


def test_views_are_computed_while_a_test_set_learns() -> None:
    """Some go on when others, here the one of the most steps, have ended."""
    learners, asked = run_adapt(Learner, Recipe(batch_size=4, epochs=10, lr=2.0), "uniform", "head", "tail")
    lengths = [len(each.path) for each in learners.values()]
    assert lengths[0] < max(lengths) < 10 and asked == list(range(max(lengths)))


def test_images_that_could_not_be_read_are_left_out() -> None:
    found, views = noisy()
    kept = torch.tensor([each for each in range(60) if each % 5])
    plain, views = (Logits(each.logits[kept], each.labels[kept], kept, 12) for each in (found, views))
    assert plain.index[rows_of(plain, torch.tensor([59, 0, 58, 5, 1]))].tolist() == [59, 58, 1]
    learner = Learner("x", plain, torch.arange(10), Recipe())
    learner.learn(views)
    logits, positions = learner.predictions()
    labels = found.labels[positions]
    expected = combine(found.logits, learner.weights)[[1, 2, 3, 4, 6, 7, 8, 9]]
    assert torch.allclose(logits[:], expected) and labels.tolist() == [1, 2, 3, 4, 6, 0, 1, 2]


@pytest.mark.parametrize("world", [1, 2])
def test_processes_divide_the_distributions(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is adapted to once, and the first process gets all predictions. Here the processes run in turn."""
    tests = [TestDistribution(name, torch.ones(C), torch.arange(B), "drawn") for name in "abc"]
    adapted_to, sent = list[str](), list[Any]()

    def adapt(test: TestDistribution) -> AdaptedPredictions:
        adapted_to.append(test.name)
        return AdaptedPredictions(torch.ones(B, C), test.positions, {"of": test.name})

    def gather_objects_to_main(accelerator: Any, own: Any) -> list[Any]:
        if accelerator.process_index:
            sent.append(own)
            return []
        return [own, *(sent.pop(0) for _ in range(1, world))]

    monkeypatch.setattr("tailtune.trainers.evaluation.adaptation.gather_objects_to_main", gather_objects_to_main)
    for rank in reversed(range(world)):
        accelerator: Any = mock.Mock(process_index=rank, num_processes=world)
        found = UnlabelledTest(mock.Mock(), tests, None, mock.Mock(), accelerator, mock.Mock()).of_each(adapt)
        assert [(name, each.facts["of"]) for name, each in found.items()] == [(x, x) for x in "abc" if not rank]
    assert sorted(adapted_to) == ["a", "b", "c"]


# --- runs ----------------------------------------------------------------------------------------------------------

RUN = "-d fake_lt -m tiny_clip pretrained none num_experts 3 max_steps 2 batch_size 16 num_workers 0 output_dir run"
DISTS = "test_dists forward10,uniform,backward10"


def metrics(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path("output") / folder / "metrics.json").read_text())
    return found


def test_a_finished_run_is_adapted_from_its_stored_logits(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(RUN, DISTS).returncode == 0
    own = metrics("run")
    assert all("sade" not in each["predictors"] for each in own["distributions"].values())
    asked: list[int] = []
    original = Learner.learn
    monkeypatch.setattr(Learner, "learn", lambda self, views: (asked.append(len(views.logits)), original(self, views)))
    done = launch(RUN, DISTS, "test_only True adapt sade adapt_epochs 2 adapt_batch_size 8")
    assert done.returncode == 0, done.stderr
    assert "using the logits of" in done.stdout and asked == [100] * 6
    (folder,) = Path("output/run/tests").iterdir()
    found = metrics(f"run/tests/{folder.name}")
    assert found["test"]["per_class_acc"] == own["test"]["per_class_acc"] and metrics("run") == own
    for name, each in found["distributions"].items():
        own_plain = own["distributions"][name]["predictors"]["plain"]
        assert each["predictors"]["plain"]["per_class_acc"] == own_plain["per_class_acc"]
        sade = each["predictors"]["sade"]
        assert len(sade["path"]) == len(sade["similarity"]) == 2 and sade["path"][-1] == sade["weights"]
        assert sade["gain"] == pytest.approx(sade["accuracy"] - each["predictors"]["plain"]["accuracy"])
        assert name in done.stdout and "  ".join(f"{weight:.2f}" for weight in sade["weights"]) in done.stdout
    again = launch(RUN, DISTS, "test_only True adapt sade adapt_epochs 2 adapt_batch_size 8")
    assert "finished before" in again.stdout and "backward10" in again.stdout and len(asked) == 6
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = {f"test/uniform/sade/{each}" for each in ("weight_0", "weight_2", "gain", "accuracy", "few_acc")}
    assert tags | {"test/accuracy", "test/forward10/accuracy"} <= set(events.Tags()["scalars"])
    path = [event.value for event in events.Scalars("test/uniform/sade/weight_1")]
    assert path == pytest.approx([each[1] for each in found["distributions"]["uniform"]["predictors"]["sade"]["path"]])


ADAPTED = "expert_weights.json"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the distributions for which weights were learnt, once a pass."""
    names: list[str] = []
    original = Learner.learn
    monkeypatch.setattr(Learner, "learn", lambda self, views: (names.append(self.name), original(self, views)))
    return names


def one_evaluation(words: str, launch: Cli) -> tuple[dict[str, Any], str, Path]:
    """Result, output and folder of an evaluation whose command was not given before."""
    before = set(Path("output/run/tests").glob("*"))
    done = launch(RUN, "adapt_epochs 1 test_only True", words)
    assert done.returncode == 0, done.stderr
    (folder,) = set(Path("output/run/tests").glob("*")) - before
    return metrics(f"run/tests/{folder.name}")["distributions"], done.stdout, folder


@pytest.mark.parametrize("adapt_name", slow_except(["sade"], ["sade", "sade_online"]))
def test_what_was_learnt_before_is_used_again(adapt_name: str, launch: Cli, has_run: HasRun, asked: list[str]) -> None:
    """Without images, to the bit; the distributions of one command, then others beside them."""
    has_run(RUN)
    adapts = f"adapt {adapt_name}"
    whole, _, folder = one_evaluation(f"{adapts} {DISTS}", launch)
    assert set(asked) == {"forward10", "uniform", "backward10"} and asked.clear() is None
    with mock.patch("tailtune.trainers.run.build_data", side_effect=AssertionError("images are not needed")):
        again, output, second = one_evaluation(f"{adapts} {DISTS} target_prior uniform", launch)
    assert not asked and output.count("using the expert weights of ") == 1
    assert f"{folder / ADAPTED} for 3 of 3 test distributions\n" in output
    for name, each in again.items():
        assert each["predictors"][adapt_name] == whole[name]["predictors"][adapt_name]
    assert (second / ADAPTED).read_bytes() == (folder / ADAPTED).read_bytes()
    more, output, _ = one_evaluation(f"{adapts} test_dists backward10,forward5", launch)
    assert set(asked) == {"forward5"} and "for 1 of 2 test distributions" in output
    (folder / ADAPTED).unlink(), (second / ADAPTED).unlink(), asked.clear()
    fresh, output, _ = one_evaluation(f"{adapts} {DISTS} target_prior train", launch)
    assert "using the expert weights" in output and set(asked) == {"forward10", "uniform"}
    for name, each in fresh.items():
        assert each["predictors"][adapt_name] == whole[name]["predictors"][adapt_name], "learnt again, to the bit"


@pytest.mark.parametrize(
    "words",
    slow_except(
        ["adapt_lr 0.2"], ["adapt_lr 0.2", "adapt_seed 1", "adapt_views cifar", "adapt_batch_size 50", "tte True"]
    ),
)
def test_other_options_are_learnt_again(words: str, launch: Cli, has_run: HasRun, asked: list[str]) -> None:
    has_run(RUN)
    one_evaluation("adapt sade test_dists uniform", launch)
    asked.clear()
    _, output, _ = one_evaluation(f"adapt sade test_dists uniform {words}", launch)
    assert asked and "using the expert weights" not in output


def test_a_damaged_file_is_learnt_again(launch: Cli, has_run: HasRun, asked: list[str]) -> None:
    has_run(RUN)
    whole, _, folder = one_evaluation("adapt sade test_dists uniform", launch)
    asked.clear()
    (folder / ADAPTED).write_text((folder / ADAPTED).read_text().replace('"weights"', '"wrights"'))
    again, output, _ = one_evaluation("adapt sade test_dists uniform target_prior uniform", launch)
    assert asked and output.count(f"warning: {folder / ADAPTED} is damaged (") == 1
    assert again["uniform"]["predictors"]["sade"] == whole["uniform"]["predictors"]["sade"]


def test_a_result_does_not_need_the_file(launch: Cli, has_run: HasRun, asked: list[str]) -> None:
    """A disk that is full, or a file of somebody else."""
    has_run(RUN)
    full = UserError("expert_weights.json cannot be written: No space left on device")
    with mock.patch("tailtune.trainers.evaluation.adapted_results.write_json", side_effect=full):
        found, output, folder = one_evaluation("adapt sade test_dists uniform", launch)
    assert "sade" in found["uniform"]["predictors"] and not (folder / ADAPTED).exists()
    assert output.count("warning: expert_weights.json cannot be written: No space") == 1


@pytest.mark.parametrize("kind", [Learner, StreamLearner])
def test_what_is_stored_makes_the_same_predictions(kind: type[Learner]) -> None:
    found, views = noisy()
    recipe = Recipe(batch_size=16, epochs=3)
    learner = kind("some", found, torch.arange(40), recipe)
    while learner.running:
        learner.learn(views)
    restored = kind("some", found, torch.arange(40), recipe)
    restored.restore(json.loads(json.dumps(learner.learnt())))
    assert not restored.running and restored.facts() == learner.facts()
    for one, other in zip(restored.predictions(), learner.predictions(), strict=True):
        assert torch.equal(one[:], other[:])


def test_a_run_adapts_in_its_own_evaluation(launch: Cli) -> None:
    """Without `test_dists` to the test set as it is; the online version; with views averaged for the plain logits."""
    done = launch(RUN, "adapt sade_online adapt_batch_size 10 tte True")
    assert done.returncode == 0, done.stderr
    found = metrics("run")["distributions"]
    assert found.keys() == {"test"} and found["test"]["n"] == 100
    assert len(found["test"]["predictors"]["sade_online"]["path"]) == 10
    assert found["test"]["predictors"]["plain"]["accuracy"] == metrics("run")["test"]["accuracy"]


@pytest.mark.parametrize(
    ("words", "culprit", "remedy"),
    [
        ("num_experts 1 adapt sade", "this run has one", "num_experts"),
        ("adapt sad", "'sad'", "sade"),
        ("adapt sade adapt_views cifr", "cifr", "cifar"),
    ],
)
def test_what_cannot_be_adapted_is_refused(words: str, culprit: str, remedy: str, launch: Cli) -> None:
    for more in ("--dry-run", ""):
        done = launch(RUN, words, more)
        assert done.returncode == 2 and culprit in done.stderr and remedy in done.stderr
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_weights_that_are_not_finite_are_one_line(launch: Cli, has_run: HasRun) -> None:
    has_run(RUN)
    done = launch(RUN, "test_only True adapt sade adapt_lr 1e38 adapt_weight_decay 1e30")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "lower adapt_lr" in done.stderr
    assert not list(Path("output/run/tests").glob(f"*/{ADAPTED}"))


def test_experts_that_are_not_all_asked_are_refused(config: Callable[..., CfgNode]) -> None:
    cfg = config("fake_lt", "tiny_clip", "num_experts", 3, "adapt", "sade")
    outline(cfg)
    routing = type("Routing", (Method,), {"asks_every_expert": False})
    with mock.patch.dict(METHODS, {"classify": routing}), pytest.raises(UserError, match="only some .* set adapt none"):
        outline(cfg)


def test_one_expert_is_refused_of_a_finished_run(launch: Cli) -> None:
    one = RUN.replace("num_experts 3", "num_experts 1")
    assert launch(one).returncode == 0
    done = launch(one, "test_only True adapt sade")
    assert done.returncode == 2 and "num_experts" in done.stderr
    assert not Path("output/run/tests").exists()


def test_training_images_are_not_adapted_to(launch: Cli) -> None:
    assert launch(RUN, DISTS, "adapt sade test_train True").returncode == 0
    found = metrics("run")
    assert "distributions" not in found and any("test_train" in note for note in found["notes"])


def test_a_network_that_an_adaptation_updates_is_restored_to_the_bit() -> None:
    """Weights, statistics, modes and what trains: one distribution must not see what another one has changed."""
    method: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2)).eval()
    method[0].requires_grad_(False)
    norm, images = method[1], torch.randn(8, 3, 3, 3)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    asked = [parameter.requires_grad for parameter in method.parameters()]
    with torch.no_grad(), pytest.raises(KeyboardInterrupt), restored_after(method, list(norm.parameters())):
        norm.train()
        method(images).square().sum().backward()
        assert method[3].weight.grad is None and norm.weight.grad is not None, "only the norm trains"
        with torch.no_grad():
            norm.weight.sub_(norm.weight.grad)
        assert not torch.equal(norm.running_mean, before["1.running_mean"])
        raise KeyboardInterrupt
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert [parameter.requires_grad for parameter in method.parameters()] == asked
    assert not any(module.training for module in method.modules()) and norm.weight.grad is None
