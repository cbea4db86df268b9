"""Predictions for any class frequencies: what losses assume, what is estimated, and what a run makes of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import Cli
from PIL import Image
from small import loss_with
from test_contract import of_method
from torch import Tensor
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.datasets.build_data import build_info
from tailtune.datasets.data_bundle import TestDistribution
from tailtune.datasets.loading.samplers import SAMPLERS
from tailtune.trainers.config_checks import outline
from tailtune.trainers.evaluation.distributions import plain_results
from tailtune.trainers.evaluation.ensembles import Assumed
from tailtune.trainers.evaluation.inference import Logits
from tailtune.trainers.evaluation.label_shift import black_box, frequencies, kl, maximum_likelihood, stream, temperature
from tailtune.trainers.evaluation.target_prior import ENTRY, TARGETS, TargetPlan, add_target_results, target_of
from tailtune.trainers.evaluation.validation import Validation
from tailtune.trainers.evaluation.validation_metrics import HIGHER
from tailtune.trainers.losses import LOSSES, Prior, effective_weights, log_prior
from tailtune.trainers.methods import METHODS
from tailtune.trainers.methods.base import Objective

Config = Callable[..., CfgNode]
COUNTS = torch.tensor([80, 40, 10, 4])

# --- what a loss assumes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drw", [False, True])
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["CE", "CB", "GRW", "BS", "LA"])
def test_the_least_of_a_loss_is_the_posterior_under_the_prior_that_it_assumes(
    name: str, sampler: str, drw: bool
) -> None:
    """Seven images x with known p(x | y), logits of each free: Bayes' rule says what they end as."""
    likelihood = torch.rand(4, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.05  # p(x | y)
    likelihood /= likelihood.sum(1, keepdim=True)
    of_run = loss_with(name, tau=0.7)
    objective = Objective(COUNTS, of_run, sampler=sampler, drw_epoch=1 if drw else None, epochs=2)
    label, image = torch.arange(4).repeat_interleave(7), torch.arange(7).repeat(4)
    weights = (SAMPLERS[sampler].frequencies(COUNTS.double())[:, None] * likelihood).flatten()
    weights = weights * effective_weights(COUNTS.double())[label] if drw else weights
    prior = Prior(log_prior(COUNTS), COUNTS)
    table = torch.zeros(7, 4, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-10, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        search.zero_grad()
        total, weight = of_run(table[image], label, weights, prior)
        (total / weight).backward()
        return total / weight

    search.step(loss)
    wanted = (likelihood.T.log() + objective.assumed()).softmax(1)
    assert torch.allclose(table.softmax(1), wanted, atol=2e-5)


def test_every_loss_says_what_it_assumes() -> None:
    for loss in LOSSES.values():
        found = Objective(COUNTS, loss).assumed()
        assert found.dtype == torch.float64 and found.exp().sum() == pytest.approx(1) and found.isfinite().all()


def test_every_sampler_draws_what_it_says() -> None:
    labels = torch.arange(4).repeat_interleave(COUNTS)
    for name, entry in SAMPLERS.items():
        drawn = torch.cat([labels[entry.order(labels, 0, epoch)] for epoch in range(200)])
        assert torch.allclose(torch.bincount(drawn) / len(drawn), entry.frequencies(COUNTS.float()), atol=0.01), name


def test_deferred_weights_count_where_they_come() -> None:
    plain, late, soon = (Objective(COUNTS, LOSSES["CE"], drw_epoch=d, epochs=5).assumed() for d in (None, 5, 4))
    assert torch.equal(plain, late) and not torch.allclose(plain, soon)
    assert torch.allclose(Objective(COUNTS, LOSSES["CE"], epochs=0).assumed().exp(), torch.tensor(0.25).double())


@pytest.mark.parametrize(
    "pairs, epochs", [((), 15), (("max_steps", 10, "batch_size", 16), 1), (("zero_shot", True), 0)]
)
def test_epochs_that_a_run_begins(pairs: tuple[object, ...], epochs: int, config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "num_epochs", 15, *pairs)
    assert outline(cfg).objective.epochs == epochs


def words(method: str) -> tuple[object, ...]:
    return ("pretrained", "none", *of_method(method, 3))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_it_without_weights(name: str, config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", *words(name))
    found = outline(cfg).assumed_prior()
    assert found.shape == (3, 10) and found.dtype == torch.float64 and found.device.type == "cpu"
    assert torch.allclose(found.exp().sum(1), torch.ones(3, dtype=torch.float64))


def test_experts_of_sade(config: Config) -> None:
    """Each is right for the distribution that it was made for; z_e + a_e is the posterior under the training prior."""
    method = outline(config("fake_lt", "tiny_clip", *words("sade")))
    found, draws = method.assumed_prior(), torch.Generator().manual_seed(0)
    z = torch.randn(5, 3, 10, generator=draws, dtype=torch.float64)
    as_trained = (z + method.adjustments).softmax(-1)
    assert torch.allclose((z - found + method.log_prior).softmax(-1), as_trained)
    assert torch.allclose(found[0], method.log_prior) and found[1].std() < 1e-6 and found[2, 0] < found[2, -1]


# --- estimates -----------------------------------------------------------------------------------------------------


def dirichlet(classes: int, seed: int = 0) -> Tensor:
    """Class frequencies, [C]."""
    draws = torch.Generator().manual_seed(seed)
    return torch._sample_dirichlet(torch.ones(classes, dtype=torch.float64), generator=draws)


def scores(classes: int, prior: Tensor, count: int, apart: float, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Exact log likelihoods [n, C] up to a constant of each image, and labels: unit Gaussians around `apart` · e_y."""
    draws = torch.Generator().manual_seed(seed)
    labels = torch.multinomial(prior, count, replacement=True, generator=draws)
    x = torch.randn(count, classes, generator=draws)
    x[torch.arange(count), labels] += apart
    return x.mul_(apart), labels


@pytest.mark.parametrize("classes, count, apart", [(10, 5000, 2.0), (100, 30_000, 3.0), (1000, 60_000, 6.0)])
def test_a_planted_prior_is_found(classes: int, count: int, apart: float) -> None:
    planted = dirichlet(classes)
    found, labels = scores(classes, planted, count, apart)
    assert kl(planted, maximum_likelihood(found)) <= 0.01
    assert kl(planted, frequencies(labels.bincount(minlength=classes))) <= 0.01, "the draw itself is near"


def test_acceleration_ends_where_plain_iterations_do() -> None:
    found, _ = scores(10, dirichlet(10), 500, 1.0)
    posterior = torch.full((10,), 0.1)
    for _ in range(5000):
        posterior = frequencies((found + posterior.log()).softmax(1).sum(0)).float()
    assert (maximum_likelihood(found) - posterior).abs().max() < 1e-4


def test_a_class_that_never_comes_is_not_impossible() -> None:
    found, _ = scores(5, torch.tensor([0.5, 0.5, 0, 0, 0]), 200, 6.0)
    assert 0 < float(maximum_likelihood(found).min()) < 0.01


@pytest.mark.parametrize("classes", [10, 100])
def test_black_box_is_near(classes: int) -> None:
    planted, even = dirichlet(classes), torch.full((classes,), 1 / classes)
    found, _ = scores(classes, planted, 20_000, 3.0)
    assert kl(planted, black_box(found, *scores(classes, even, 20_000, 3.0, 2))) <= 0.05


def test_a_stream_ends_near_all_at_once() -> None:
    planted = dirichlet(10)
    found, _ = scores(10, planted, 5000, 3.0)
    on_the_way = stream(found, torch.arange(5000).split(128))
    assert on_the_way.shape == (40, 10) and torch.allclose(on_the_way.sum(1), torch.ones(40, dtype=torch.float64))
    assert kl(maximum_likelihood(found), on_the_way[-1]) < 0.003 < kl(planted, on_the_way[0])


def test_a_temperature_makes_overconfident_logits_right() -> None:
    """z times 3: without it the estimate is off, with it as good as from the posterior itself."""
    planted, even = dirichlet(10), torch.full((10,), 0.1)
    found, _ = scores(10, planted, 5000, 2.0)
    val, labels = scores(10, even, 5000, 2.0, 2)
    hot = temperature(3 * val, torch.zeros(10), labels)
    assert hot == pytest.approx(3, rel=0.05)
    assert kl(planted, maximum_likelihood(3 * found)) > 0.02
    assert kl(planted, maximum_likelihood(3 * found / hot)) <= 0.01


def test_a_temperature_is_bounded() -> None:
    z = torch.eye(4) * 5
    assert 0.05 <= temperature(z, torch.zeros(4), torch.arange(4)) < 0.2
    assert temperature(z, torch.zeros(4), torch.tensor([1, 2, 3, 0])) == pytest.approx(20, rel=0.01)


# --- results -------------------------------------------------------------------------------------------------------


def fake(n: int = 200, experts: int = 1) -> Logits:
    draws = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    logits = torch.randn(n, experts, 10, generator=draws)
    logits[torch.arange(n), :, labels] += 2
    return Logits(logits, labels, torch.arange(n))


def results(cfg: CfgNode, found: Logits, val: Logits | None = None) -> tuple[dict[str, Any], list[str]]:
    info, n = build_info(cfg), len(found.labels)
    shifts = [TestDistribution("test", torch.bincount(found.labels), torch.arange(n), "all")]
    measured = plain_results(found, shifts, info.groups)
    method = outline(cfg)
    assumed = Assumed(method.assumed_prior(), method.log_prior.exp())
    notes = add_target_results(TargetPlan.of(cfg), assumed, found, val, shifts, info, measured)
    return measured["test"]["predictors"], notes


@pytest.mark.parametrize("loss, target", [("CE", "train"), ("LA", "uniform"), ("BS", "uniform")])
def test_what_a_loss_was_made_for_changes_nothing(loss: str, target: str, config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "loss_type", loss, "target_prior", target)
    measured, notes = results(cfg, fake(experts=1))
    entry = measured[ENTRY]
    assert entry["gain"] == 0 and entry["per_class_acc"] == measured["plain"]["per_class_acc"]
    assert entry["nll"] == pytest.approx(measured["plain"]["nll"], rel=1e-5) and entry["kind"] == target
    assert any("uncalibrated" in note for note in notes) and entry["temperature"] == 1


def test_a_uniform_target_takes_the_training_prior_off(config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "loss_type", "CE", "target_prior", "uniform")
    found, counts = fake(), build_info(cfg).class_counts
    logits = found.logits[:, 0] - log_prior(counts).float()
    entry = results(cfg, found)[0][ENTRY]
    assert entry["accuracy"] == pytest.approx(float(100 * (logits.argmax(1) == found.labels).double().mean()))
    assert entry["prior"] == [0.1] * 10 and entry["kl"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("target", sorted({"estimate", "estimate_bbse", "estimate_online"}))
def test_estimates_read_no_test_label(target: str, config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", target, "val_per_class", 2)
    found, val = fake(), fake(100)
    other = Logits(found.logits, found.labels[torch.randperm(200)], found.index)
    one, two = (results(cfg, each, val)[0][ENTRY] for each in (found, other))
    assert one["prior"] == two["prior"] and one["temperature"] == two["temperature"] != 1
    assert one["accuracy"] != two["accuracy"]


def test_the_oracle_reads_them_and_says_so(config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", "known", "calibrate", False)
    measured, notes = results(cfg, fake())
    assert measured[ENTRY]["kl"] == 0 and len(notes) == 1 and "reads the labels" in notes[0]


def test_a_stream_is_a_function_of_its_seed(config: Config) -> None:
    def run(*pairs: object) -> Any:
        words = ("pretrained", "none", "target_prior", "estimate_online", *pairs)
        return results(config("fake_lt", "tiny_clip", *words), fake())[0][ENTRY]

    assert run() == run() and run("adapt_seed", 1) != run() != run("adapt_batch_size", 16)


def test_frequencies_of_a_named_distribution(config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "loss_type", "CE", "target_prior", "backward50")
    prior = results(cfg, fake())[0][ENTRY]["prior"]
    assert prior[-1] / prior[0] == pytest.approx(50, rel=1e-3) and sum(prior) == pytest.approx(1)
    assert prior == sorted(prior), "the training set's rarest class is the most frequent one"


@pytest.mark.parametrize("content", [[1, 2] * 5, {f"class {k}": 1 + k % 2 for k in reversed(range(10))}])
def test_frequencies_of_a_file(content: Any, config: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(content))
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", tmp_path / "mine.json")
    assert results(cfg, fake())[0][ENTRY]["prior"] == pytest.approx([1 / 15, 2 / 15] * 5)


def test_a_class_of_frequency_0_is_never_predicted(config: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([0] + [1] * 9))
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", tmp_path / "mine.json")
    entry = results(cfg, fake())[0][ENTRY]
    assert entry["per_class_acc"][0] == 0 and 0 < entry["kl"] < 10 and entry["nll"] < 10


BAD = {
    "[1, 2]": "each of the 10 classes, not 2",
    json.dumps([1] * 9 + [-1]): "numbers from 0 on",
    json.dumps([1] * 9 + ["1"]): "numbers from 0 on",
    json.dumps([1] * 9 + [float("nan")]): "numbers from 0 on",
    json.dumps([1] * 9 + [float("inf")]): "numbers from 0 on",
    json.dumps([0] * 10): "not all of them 0",
    json.dumps({f"class {k}": 1 for k in range(9)}): "each of the 10 classes, not 9",
    '"text"': "each of the 10 classes",
    "[1, 2": "is not JSON",
}


@pytest.mark.parametrize("content", BAD)
def test_a_file_that_does_not_fit_is_refused_at_once(content: str, config: Config, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises(UserError, match=BAD[content]):
        outline(config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", tmp_path / "mine.json"))


def test_names_of_classes_are_checked(config: Config, tmp_path: Path) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", tmp_path / "mine.json")
    info = build_info(cfg)
    for names, error in (
        ([*info.class_names, "clas 1"], "clas 1"),
        (info.class_names[:9], "no number for class 'class 9'"),
    ):
        (tmp_path / "mine.json").write_text(json.dumps(dict.fromkeys(names, 1)))
        with pytest.raises(UserError, match=error):
            target_of(TargetPlan.of(cfg), info, info.class_names)


@pytest.mark.parametrize(
    "target, error",
    [("estimat", "did you mean 'estimate'"), ("none.json", "no file"), ("estimate_bbse", "val_per_class")],
)
def test_a_target_that_cannot_be_is_refused_at_once(target: str, error: str, config: Config) -> None:
    with pytest.raises(UserError, match=error):
        outline(config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", target))


def test_black_box_needs_every_class(config: Config) -> None:
    cfg = config("fake_lt", "tiny_clip", "pretrained", "none", "target_prior", "estimate_bbse", "val_per_class", 1)
    with pytest.raises(UserError, match="label 5 has no validation image"):
        results(cfg, fake(), Logits(torch.randn(5, 1, 10), torch.arange(5), torch.arange(5)))


# --- runs ----------------------------------------------------------------------------------------------------------

SHORT = "pretrained none max_steps 3 batch_size 8 num_workers 0 lr 0.1"


def lists(folder: Path) -> str:
    """Images of three classes, frequent to rare, with a validation list; the words of a run on them."""
    for split, counts in {"train": (9, 5, 3), "val": (3, 3, 3), "test": (6, 6, 6)}.items():
        lines = []
        for label, number in ((label, number) for label, count in enumerate(counts) for number in range(count)):
            path = folder / "images" / f"{split}/{label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (80 * label, 12 * number, 90)).save(path)
            lines.append(f"{split}/{label}/{number}.png {label}\n")
        (folder / f"{split}.txt").write_text("".join(lines))
    body = "dataset: ImageList\nroot: images\ntrain_list: train.txt\ntest_list: test.txt\nval_list: val.txt\n"
    (folder / "mine.yaml").write_text(body)
    return f"-d mine.yaml -m tiny_clip {SHORT} output_dir run"


def metrics(folder: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((Path("output") / folder / "metrics.json").read_text())
    return result


def test_a_finished_run_answers_for_every_target_without_images(launch: Cli, tmp_path: Path) -> None:
    words = lists(tmp_path)
    assert launch(words).returncode == 0
    assert Path("output/run/val_logits.safetensors").is_file()
    shutil.move("images", "gone")
    for target in (*TARGETS, "backward2"):
        done = launch(words, f"test_only True test_dists uniform,forward2 target_prior {target}")
        assert done.returncode == 0, done.stderr
        assert f"for {target}" in done.stdout and "KL" in done.stdout
        result = metrics(f"run/tests/target_prior_{target}_test_dists_uniform-forward2")
        assert result["val"]["accuracy"] == metrics("run")["val"]["accuracy"], "the validation split is there too"
        for name in ("uniform", "forward2"):
            entry = result["distributions"][name]["predictors"]
            assert entry[ENTRY]["gain"] == entry[ENTRY]["accuracy"] - entry["plain"]["accuracy"]
            assert entry[ENTRY]["temperature"] != 1 and len(entry[ENTRY]["prior"]) == 3
    assert launch(words, "test_only True target_prior estimate").returncode == 0
    assert list(metrics("run/tests/target_prior_estimate")["distributions"]) == ["test"]


def test_a_run_answers_in_its_own_evaluation_as_later(launch: Cli, tmp_path: Path) -> None:
    words = lists(tmp_path)
    assert launch(words, "target_prior estimate").returncode == 0
    assert launch(words, "test_only True target_prior estimate many_above 4").returncode == 0
    own, later = (
        metrics(name)["distributions"]["test"]["predictors"][ENTRY]
        for name in ("run", "run/tests/many_above_4_target_prior_estimate")
    )
    assert own["prior"] == pytest.approx(later["prior"], abs=1e-3), "logits are stored in half precision"


def test_a_run_without_logits_of_validation_images_looks_at_them_again(launch: Cli, tmp_path: Path) -> None:
    words = lists(tmp_path)
    assert launch(words).returncode == 0
    Path("output/run/val_logits.safetensors").unlink()
    refusal = UserError("images are needed")
    with mock.patch("tailtune.trainers.evaluation.evaluate.infer", side_effect=refusal) as infer:
        assert launch(words, "test_only True target_prior estimate").returncode == 2
        assert launch(words, "test_only True target_prior estimate calibrate False").returncode == 0
    assert len(infer.call_args_list) == 1
    assert launch(words, "test_only True target_prior estimate").returncode == 0
    assert metrics("run/tests/target_prior_estimate")["distributions"]["test"]["predictors"][ENTRY]["temperature"] != 1


def test_without_validation_images_a_note_says_so(launch: Cli) -> None:
    run = f"-d fake_lt -m tiny_clip {SHORT} max_test_images 40 output_dir run"
    assert launch(run).returncode == 0
    assert launch(run, "test_only True target_prior estimate").returncode == 0
    (folder,) = Path("output/run/tests").iterdir()
    assert any("uncalibrated" in note for note in metrics(f"run/tests/{folder.name}")["notes"])


def test_the_trained_run_says_what_its_loss_assumed(launch: Cli) -> None:
    """Evaluated with model_dir by a command of another loss."""
    run = f"-d fake_lt -m tiny_clip {SHORT} max_test_images 40"
    assert launch(run, "loss_type CE output_dir first").returncode == 0
    words = "output_dir second loss_type LA test_only True model_dir first target_prior train calibrate False"
    assert launch(run, words).returncode == 0
    (folder,) = Path("output/second/tests").iterdir()
    entry = metrics(f"second/tests/{folder.name}")["distributions"]["test"]["predictors"]
    assert entry[ENTRY]["nll"] == pytest.approx(entry["plain"]["nll"], rel=1e-5)


def test_logits_of_an_earlier_run_assume_what_that_one_did(launch: Cli) -> None:
    """The experts of ride_ea are those of the run before it, whatever trains who is asked."""
    experts = "num_experts 2 after.num_experts 2 after.loss_type CE loss_type LA sampler balanced"
    after = "after tiny_clip after.max_steps 2 after.batch_size 8 after.pretrained none"
    run = f"-d fake_lt -m tiny_clip {SHORT} max_test_images 40 output_dir run method ride_ea {experts} {after}"
    assert launch(run).returncode == 0
    words = "test_only True target_prior train calibrate False"
    done = launch(run, words)
    assert done.returncode == 0, done.stderr
    (folder,) = Path("output/run/tests").iterdir()
    entry = metrics(f"run/tests/{folder.name}")["distributions"]["test"]["predictors"]
    assert entry[ENTRY]["nll"] == pytest.approx(entry["plain"]["nll"], rel=1e-5)
    shutil.move("output/run/stage1", "output/elsewhere")
    done = launch(run, words, "many_above 3")
    assert done.returncode == 2 and "run before it" in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_run_that_trains_nothing_assumes_what_the_run_before_it_did(launch: Cli) -> None:
    after = "after tiny_clip after.max_steps 2 after.batch_size 8 after.pretrained none after.loss_type CE"
    run = f"-d fake_lt -m tiny_clip pretrained none num_epochs 0 loss_type LA max_test_images 40 output_dir run {after}"
    assert launch(run, "target_prior train calibrate False").returncode == 0
    entry = metrics("run")["distributions"]["test"]["predictors"]
    assert entry[ENTRY]["nll"] == pytest.approx(entry["plain"]["nll"], rel=1e-5)


def test_a_run_that_only_merges_others_assumes_what_they_did(launch: Cli) -> None:
    """Three runs with CE, whatever the loss of the run that merges two of them into the first one."""
    words = "-d fake_lt -m tiny_clip pretrained none max_test_images 40"
    for rate in (1, 2):
        assert launch(words, f"max_steps 2 batch_size 8 loss_type CE lr 0.{rate} output_dir run{rate}").returncode == 0
    after = "after tiny_clip after.max_steps 2 after.batch_size 8 after.loss_type CE after.pretrained none"
    merge = f"{after} num_epochs 0 loss_type LA merge_runs run1,run2 output_dir run target_prior train calibrate False"
    done = launch(words, merge)
    assert done.returncode == 0, done.stderr
    entry = metrics("run")["distributions"]["test"]["predictors"]
    assert entry[ENTRY]["nll"] == pytest.approx(entry["plain"]["nll"], rel=1e-5)


def test_untrained_experts_prefer_no_class(launch: Cli) -> None:
    """The experts of SADE are adjusted in training; at the start, their heads are class means."""
    run = "-d fake_lt -m tiny_clip pretrained none num_epochs 0 max_test_images 40 output_dir run"
    words = "method sade num_experts 3 loss_type CE init_head class_mean target_prior uniform calibrate False"
    done = launch(run, words)
    assert done.returncode == 0, done.stderr
    entry = metrics("run")["distributions"]["test"]["predictors"]
    assert entry[ENTRY]["nll"] == pytest.approx(entry["plain"]["nll"], rel=1e-5)


def test_a_kept_epoch_before_deferred_weights_assumes_the_classes_as_drawn(launch: Cli) -> None:
    """`keep` chooses the first of two epochs, and class weights come with the second one."""
    run = "-d fake_lt -m tiny_clip pretrained none batch_size 8 max_test_images 40 val_per_class 2 output_dir run"
    run += " num_epochs 2 loss_type CE drw_epoch 1 val_every 1 keep best:nll target_prior train calibrate False"

    def falling(self: Validation, *rest: Any) -> dict[str, float | None]:
        return {**dict.fromkeys((*HIGHER, "many_acc", "med_acc", "few_acc"), 1.0), "nll": float(rest[-1])}

    def check(name: str) -> None:
        entry = metrics(name)["distributions"]["test"]["predictors"]
        assert entry[ENTRY]["nll"] == pytest.approx(entry["plain"]["nll"], rel=1e-5)

    with mock.patch.object(Validation, "_measured", falling):
        done = launch(run)
    assert done.returncode == 0, done.stderr
    assert metrics("run")["train"]["kept_epoch"] == 1
    check("run")
    assert launch(run, "test_only True").returncode == 0
    (folder,) = Path("output/run/tests").iterdir()
    check(f"run/tests/{folder.name}")


def test_training_images_have_no_target(launch: Cli) -> None:
    run = f"-d fake_lt -m tiny_clip {SHORT} max_test_images 40 output_dir run"
    assert launch(run, "test_train True target_prior estimate").returncode == 0
    assert "distributions" not in metrics("run") and any("target_prior" in note for note in metrics("run")["notes"])


def test_a_result_is_of_the_file_that_stands_there_now(launch: Cli) -> None:
    """Another content of the same file is another evaluation; the same one is shown again."""
    words = "-d fake_lt -m zstiny_clip pretrained none max_test_images 20 num_workers 0"
    assert launch(words).returncode == 0

    def answer(content: list[int]) -> tuple[str, list[float]]:
        Path("mine.json").write_text(json.dumps(content))
        found = launch(words, "test_only True target_prior mine.json")
        assert found.returncode == 0, found.stderr
        file = next(Path("output").glob("*/tests/*mine.json*/metrics.json"))
        return found.stdout, json.loads(file.read_text())["distributions"]["test"]["predictors"][ENTRY]["prior"]

    first, again, other = answer([1] * 10), answer([1] * 10), answer([91] + [1] * 9)
    assert "finished before" in again[0] and "finished before" not in other[0]
    assert first[1] == again[1] and other[1][0] == pytest.approx(0.91)


def test_a_wrong_target_is_refused_before_any_image(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "-d fake_lt -m zstiny_clip pretrained none max_test_images 20 num_workers 0"
    assert launch(words).returncode == 0
    monkeypatch.setattr("tailtune.trainers.evaluation.evaluate.infer", lambda *_: pytest.fail("images were read"))
    found = launch(words, "test_only True tte True target_prior estimat")
    assert found.returncode == 2 and "did you mean 'estimate'" in found.stderr
