"""Ensembles: weights between a run's start and its end, soups, zero-shot logits beside the trained ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, HasRun
from PIL import Image
from safetensors.torch import load_file
from tiers import slow_except
from torch import Tensor
from yacs.config import CfgNode

from tailtune.datasets.build_data import build_data, build_info
from tailtune.datasets.loading.data_loader import eval_loader
from tailtune.trainers.config_checks import outline
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.evaluation.ensembles import ENSEMBLES
from tailtune.trainers.evaluation.zero_shot_ensembles import WithZeroShot, pretraining_prior, zero_shot_of
from tailtune.trainers.head_preparation import prepare_head
from tailtune.trainers.runs.load_run import make_method

Config = Callable[..., CfgNode]
PEFT = "-d fake_lt -m tiny_clip_peft max_steps 2 batch_size 32 max_test_images 30"
OUT = Path("output")


def done(launch: Cli, *words: object) -> Any:
    found = launch(*words)
    assert found.returncode == 0, found.stderr
    return found


def evaluate(launch: Cli, words: str, ensemble: str, target: str = "run") -> dict[str, Tensor]:
    """Logits of an evaluation of the run, as they are saved."""
    done(launch, words, "output_dir", target, "test_only True", ensemble)
    newest = max((OUT / target / "tests").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    return load_file(newest.parent / "logits.safetensors")


def unrounded(found: dict[str, Tensor]) -> Tensor:
    return found["logits"].float() + found["row_max"].unsqueeze(-1)


def tensors(folder: Path | str) -> dict[str, Tensor]:
    return load_file(OUT / folder / "checkpoint" / "tensors.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- of tensors ------------------------------------------------------------------------------------------------------

BN = "-d fake_lt -m tiny_clip max_steps 2 batch_size 32 max_test_images 30 backbone timm:test_resnet.r160_in1k"


@pytest.mark.parametrize(
    "words",
    [
        PEFT,
        pytest.param(
            f"{PEFT} adaptformer False lora True num_experts 2 expert_split 1 method ride lr 0.05",
            marks=pytest.mark.slow,
        ),
        pytest.param(f"{PEFT} adaptformer False full_tuning True lr 0.01 init_head class_mean", marks=pytest.mark.slow),
        pytest.param(f"{PEFT} adaptformer False mask True", marks=pytest.mark.slow),
        f"{BN} pretrained none init_head class_mean full_tuning True bn_tuning True lr 0.05",
    ],
    ids=["adapter", "lora, experts", "full", "mask", "batch norms"],
)
def test_wise_goes_from_the_start_to_the_end(words: str, launch: Cli, has_run: HasRun) -> None:
    """α = 1: what was trained, to the bit; α = 0: the same run before its first step; between: neither."""
    has_run(words, "output_dir run")
    has_run(words, "num_epochs 0 output_dir start")
    plain, start = (load_file(OUT / name / "logits.safetensors") for name in ("run", "start"))
    alpha = {each: evaluate(launch, words, f"ensemble wise ensemble_alpha {each}") for each in (0, 0.4, 1)}
    assert equal(alpha[1], plain) and not equal(alpha[0.4], plain) and not equal(alpha[0.4], start)
    assert equal(alpha[0], start)


def test_between_the_tensors_are_linear(launch: Cli, has_run: HasRun, monkeypatch: pytest.MonkeyPatch) -> None:
    words = f"{BN} pretrained none init_head class_mean full_tuning True bn_tuning True lr 0.05"
    has_run(words, "output_dir run")
    has_run(words, "num_epochs 0 output_dir start")
    found = evaluated(monkeypatch)
    evaluate(launch, words, "ensemble wise ensemble_alpha 0.25")
    first, last = tensors("start"), tensors("run")
    assert found.keys() == first.keys() and any(not each.is_floating_point() for each in found.values())
    for name, each in found.items():
        mixed = 0.75 * first[name] + 0.25 * last[name]
        assert torch.allclose(each, mixed, atol=1e-6) if each.is_floating_point() else torch.equal(each, last[name])


def evaluated(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The trained tensors that the next evaluation runs with."""
    from tailtune.trainers.evaluation.evaluate import Evaluation
    from tailtune.trainers.storage.checkpoint import trained_state

    found: dict[str, Tensor] = {}
    original = Evaluation.from_images

    def recorded(self: Evaluation, method: Any, *rest: Any) -> None:
        found.update({name: each.clone() for name, each in trained_state(method).items()})
        original(self, method, *rest)

    monkeypatch.setattr(Evaluation, "from_images", recorded)
    return found


