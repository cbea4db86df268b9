"""The command line's contract: flags, configs, the dry run, the run folder, and what a second launch does."""

import json
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, Cli
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_bad_input import signal_after, states
from tiers import slow_except

from tailtune import main
from tailtune.benchmarks.shipped import PAIRS
from tailtune.configs import config_files, config_hash, load_configs, load_resolved, names, values_of
from tailtune.configs.shipped_configs import KINDS, SMALL_TUNERS, configs_of, kind_of
from tailtune.configs.yaml_reader import read_yaml
from tailtune.datasets.build_data import build_info
from tailtune.main import split_arguments
from tailtune.models import resolve
from tailtune.models.tuners.table import TUNERS
from tailtune.trainers.config_checks import check
from tailtune.trainers.dry_run import dry_run
from tailtune.trainers.option_schema import declared

FAKE = "-d fake_lt -m tiny_clip_peft pretrained none"
SHORT = f"{FAKE} num_epochs 2 output_dir run"
RUN = Path("output/run")


# --- flags -----------------------------------------------------------------------------------------------------------


def test_help(launch: Cli, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "examples:" in shown
    assert shown.count("python main.py -d") >= 4


def test_help_in_a_shell(cli: Cli) -> None:
    done = cli("lr", "0.1", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python main.py -d DATA -m MODEL [KEY VALUE ...]")


def test_list(launch: Cli) -> None:
    done = launch("--list")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    listed = [line.split(None, 1) for line in lines if line.startswith("  ")]
    assert [name for name, _ in listed] == [*names("data"), *names("model")]
    assert all(len(description) > 10 for _, description in listed)
    assert [line for line in lines if not line.startswith("  ")] == ["data:", "model:"]


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind reads all files; here one look at a file serves all kinds."""
    monkeypatch.setattr("tailtune.configs.shipped_configs.read_yaml", cache(read_yaml))


def test_list_of_a_kind(launch: Cli, read_once: None) -> None:
    """Every model config is of one kind, and described there as in the whole list."""
    described = dict(line.split(None, 1) for line in launch("--list").stdout.splitlines() if line.startswith("  "))
    listed: list[str] = []
    for kind in KINDS:
        done = launch("--list", kind)
        assert (done.returncode, done.stderr) == (0, "")
        heading, *lines = done.stdout.splitlines()
        assert heading == f"model, {kind} ({KINDS[kind]}):"
        assert lines and all(described[line.split()[0]] == line.split(None, 1)[1] for line in lines)
        listed += [line.split()[0] for line in lines]
    assert sorted(listed) == [*names("model")]
    assert launch("--list=head").stdout == launch("--list head").stdout


def test_list_of_an_unknown_kind(launch: Cli) -> None:
    done = launch("--list expert")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown kind of model config 'expert'; did you mean 'experts'? choices: ")
    assert done.stderr.count("\n") == 1


def test_kinds_are_those_of_the_resolved_configs(read_once: None) -> None:
    """The files are read without the schema; the whole config says the same. All tuners that are used are known."""
    schema = declared()
    for kind in KINDS:
        for name in configs_of(kind):
            values = values_of(load_configs("fake_lt", name, [], schema)[-1])
            assert kind_of(values) == kind, name
            assert {tuner for tuner in TUNERS if values[tuner]} <= {*SMALL_TUNERS, "full_tuning"}, name


@pytest.mark.parametrize(
    "words",
    [
        "-d fake_lt -m tiny_clip lr 0.1 weight_decay -1e-3 --dry-run",
        "--dry-run lr 0.1 -m tiny_clip weight_decay -1e-3 -d fake_lt",
        "lr 0.1 --model tiny_clip --dry-run weight_decay -1e-3 --data fake_lt",
        "lr --dry-run 0.1 -d fake_lt weight_decay -m tiny_clip -1e-3",
    ],
)
def test_flags_stand_anywhere(words: str) -> None:
    flags, pairs = split_arguments(words.split())
    parsed = main.make_parser().parse_args(flags)
    assert (parsed.data, parsed.model, parsed.dry_run) == ("fake_lt", "tiny_clip", True)
    assert pairs == ["lr", "0.1", "weight_decay", "-1e-3"]


def test_flags_with_equals_sign(launch: Cli) -> None:
    assert launch("--data=fake_lt --dry-run --model=tiny_clip tau -1e-3").returncode == 0


# --- configs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`shipped("model/mine", text)` adds a config to a copy of the shipped ones."""
    folder = tmp_path / "shipped"
    for kind in ("data", "model"):
        shutil.copytree(config_files.FOLDER / kind, folder / kind)
    monkeypatch.setattr(config_files, "FOLDER", folder)
    return lambda name, text: None if (folder / f"{name}.yaml").write_text(text) else None


def test_merge_order(shipped: Callable[[str, str], None]) -> None:
    """defaults < data < model < by_dataset, most specific last < command line; but `augment` is the data's."""
    shipped("data/mine_100", "dataset: Fake\nlr: 1\nnum_epochs: 1\nbatch_size: 1\nmomentum: 0.1\naugment: digits\n")
    shipped(
        "model/mine",
        "backbone: TinyCLIP\nresolution: 32\naugment: cifar\nnum_epochs: 2\nbatch_size: 2\nmomentum: 0.2\n"
        "by_dataset:\n  mine_100: {momentum: 0.5}\n  'mine*': {batch_size: 3, momentum: 0.3}\n"
        "  '*': {batch_size: 4, momentum: 0.4}\n  other: {lr: 9}\n",
    )
    (cfg,) = load_configs("mine_100", "mine", ["momentum", "0.6"], declared())
    assert (cfg.tau, cfg.lr, cfg.num_epochs, cfg.batch_size, cfg.momentum) == (1.0, 1.0, 2, 3, 0.6)
    assert load_configs("mine_100", "mine", [], declared())[0].momentum == 0.5
    assert cfg.augment == "digits"
    with pytest.raises(AttributeError):
        cfg.lr = 2.0


def test_values_have_the_declared_type() -> None:
    words = "output_dir 2024 lr 1 max_steps none seed 007 tte TRUE partial [0,6) pretrained Null tau -1e-3"
    (cfg,) = load_configs("fake_lt", "tiny_clip", words.split(), declared())
    assert (cfg.output_dir, cfg.lr, cfg.max_steps, cfg.seed, cfg.tte) == ("2024", 1.0, None, 7, True)
    assert type(cfg.lr) is float
    assert (cfg.partial, cfg.pretrained, cfg.tau) == ([0, 6], None, -1e-3)


def test_aliases(shipped: Callable[[str, str], None]) -> None:
    shipped("model/mine", "backbone: TinyCLIP\ntest_ensemble: true\n")
    assert load_configs("fake_lt", "mine", [], declared())[0].tte
    assert not load_configs("fake_lt", "mine", ["test_ensemble", "False"], declared())[0].tte


def test_run_names() -> None:
    def name(*pairs: str) -> str:
        return load_configs("fake_lt", "tiny_clip", pairs, declared())[0].run_name

    assert name() == "fake_lt_tiny_clip"
    assert name("lr", "0.2", "num_workers", "3", "tte", "True") == "fake_lt_tiny_clip"
    assert (
        name("lora", "True", "lr", "0.5") == name("lr", "5e-1", "lora", "true") == "fake_lt_tiny_clip_lora_True_lr_0.5"
    )
    odd = name("pretrained", "/some where/../w*.pt")
    assert odd != name("pretrained", "/some where/../w?.pt")
    long = name("backbone", "CLIP-ViT-B/16", "pretrained", "/x" * 200, "classnames", "y" * 200)
    for each in (odd, long):
        assert len(each) < 200
        assert not set(each) & set("/ *?\\'\"$&;<>|")


def test_own_data_by_path(launch: Cli, tmp_path: Path) -> None:
    (tmp_path / "our birds.yaml").write_text("dataset: Fake\nnum_classes: 5\n")
    (cfg,) = load_configs(str(tmp_path / "our birds.yaml"), "tiny_clip", [], declared())
    assert (cfg.data, cfg.run_name, cfg.data_dir) == ("our birds", "our-birds_tiny_clip", str(tmp_path))


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_every_config_loads() -> None:
    schema = declared()
    for data, model in [*PAIRS, *((data, "tiny_clip") for data in names("data"))]:
        *_, cfg = load_configs(data, model, [], schema)
        assert cfg.run_name == f"{data}_{model}"


@pytest.mark.slow
@pytest.mark.parametrize("model", names("model"))
def test_every_pair_of_configs_loads(model: str) -> None:
    for data in names("data"):
        *_, cfg = load_configs(data, model, [], declared())
        assert cfg.run_name == f"{data}_{model}"


ONE_OF_EACH_NETWORK = ["clip_vit_b16_peft", "clip_vit_l14", "clip_rn50", "in21k_vit_b16_peft", "zsclip_vit_b16"]
ONE_OF_EACH_NETWORK += ["resnet10_ride_distill", "resnet50_sade", "resnext50_dirmixe", "resnet152_h2t", "zstiny_clip"]
"""Configs on the CIFAR network are built in tests/test_expert_configs.py."""


@pytest.mark.parametrize(
    ("data", "model"),
    [
        *((data, "tiny_clip") for data in names("data")),
        *slow_except(
            [("fake_lt", model) for model in ONE_OF_EACH_NETWORK],
            # The largest logits that assignment looks at are more than ten classes.
            [("imagenet_lt" if model.endswith("_ea") else "fake_lt", model) for model in names("model")],
        ),
    ],
)
def test_every_config_builds(data: str, model: str) -> None:
    check(load_configs(data, model, [], declared())[-1])


PARAMETERS = [
        ("imagenet_lt", "adaptformer True", 617_868, 768_000),
        ("places_lt", "adaptformer True", 175_212, 280_320),
        ("inat2018", "adaptformer True", 4_749_324, 6_253_056),
        ("cifar100_ir100", "adaptformer True", 101_436, 76_800),
        ("imagenet_lt", "lora True", 1_179_648, 768_000),
        ("places_lt", "lora True", 294_912, 280_320),
        ("imagenet_lt", "vpt_deep True", 92_160, 768_000),
        ("imagenet_lt", "full_tuning True", 85_054_464, 768_000),
        ("imagenet_lt", "adaptformer True partial [0,6]", 308_934, 768_000),
        ("imagenet_lt", "adapter True", 617_856, 768_000),
        ("cifar100_ir100", "adapter True", 101_424, 76_800),
        ("imagenet_lt", "bias_tuning True", 101_376, 768_000),
        ("imagenet_lt", "ln_tuning True", 36_864, 768_000),
        ("imagenet_lt", "vpt_shallow True", 7_680, 768_000),
        ("imagenet_lt", "full_tuning True partial 1", 7_087_872, 768_000),
        ("imagenet_lt", "full_tuning True partial 0", 0, 768_000),
        ("imagenet_lt", "classifier LinearClassifier", 0, 769_000),
        *(
            ("imagenet_lt", f"adaptformer True adapter_dim {r}", count, 768_000)
            for r, count in ((1, 46_104), (2, 64_548), (16, 322_764), (64, 1_208_076), (128, 2_388_492))
        ),
        ("places_lt", "adapter True", 175_200, 280_320),
        ("inat2018", "adapter True", 4_749_312, 6_253_056),
        ("inat2018", "lora True", 9_437_184, 6_253_056),
        ("cifar100_ir100", "lora True", 147_456, 76_800),
        ("cifar100_ir100", "mask True", 84_996, 76_800),
        ("places_lt", "mask True", 255_036, 280_320),
        ("imagenet_lt", "mask True", 765_132, 768_000),
        ("inat2018", "mask True", 6_206_256, 6_253_056),
        ("imagenet_lt", "mask True mask_ratio 0.005", 425_052, 768_000),
        ("imagenet_lt", "mask True mask_ratio 0.01", 850_140, 768_000),
        ("inat2018_k", "adaptformer True", 46_104, 4_608),
        ("inat2018_p", "adaptformer True", 46_104, 19_200),
        ("inat2018_c", "adaptformer True", 64_548, 43_776),
        ("inat2018_o", "adaptformer True", 175_212, 208_896),
        ("inat2018_f", "adaptformer True", 617_868, 858_624),
        ("inat2018_g", "adaptformer True", 2_388_492, 3_379_968),
]  # fmt: skip
"""Data, options → parameters of the tuners and of the head (LIFT specification §13.1)."""
ONE_OF_EACH_TUNER = [row for row in PARAMETERS if row[0] == "imagenet_lt" and "adapter_dim" not in row[1]]


@pytest.mark.parametrize(("data", "words", "tuner", "head"), slow_except(ONE_OF_EACH_TUNER, PARAMETERS))
def test_parameter_counts(config: Callable[..., Any], data: str, words: str, tuner: int, head: int) -> None:
    if "classifier" in words:
        words += " init_head none"
    counts = check(config(data, "clip_vit_b16", *words.split())).counts()
    assert (counts["tuner"], counts["head"], counts["trainable"]) == (tuner, head, tuner + head)


@pytest.mark.parametrize(("data", "total"), [("cifar100_ir100", 85_976_892), ("imagenet_lt", 87_184_524)])
def test_totals_of_in21k(config: Callable[..., Any], data: str, total: int) -> None:
    cfg = config(data, "clip_vit_b16_peft", "backbone", "IN21K-ViT-B/16", "init_head", "none")
    assert check(cfg).counts()["total"] == total


def test_dry_run_ends_in_one_line_of_json(launch: Cli, tmp_path: Path) -> None:
    done = launch("-d imagenet_lt -m clip_vit_b16_peft root /nowhere --dry-run lr 0.02")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"config", "params", "gflops_per_image"}
    assert (result["config"]["lr"], result["config"]["root"], result["config"]["tte"]) == (0.02, "/nowhere", True)
    params = result["params"]
    assert set(params) == {"total", "tuner", "head", "trainable"}
    # without the visual projection (768 · 512), which nothing uses
    assert params["total"] == 86_192_640 - 768 * 512 + 617_868 + 768_000
    assert not any(tmp_path.iterdir())


def test_dry_run_shows_what_a_run_would_be(launch: Cli) -> None:
    done = launch("-d fake_lt -m tiny_clip_peft --dry-run lr 0.02 max_steps 3 batch_size 16")
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert lines[0] == "run folder  output/fake_lt_tiny_clip_peft_batch_size_16_lr_0.02_max_steps_3"
    counts = build_info(resolve(load_configs("fake_lt", "tiny_clip_peft", [], declared())[-1])).class_counts
    total, most, least = (int(number) for number in (counts.sum(), counts.max(), counts.min()))
    assert lines[1] == f"classes     10 with {most} … {least} training images, {total} in all"
    assert lines[2] == f"training    {-(-total // 16)} steps an epoch, 3 in all"
    values = {words[0]: words[-1] for words in map(str.split, lines) if len(words) > 1}
    assert (values["lr"], values["adaptformer"]) == ("0.02", "True") and "momentum" not in values
    start = next(number for number, line in enumerate(lines) if line.startswith("estimated memory"))
    memory = [int(line.split()[-1].replace(",", "")) for line in lines[start + 1 : start + 6]]
    weights = 4 * json.loads(last)["params"]["total"]  # bytes
    assert memory[0] == round(weights / 1e6) and memory[3] > 0
    assert abs(memory[4] - sum(memory[:4])) <= 2, "the sum, but for rounding"


def test_dry_run_with_all_shows_every_option(launch: Cli) -> None:
    done = launch("-d fake_lt -m tiny_clip_peft --dry-run --all")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert set(declared().settable()) <= {words[0] for words in lines if words}
    assert ["expand", "None", "→", "12"] in lines, "what stands behind none"


def test_gflops_of_a_whole_forward(config: Callable[..., Any]) -> None:
    """Against 2mnk counted by hand for the embedded CLIP, whose last block needs but the class token."""
    cfg = config("fake_lt", "tiny_clip")
    found, _ = dry_run(cfg)
    vision = json.loads((config_files.FOLDER.parent / "models/tiny_clip/tailtune-tiny.json").read_text())
    width, layers, patch = (vision["vision_cfg"][key] for key in ("width", "layers", "patch_size"))
    grid = (32 // patch) ** 2
    tokens = grid + 1
    blocks = layers * (2 * tokens * width * 12 * width + 4 * tokens * tokens * width)
    whole = 2 * grid * 3 * patch * patch * width + blocks + 2 * width * 10
    assert 0.6 * whole < found["gflops_per_image"] * 1e9 <= whole


# --- one finished run ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two epochs, not to be changed; the whole scratch folder."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main.main(SHORT.split()) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it in this test's scratch folder."""
    shutil.copytree(finished / "output", tmp_path / "output")
    return tmp_path / RUN


def test_metrics_json(finished: Path) -> None:
    result = json.loads((finished / RUN / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert set(result) >= {
        *("schema", "data", "model", "seed", "commit", "packages", "hardware", "prec_used", "stopped_early", "notes"),
        *("params", "class_counts", "train", "test"),
    }
    assert (result["schema"], result["data"], result["model"], result["seed"]) == (2, "fake_lt", "tiny_clip_peft", 0)
    assert (result["prec_used"], result["stopped_early"]) == ("fp32", False)
    assert set(result["params"]) == {"total", "tuner", "head", "trainable"}
    assert {"epochs", "steps", "seconds", "images_per_second", "peak_memory_bytes"} <= set(result["train"])
    assert (result["train"]["epochs"], result["train"]["steps"]) == (2, 10)
    assert result["class_counts"][0] == 40
    metrics = result["test"]
    assert set(metrics) >= {
        *("accuracy", "error_rate", "macro_f1", "mean_acc", "many_acc", "med_acc", "few_acc", "worst_case_acc"),
        *("hmean_acc", "gmean_acc", "ece", "nll", "per_class_acc"),
    }
    assert len(metrics["per_class_acc"]) == 10
    assert metrics["accuracy"] + metrics["error_rate"] == pytest.approx(100)


def test_files_of_the_run(finished: Path) -> None:
    files = [each.relative_to(finished / RUN) for each in (finished / RUN).rglob("*") if each.is_file()]
    assert {each.parts[0] for each in files} == {
        *(".tailtune.lock", "tailtune.json", "config.yaml", "metrics.json", "log.txt", "logits.safetensors"),
        *("checkpoint", "splits", "state", "tensorboard"),
    }
    assert not [each for each in files if each.suffix in (".pt", ".pth", ".pkl", ".bin", ".npy", ".tmp")]
    for path in files:
        start = (finished / RUN / path).read_bytes()[:2]
        assert start not in (b"\x80\x02", b"\x80\x04", b"PK"), f"{path} is a pickle"
    log = (finished / RUN / "log.txt").read_text()
    assert "epoch [2/2]" in log
    assert "run folder" in log


def test_logits(finished: Path) -> None:
    path = finished / RUN / "logits.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        assert len(file.metadata()) == 1
    logits, top = tensors["logits"], tensors["row_max"]
    assert (logits.shape, logits.dtype) == ((100, 1, 10), torch.float16)
    assert (top.shape, top.dtype) == ((100, 1), torch.float32)
    assert bool((logits.amax(-1) == 0).all())
    assert tensors["index"].tolist() == list(range(100))
    hits = (logits.float() + top.unsqueeze(-1)).mean(1).argmax(-1) == tensors["labels"]
    accuracy = json.loads((finished / RUN / "metrics.json").read_text())["test"]["accuracy"]
    assert 100 * float(hits.float().mean()) == pytest.approx(accuracy, abs=1e-4)


def test_checkpoint_holds_what_trains(finished: Path) -> None:
    tensors = load_file(finished / RUN / "checkpoint" / "tensors.safetensors")
    params = json.loads((finished / RUN / "metrics.json").read_text())["params"]
    assert sum(each.numel() for each in tensors.values()) == params["trainable"]
    assert all("head" in name or "tuners" in name for name in tensors)
    facts = json.loads((finished / RUN / "checkpoint" / "facts.json").read_text())
    assert len(facts["class_names"]) == 10
    assert {"config", "base", "packages"} <= facts.keys()


def test_stored_config_loads_again(finished: Path) -> None:
    again = load_resolved(finished / RUN / "config.yaml", declared())
    words = ["pretrained", "none", "num_epochs", "2", "output_dir", "run"]
    (cfg,) = load_configs("fake_lt", "tiny_clip_peft", words, declared())
    assert config_hash(again) == config_hash(resolve(cfg))
    assert again.expand == 12 and cfg.expand is None, "what depends on the backbone is filled in"
    with pytest.raises(AttributeError):
        again.lr = 1.0


def test_tensorboard_tags(finished: Path) -> None:
    events = EventAccumulator(str(finished / RUN / "tensorboard"))
    events.Reload()
    train = "lr loss loss_avg acc acc_avg mean_acc many_acc med_acc few_acc"
    test = "accuracy error_rate macro_f1 worst_case_acc hmean_acc gmean_acc many_acc med_acc few_acc mean_acc ece nll"
    wanted = {f"train/{tag}" for tag in train.split()} | {f"test/{tag}" for tag in test.split()}
    assert wanted <= set(events.Tags()["scalars"])
    assert [each.step for each in events.Scalars("train/loss")] == list(range(1, 11))


# --- another launch in its folder ------------------------------------------------------------------------------------


PASSING = ("log.txt", ".tailtune.lock", "tailtune.json")
"""What another evaluation adds to."""


def contents(folder: Path, *passing: str) -> dict[Path, bytes]:
    files = (each for each in folder.rglob("*") if each.is_file() and each.name not in (*PASSING, *passing))
    return {each: each.read_bytes() for each in files if each.parent.name != "tests"}


def test_same_command_shows_the_stored_result(launch: Cli, run: Path) -> None:
    before = contents(run)
    shutil.rmtree(run / "state")  # were it to train, it would have to start over
    done = launch(SHORT)
    assert done.returncode == 0
    assert "finished before" in done.stdout
    assert "epoch" not in done.stdout
    assert f"{json.loads((run / 'metrics.json').read_text())['test']['accuracy']:.2f}" in done.stdout
    assert contents(run) == {path: each for path, each in before.items() if "state" not in path.parts}


def test_resume_false_starts_over(launch: Cli, run: Path) -> None:
    launch(f"{SHORT} test_only True tte True")
    before = contents(run)
    (run / "notes.txt").write_text("the user's own")
    done = launch(f"{SHORT} resume False lr 0.3")
    assert done.returncode == 0
    assert "epoch [1/2]" in done.stdout
    assert not (run / "tests").exists()
    assert (run / "notes.txt").exists(), "what a run did not write stays where it is"
    aside = {
        path.relative_to("output/run.previous-1"): each
        for path, each in contents(Path("output/run.previous-1")).items()
    }
    assert aside == {path.relative_to(run): each for path, each in before.items()}
    assert yaml.safe_load((run / "config.yaml").read_text())["lr"] == 0.3


def test_test_only(launch: Cli, run: Path) -> None:
    before = contents(run)
    assert launch(f"{SHORT} test_only True tte True").returncode == 0
    folder = run / "tests" / "tte_True"
    assert {each.name for each in folder.iterdir()} == {"metrics.json", "logits.safetensors"}
    assert {path: each for path, each in contents(run).items() if "tests" not in path.parts} == before
    again = launch(f"{SHORT} test_only True tte True")
    assert "finished before" in again.stdout


def test_test_only_is_the_same_evaluation(launch: Cli, run: Path) -> None:
    shutil.move(run / "logits.safetensors", run.parent / "moved")
    assert launch(f"{SHORT} test_only True").returncode == 0
    own, other = (json.loads((folder / "metrics.json").read_text()) for folder in (run, run / "tests" / "default"))
    assert own["test"] == other["test"]


def test_other_evaluation_of_a_finished_run(launch: Cli, run: Path) -> None:
    """Without test_only: nothing trains. Where only the groups change, the saved logits answer."""
    before = (run / "metrics.json").read_bytes()
    done = launch(f"{SHORT} many_above 1000")
    assert done.returncode == 0
    assert "using the logits of output/run/logits.safetensors" in done.stdout
    assert "epoch" not in done.stdout
    own, other = json.loads(before), json.loads((run / "tests" / "many_above_1000" / "metrics.json").read_text())
    assert own["test"]["accuracy"] == pytest.approx(other["test"]["accuracy"])
    assert own["test"]["many_acc"] is not None
    assert other["test"]["many_acc"] is None
    assert (run / "metrics.json").read_bytes() == before
    assert "using the logits" not in launch(f"{SHORT} max_test_images 30").stdout


def test_notes_of_an_evaluation_are_not_those_of_another(launch: Cli, run: Path) -> None:
    assert launch(f"{SHORT} test_only True max_test_images 30 report none").returncode == 0
    part = json.loads(next((run / "tests").glob("max*/metrics.json")).read_text())
    assert "max_test_images 30: not all images" in part["notes"]
    words = f"{FAKE} num_epochs 2 output_dir cut report none"
    assert launch(f"{words} max_test_images 30").returncode == 0
    assert launch(f"{words} test_only True").returncode == 0
    own, whole = (
        json.loads(Path("output/cut", name).read_text()) for name in ("metrics.json", "tests/default/metrics.json")
    )
    assert "max_test_images 30: not all images" in own["notes"] and own["evaluation"]["notes"]
    assert not any("max_test_images" in note for note in whole["notes"])
    assert any("RANDOM weights" in note for note in whole["notes"]), "what is true of every evaluation stays"


def test_a_result_names_the_data_that_were_evaluated(launch: Cli, run: Path) -> None:
    text = (ROOT / "configs" / "data" / "fake_lt.yaml").read_text()
    Path("other.yaml").write_text(text)
    command = SHORT.replace("-d fake_lt", "-d other.yaml").replace("output_dir run", "output_dir other")
    assert launch(f"{command} test_only True model_dir run report none").returncode == 0
    (folder,) = Path("output/other/tests").iterdir()
    assert json.loads((folder / "metrics.json").read_text())["data"] == "other"


def test_test_train(launch: Cli, run: Path) -> None:
    assert launch(f"{SHORT} test_train True").returncode == 0
    assert launch(f"{SHORT} test_train True many_above 10 tte True").returncode == 0
    assert {each.name for each in (run / "tests").iterdir()} == {"train", "train_many_above_10_tte_True"}
    labels = load_file(run / "tests" / "train" / "logits.safetensors")["labels"]
    assert labels.bincount().tolist() == json.loads((run / "metrics.json").read_text())["class_counts"]


def test_model_dir(launch: Cli, run: Path) -> None:
    for name in (RUN, "run"):  # its path, or its name below output/
        assert launch(f"{FAKE} test_only True model_dir {name}").returncode == 0
        (found,) = Path("output/fake_lt_tiny_clip_peft_pretrained_None/tests").glob("of_*")
        result = json.loads((found / "metrics.json").read_text())
        assert result["test"] == json.loads((run / "metrics.json").read_text())["test"]
        assert result["evaluation"]["of"] == str(RUN)
        shutil.rmtree(found)


def test_another_runs_result_is_not_taken_for_its_own(launch: Cli, run: Path) -> None:
    assert launch(f"{SHORT} lr 0 output_dir other").returncode == 0
    assert launch(f"{SHORT} test_only True model_dir output/other").returncode == 0
    done = launch(f"{SHORT} test_only True")
    assert "finished before" not in done.stdout
    own, other = (json.loads((Path("output") / name / "metrics.json").read_text()) for name in ("run", "other"))
    assert own["test"]["nll"] != other["test"]["nll"]
    found = json.loads((RUN / "tests" / "default" / "metrics.json").read_text())
    assert found["test"]["accuracy"] == own["test"]["accuracy"]


def test_another_run_is_evaluated_again_with_other_options(launch: Cli, run: Path) -> None:
    """`scale` changes no tensor, but what is computed with them."""
    words = f"{SHORT.replace('output_dir run', 'output_dir other')} test_only True model_dir run"
    assert launch(words).returncode == 0
    assert "finished before" in launch(words).stdout
    other = launch(f"{words} scale 5")
    assert other.returncode == 0 and "finished before" not in other.stdout
    found = json.loads(Path("output/other/tests/of_run/metrics.json").read_text())
    assert found["test"]["nll"] != json.loads((run / "metrics.json").read_text())["test"]["nll"]


def test_a_retrained_run_is_evaluated_again(launch: Cli, run: Path) -> None:
    assert launch(f"{SHORT} test_only True").returncode == 0
    assert launch(f"{SHORT} resume False lr 0.3").returncode == 0
    assert "finished before" not in launch(f"{SHORT} lr 0.3 test_only True").stdout


def test_a_kill_while_the_marker_was_written_does_not_lock_the_folder(launch: Cli) -> None:
    RUN.mkdir(parents=True)
    (RUN / ".tailtune.json.0123abcd.tmp").write_text('{"for')
    (RUN / ".tailtune.lock").touch()
    done = launch(f"{FAKE} max_steps 1 output_dir run")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", ["", "resume False"])
def test_files_of_others_are_safe(launch: Cli, tmp_path: Path, words: str) -> None:
    precious = tmp_path / "precious" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("years")
    done = launch(f"{FAKE} output_dir {precious.parent} {words}")
    assert (done.returncode, precious.read_text()) == (2, "years")
    assert "holds thesis.txt and no tailtune.json" in done.stderr


def test_any_seed(launch: Cli) -> None:
    assert launch(f"{FAKE} seed 5000000000 max_steps 1").returncode == 0


def test_zero_shot(launch: Cli) -> None:
    assert launch("-d fake_lt -m zstiny_clip pretrained none output_dir run").returncode == 0
    result = json.loads((RUN / "metrics.json").read_text())
    assert (result["train"], result["params"]["trainable"]) == (None, 0)


def test_a_launcher_that_started_one_process_is_named(launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --num_processes 2` without GPUs; its environment, as its simple launcher sets it."""
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")
    done = launch(f"{FAKE} max_steps 1 output_dir run")
    assert done.returncode == 0 and "--multi_gpu" in done.stdout
    assert any("--multi_gpu" in note for note in json.loads((RUN / "metrics.json").read_text())["notes"])


# --- interruption ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_signals_save_a_state(launch: Cli, number: signal.Signals) -> None:
    with signal_after(3, number):
        done = launch(SHORT)
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command continues\n")
    assert [each.name for each in states(RUN)] == ["00000003"]
    done = launch(SHORT)
    assert done.returncode == 0
    assert "resuming after step 3" in done.stdout


def test_a_signal_while_training_that_starts_over(launch: Cli) -> None:
    """The same command would start over once more."""
    with signal_after(3, signal.SIGINT):
        done = launch(SHORT, "resume False")
    assert (done.returncode, done.stderr) == (130, "interrupted; the same command without `resume False` continues\n")
    assert "resuming after step 3" in launch(SHORT).stdout


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("", "; the same command continues"),
        ("resume False", "; the same command without `resume False` continues"),
    ],
)
def test_signal_while_evaluating(words: str, hint: str, launch: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are there already, so nothing is trained twice."""
    with monkeypatch.context() as patch:
        patch.setattr(
            "tailtune.trainers.evaluation.evaluate.infer", lambda *_, **__: signal.raise_signal(signal.SIGTERM)
        )
        done = launch(SHORT, words)
    assert (done.returncode, done.stderr) == (130, f"interrupted{hint}\n")
    assert not (RUN / "metrics.json").exists()
    done = launch(SHORT)
    assert (done.returncode, done.stderr) == (0, "")
    assert "epoch [" not in done.stdout
    assert json.loads((RUN / "metrics.json").read_text())["train"]["steps"] == 10


@pytest.mark.parametrize("words", ["num_epochs 0", "test_only True tte True"])
def test_a_signal_while_evaluating_what_was_not_trained_here(
    words: str, launch: Cli, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command begins again, so nothing is promised."""
    infer = "tailtune.trainers.evaluation.evaluate.infer"
    monkeypatch.setattr(infer, lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    done = launch(SHORT if "test_only" in words else FAKE, words)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_an_unfinished_run_is_evaluated_as_the_last_command_says(launch: Cli) -> None:
    with signal_after(3):
        assert launch(SHORT).returncode == 130
    assert launch(f"{SHORT} max_test_images 20").returncode == 0
    assert "finished before" in launch(f"{SHORT} max_test_images 20").stdout


# --- two stages ------------------------------------------------------------------------------------------------------


TWO = "-d fake_lt -m two pretrained none after.pretrained none after.num_epochs 1 num_epochs 1 num_workers 0"


@pytest.fixture
def two(shipped: Callable[[str, str], None]) -> None:
    text = "backbone: TinyCLIP\nresolution: 32\nprec: fp32\nbatch_size: 32\nafter: tiny_clip\n"
    shipped("model/two", f"# a head first, then everything\n{text}full_tuning: true\n")


def test_second_stage_starts_where_the_first_ended(launch: Cli, two: None) -> None:
    done = launch(f"{TWO} lr 0 output_dir run")
    assert done.returncode == 0, done.stderr
    first, second = (load_file(path / "checkpoint" / "tensors.safetensors") for path in (RUN / "stage1", RUN))
    head = "model.head.weight"
    assert torch.equal(first[head], second[head])  # its own learning rate is 0
    assert len(second) > len(first)
    again = launch(f"{TWO} lr 0 output_dir run")
    assert again.stdout.count("finished before") == 1
    shutil.rmtree(RUN / "stage1")
    again = launch(f"{TWO} lr 0 output_dir run")
    assert "finished before" in again.stdout and "epoch [" not in again.stdout, "the last stage is what was asked for"


def test_a_change_of_the_first_stage_is_another_second_stage(launch: Cli, two: None) -> None:
    one, other = (
        load_configs("fake_lt", "two", [*TWO.split()[4:], "after.lr", value], declared())[-1]
        for value in ("0.1", "0.2")
    )
    assert one.run_name != other.run_name and config_hash(one) != config_hash(other)


def test_a_second_stage_that_would_lose_what_the_first_trained(launch: Cli, two: None) -> None:
    done = launch(f"{TWO} after.lora True output_dir run")
    assert done.returncode == 2 and "tuners.lora" in done.stderr


def test_names_of_stages(launch: Cli, two: None) -> None:
    first, second = load_configs("fake_lt", "two", [*TWO.split()[4:], "seed", "3", "lr", "0.5"], declared())
    assert first.run_name == "fake_lt_tiny_clip_num_epochs_1_pretrained_None_seed_3"
    assert second.run_name.startswith("fake_lt_two_lr_0.5_num_epochs_1_pretrained_None_seed_3_after.")


def test_starting_over_keeps_the_first_stage_that_was_just_trained(launch: Cli, two: None) -> None:
    for words in (f"{TWO} output_dir run", f"{TWO} output_dir run resume False"):
        assert launch(words).returncode == 0
    assert (RUN / "stage1" / "metrics.json").exists()


def test_a_hash_is_of_the_methods_in_use() -> None:
    """So that a run stays itself when the toolkit learns another method."""

    def identity(model: str, *pairs: str) -> str:
        return config_hash(load_configs("fake_lt", model, pairs, declared())[-1])

    assert identity("tiny_clip_sade", "ride.diversity", "3") == identity("tiny_clip_sade")
    assert identity("tiny_clip_sade", "sade.inverse_strength", "3") != identity("tiny_clip_sade")
    wrapped = identity("tiny_clip_batchformer", "ride.diversity", "3")
    assert wrapped != identity("tiny_clip_batchformer"), "the inner method is in use"


def test_a_hash_is_of_what_is_not_a_default() -> None:
    """So that a run stays itself when the toolkit learns another option."""
    cfg = load_configs("fake_lt", "tiny_clip", [], declared())[-1]
    before = cfg.clone()
    before.defrost()
    del before["smooth_head"]
    assert config_hash(before) == config_hash(cfg)