def test_a_soup_is_the_mean(launch: Cli, has_run: HasRun, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rate in (("run", 0.2), ("other", 0.3), ("third", 0.4)):
        has_run(PEFT, "lr", rate, "output_dir", name)
    found = evaluated(monkeypatch)
    evaluate(launch, PEFT, "ensemble soup ensemble_runs other,output/third")
    assert any(not torch.equal(each, tensors("run")[name]) for name, each in found.items())
    for name, each in found.items():
        mean = torch.stack([tensors(run)[name].double() for run in ("run", "other", "third")]).mean(0)
        assert torch.equal(each, mean.float())


def test_a_soup_is_evaluated_again_when_another_run_has_changed(launch: Cli, has_run: HasRun) -> None:
    words = "test_only True ensemble soup ensemble_runs other output_dir run"
    for name, rate in (("run", 0.2), ("other", 0.3)):
        has_run(PEFT, "lr", rate, "output_dir", name)
    first = done(launch, PEFT, words).stdout
    assert "finished before" in done(launch, PEFT, words).stdout and "finished before" not in first
    done(launch, PEFT, "output_dir other lr 0.5 resume False")
    again = done(launch, PEFT, words).stdout
    assert "finished before" not in again and "using the logits" not in again


def test_what_no_soup_is_made_of(launch: Cli, has_run: HasRun) -> None:
    has_run(PEFT, "output_dir run")
    for number, (other, parts) in enumerate(
        [
            ("adapter_dim 4", ["of another shape", "another tuner, head or class count"]),
            ("lora True", ["unexpected", "lora"]),
            ("backbone timm:test_vit.r160_in1k pretrained none init_head none", ["another base model"]),
            ("imb_factor none num_classes 5", ["class"]),
            ("scale 5", ["ensemble_runs", "scale 5", "not 25"]),
            ("classifier L2NormedClassifier", ["ensemble_runs", "classifier L2NormedClassifier"]),
        ]
    ):
        done(launch, PEFT, other, f"output_dir other{number}")
        found = launch(PEFT, f"output_dir run test_only True ensemble soup ensemble_runs other{number}")
        assert found.returncode == 2 and all(part in found.stderr for part in parts), found.stderr
        assert not list((OUT / "run/tests").glob("*/metrics.json"))


def test_a_soup_of_masks_is_of_the_same_weights(launch: Cli) -> None:
    words = f"{PEFT} adaptformer False mask True"
    for seed in (0, 1):
        done(launch, words, "mask_seed", seed, "output_dir", f"run{seed}")
    found = launch(words, "mask_seed 0 output_dir run0 test_only True ensemble soup ensemble_runs run1")
    assert found.returncode == 2 and "mask_seed" in found.stderr


def test_wise_after_an_earlier_run_and_of_another_run(launch: Cli) -> None:
    """A later stage begins with the earlier run's result; another run begins as its own config says."""
    words = f"{PEFT} after tiny_clip_peft after.max_steps 1 output_dir run"
    done(launch, words)
    assert not equal(tensors("run"), tensors("run/stage1"))
    start, end = (evaluate(launch, words, f"ensemble wise ensemble_alpha {each}") for each in (0, 1))
    assert equal(start, load_file(OUT / "run/stage1/logits.safetensors"))
    assert equal(end, load_file(OUT / "run/logits.safetensors"))
    done(launch, PEFT, "seed 3 output_dir third")
    done(launch, PEFT, "seed 3 num_epochs 0 output_dir start")
    found = evaluate(launch, PEFT, "model_dir third ensemble wise ensemble_alpha 0", "run2")
    assert equal(found, load_file(OUT / "start/logits.safetensors"))
    start = evaluate(launch, PEFT, "model_dir run ensemble wise ensemble_alpha 0", "run3")
    assert equal(start, load_file(OUT / "run/stage1/logits.safetensors"))
    (OUT / "run/stage1").rename("away")
    refused = launch(PEFT, "model_dir run test_only True ensemble wise")
    assert refused.returncode == 2 and "stage1 is not there" in refused.stderr


# --- of logits -------------------------------------------------------------------------------------------------------


OF_TWO = "num_experts 2 expert_split 2 lora True method sade loss_type CE"


@pytest.mark.parametrize("experts", slow_except([OF_TWO], ["num_experts 1", OF_TWO]))
def test_logits_of_each_expert_and_zero_shot(experts: str, launch: Cli, has_run: HasRun) -> None:
    words = f"{PEFT} {experts}"
    has_run(words, "output_dir run")
    has_run("-d fake_lt -m zstiny_clip max_test_images 30 output_dir zs")
    z, other = (unrounded(load_file(OUT / name / "logits.safetensors")) for name in ("run", "zs"))
    found = {each: unrounded(evaluate(launch, words, f"ensemble logits ensemble_alpha {each}")) for each in (0, 0.3, 1)}
    assert torch.allclose(found[0.3], 0.3 * z + 0.7 * other, atol=0.03), "both are rounded to half precision"
    assert torch.equal(found[1], z) and torch.equal(found[0], other.expand_as(z))


@torch.no_grad()
def zero_shot_logits(cfg: CfgNode) -> tuple[Tensor, Tensor]:
    """Of the training images as they are, and their labels."""
    data, accelerator = build_data(cfg), make_accelerator(Devices.of(cfg))
    method = make_method(zero_shot_of(cfg), data.info)
    prepare_head(method, data, accelerator, 64, 0)
    batches = list(eval_loader(data.train_unaugmented, 64, 0))
    logits = torch.cat([method.eval().predict(batch["image"]) for batch in batches])
    return logits, torch.cat([batch["label"] for batch in batches])


def test_gla_takes_both_priors_off(launch: Cli, has_run: HasRun, config: Config) -> None:
    words = f"{PEFT} {OF_TWO}"
    has_run(words, "output_dir run")
    has_run("-d fake_lt -m zstiny_clip max_test_images 30 output_dir zs")
    z, other = (unrounded(load_file(OUT / name / "logits.safetensors")) for name in ("run", "zs"))
    found = unrounded(evaluate(launch, words, "ensemble gla"))
    (path,) = OUT.glob("run/tests/ensemble_gla*/metrics.json")
    facts = json.loads(path.read_text())["ensemble"]
    prior = torch.tensor(facts["pretraining_prior"])
    assert abs(float(prior.sum()) - 1) < 1e-6
    cfg = config("fake_lt", *words.split()[3:])
    assert torch.allclose(prior, pretraining_prior(*zero_shot_logits(cfg)).exp().float(), atol=1e-4)
    assumed = outline(cfg).assumed_prior()
    assert torch.allclose(found, z + other - assumed.float() - prior.log(), atol=0.05)


@pytest.mark.parametrize(("classes", "images"), [(5, 20_000), (30, 30_000)])
def test_a_planted_prior_is_found(classes: int, images: int) -> None:
    """Posteriors of Gaussian classes under a prior of their own, on images that are drawn by another one."""
    draws = torch.Generator().manual_seed(classes)
    prior = torch.rand(classes, generator=draws).square().add(0.01)
    prior /= prior.sum()
    means = torch.randn(classes, 8, generator=draws)
    labels = torch.multinomial(torch.linspace(1, 0.05, classes), images, True, generator=draws)
    images_of = means[labels] + torch.randn(images, 8, generator=draws)
    logits = -torch.cdist(images_of, means).square() / 2 + prior.log()
    found = pretraining_prior(logits + 3 * torch.randn(images, 1, generator=draws), labels)
    assert float((prior * (prior.log() - found)).sum()) < 0.005
    assert found.dtype == torch.float64 and float(found.exp().sum()) == pytest.approx(1)
    assert torch.allclose(found, pretraining_prior(logits, labels), atol=1e-4), (
        "a constant of each image changes nothing"
    )


def test_the_prior_of_a_class_without_images() -> None:
    logits, labels = torch.randn(60, 4), torch.arange(60) % 3
    found = pretraining_prior(logits, labels)
    assert torch.allclose(found[3], found[:3].mean())
    assert torch.allclose(found[:3].log_softmax(0), pretraining_prior(logits[:, :3], labels), atol=1e-6)


def test_it_is_the_least_of_the_balanced_risk() -> None:
    draws = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(50, 3, generator=draws).double(), torch.arange(50) % 7 % 3
    weights = (1 / labels.bincount().double())[labels]

    def risk(prior: Tensor) -> float:
        return float((torch.nn.functional.cross_entropy(logits - prior, labels, reduction="none") * weights).sum())

    found = pretraining_prior(logits, labels)
    assert all(risk(found) < risk(found + 0.01 * torch.randn(3, generator=draws)) for _ in range(20))


# --- of changed training images --------------------------------------------------------------------------------------


@pytest.fixture
def own_images(tmp_path: Path) -> str:
    """Images of three classes in lists. The last training image of each class is not in the list yet."""
    for split, count in (("train", 7), ("test", 5)):
        lines = []
        for label, number in ((label, number) for label in range(3) for number in range(count)):
            path = tmp_path / f"{split}/{label}/{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (80 * label, 36 * number, 90)).save(path)
            lines += [f"{split}/{label}/{number}.png {label}\n"] if split == "test" or number < 6 else []
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    body = "dataset: ImageList\nroot: .\ntrain_list: train.txt\ntest_list: test.txt\naugment: digits\n"
    (tmp_path / "mine.yaml").write_text(body)
    return "-d mine.yaml -m tiny_clip_peft max_steps 2 batch_size 8 num_workers 0 output_dir run"


def add_images() -> None:
    with Path("train.txt").open("a") as file:
        file.write("".join(f"train/{label}/6.png {label}\n" for label in range(3)))


def test_gla_estimates_its_prior_on_the_training_images_that_are_there(own_images: str, launch: Cli) -> None:
    def facts(words: str = "") -> list[float]:
        done(launch, own_images, "test_only True ensemble gla", words)
        newest = max(OUT.glob("run/tests/*/metrics.json"), key=lambda path: path.stat().st_mtime_ns)
        prior: list[float] = json.loads(newest.read_text())["ensemble"]["pretraining_prior"]
        return prior

    done(launch, own_images)
    first = facts()
    assert first == facts("many_above 4"), "from the stored logits"
    add_images()
    assert first != facts() == facts("many_above 4")


def test_class_names_and_descriptions_that_changed_are_read_again(own_images: str, launch: Cli) -> None:
    """The zero-shot classifier is made of them. Other names are other classes, so they are refused."""
    words = own_images.replace("tiny_clip_peft max_steps 2 batch_size 8", "zstiny_clip prompt descriptor")
    words += " descriptors texts.json"
    Path("mine.yaml").write_text(f"{Path('mine.yaml').read_text()}classnames: names.txt\n")
    Path("names.txt").write_text("one\ntwo\nthree\n")

    def nll(sentence: str) -> float:
        texts = {name: [sentence.format(name)] for name in ("one", "two", "three")}
        Path("texts.json").write_text(json.dumps(texts))
        done(launch, words)
        found: float = json.loads((OUT / "run/metrics.json").read_text())["test"]["nll"]
        return found

    assert nll("a {}") == nll("a {}") != nll("the digit {}")
    Path("names.txt").write_text("two\none\nthree\n")
    for more in ("", "test_dists uniform"):
        refused = launch(words, more)
        assert (
            refused.returncode == 2
            and "class 0 is 'two' and not 'one'" in refused.stderr
            and "resume False" in refused.stderr
        )


def test_wise_of_class_means_of_other_images_is_refused(own_images: str, launch: Cli) -> None:
    for words in ("init_head class_mean", "output_dir text"):
        done(launch, own_images, words)
        done(launch, own_images, words, "test_only True ensemble wise")
    add_images()
    done(launch, own_images, "output_dir text test_only True ensemble wise ensemble_alpha 0.3")
    found = launch(own_images, "init_head class_mean test_only True ensemble wise ensemble_alpha 0.3")
    assert found.returncode == 2 and "training images" in found.stderr and "ensemble wise" in found.stderr


# --- what is refused, and what goes with it --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("ensemble wisse", ["ensemble", "did you mean 'wise'"]),
        ("ensemble wise test_only False", ["ensemble wise", "test_only True"]),
        ("ensemble_alpha 0.2", ["ensemble_alpha", "without ensemble wise or ensemble logits"]),
        ("ensemble gla ensemble_alpha 0.2", ["ensemble_alpha 0.2", "without ensemble wise or ensemble logits"]),
        ("ensemble wise ensemble_alpha 1.5", ["ensemble_alpha must be at most 1, not 1.5"]),
        ("ensemble wise ensemble_runs other", ["ensemble_runs", "without ensemble soup"]),
        ("ensemble soup", ["ensemble soup", "ensemble_runs"]),
        ("ensemble gla zero_shot True adaptformer False", ["ensemble gla", "zero_shot"]),
        ("ensemble wise init_head none", ["ensemble wise", "at random", "init_head"]),
        ("ensemble wise export merged", ["export merged", "ensemble wise"]),
        (
            "ensemble logits pretrained none backbone ResNet-20 adaptformer False init_head none",
            ["ensemble logits", "text encoder"],
        ),
        ("ensemble gla backbone timm:test_vit.r160_in1k init_head none", ["ensemble gla", "text encoder"]),
    ],
)
def test_what_is_refused(words: str, parts: list[str], launch: Cli) -> None:
    """Before anything is read: by a dry run too."""
    for more in ("", "--dry-run"):
        found = launch(f"-d fake_lt -m tiny_clip_peft test_only True {words} {more}")
        assert found.returncode == 2 and len(found.stderr.splitlines()) == 1
        assert all(part in found.stderr for part in parts if more or "nothing is trained" not in found.stderr)


def test_a_run_is_in_a_soup_once(launch: Cli, has_run: HasRun) -> None:
    has_run(PEFT, "output_dir run")
    for twice in ("run", "output/run"):
        found = launch(PEFT, f"output_dir run test_only True ensemble soup ensemble_runs {twice}")
        assert found.returncode == 2 and "there twice" in found.stderr


def test_runs_that_are_not_there(launch: Cli, has_run: HasRun) -> None:
    has_run(PEFT, "output_dir run")
    found = launch(PEFT, "output_dir run test_only True ensemble soup ensemble_runs nowhere")
    assert found.returncode == 2 and "ensemble_runs nowhere" in found.stderr


@pytest.mark.slow
def test_with_all_else(launch: Cli) -> None:
    """Other distributions, adapted experts, crops, another precision, a method that asks only some experts."""
    words = f"{PEFT} num_experts 2 lora True method ride"
    done(launch, words, "output_dir run")
    rest = "test_dists uniform,forward5 adapt sade adapt_epochs 1 tte True test_prec fp64"
    for ensemble in ("wise", "gla"):
        evaluate(launch, words, f"ensemble {ensemble} {rest}")
    for path in OUT.glob("run/tests/*/metrics.json"):
        assert "sade" in json.loads(path.read_text())["distributions"]["forward5"]["predictors"]
    chain = f"{words.replace('ride', 'ride_ea')} after tiny_clip_peft after.num_experts 2 after.lora True"
    done(launch, chain, "output_dir ea")
    found = evaluate(launch, chain, "ensemble logits", "ea")
    assert found["logits"].shape[1] == 2 and found["row_max"][:, 0].isfinite().all()


def test_the_prior_that_an_ensemble_assumes() -> None:
    prior = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]]).log()
    other = torch.tensor([[0.2, 0.2, 0.6], [0.4, 0.3, 0.3]]).log()
    found = {name: each.assumes(prior, [other], 0.25) for name, each in ENSEMBLES.items()}
    assert torch.equal(found["wise"], prior) and torch.equal(ENSEMBLES["wise"].assumes(prior, [other], 0), other)
    assert torch.allclose(found["soup"], (prior.exp() * other.exp()).sqrt().log().log_softmax(1))
    assert torch.allclose(found["logits"], (prior.exp() ** 0.25).log().log_softmax(1))
    assert torch.allclose(found["gla"].exp(), torch.full((2, 3), 1 / 3))


AIMED = "test_only True target_prior mine.json calibrate False"


def aimed(launch: Cli, words: str, ensemble: str) -> tuple[dict[str, Any], list[str]]:
    """The predictors of an evaluation that predicts for the frequencies of mine.json, and its notes."""
    done(launch, words, AIMED, ensemble)
    newest = max(OUT.glob("run/tests/*/metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    result = json.loads(newest.read_text())
    return result["distributions"]["test"]["predictors"], result["evaluation"]["notes"]


@pytest.mark.parametrize(
    ("ensemble", "power", "guess"),
    [
        ("wise ensemble_alpha 0", 0, False),
        ("wise ensemble_alpha 0.5", 1, True),
        ("wise ensemble_alpha 1", 1, False),
        ("soup ensemble_runs ce", 1, False),
        ("soup ensemble_runs bs", 0.5, True),
    ],
)
def test_a_prediction_for_the_prior_that_an_ensemble_assumes_is_the_plain_one(
    ensemble: str, power: float, guess: bool, launch: Cli, has_run: HasRun, config: Config
) -> None:
    """∝ π^power: π of a run with CE, uniform of its start and of a run with BS; a soup is between its runs."""
    has_run(PEFT, "loss_type CE output_dir run")
    has_run(PEFT, "loss_type CE lr 0.3 output_dir ce")
    has_run(PEFT, "loss_type BS output_dir bs")
    frequencies = build_info(config("fake_lt", "tiny_clip_peft")).class_counts.double() ** power
    Path("mine.json").write_text(json.dumps((frequencies / frequencies.sum()).tolist()))
    for _ in range(2):  # from images, and from the stored logits
        found, notes = aimed(launch, f"{PEFT} loss_type CE output_dir run", f"ensemble {ensemble}")
        assert found["target_prior"]["nll"] == pytest.approx(found["plain"]["nll"], rel=1e-5)
        assert any("different class priors" in note for note in notes) == guess
        ensemble += " many_above 7"


def test_experts_that_are_summed_take_their_share(config: Config) -> None:
    """The zero-shot logits count once, whether the prediction is the sum of the heads' logits or their mean."""
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for words, factor in ((("method", "reslt"), 3), ((), 1)):
        cfg = config("fake_lt", "tiny_clip", "num_experts", 3, "init_head", "none", *words)
        trained, zero_shot = (make_method(each, build_info(each)).eval() for each in (cfg, zero_shot_of(cfg)))
        joined = WithZeroShot(trained, zero_shot, lambda z, other: z + other)
        wanted = factor * trained.model(images).mean(1) + zero_shot.model(images).mean(1)
        assert torch.allclose(joined.predict(images), wanted, atol=1e-5)
