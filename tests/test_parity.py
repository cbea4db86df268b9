"""docs/parity.json, the figures of `parity/compare.py`, covers all of our tables; and what the command itself does."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small import LIFT_TUNERS

from tailtune.configs import load_configs
from tailtune.models.backbones.prompts import PROMPTS
from tailtune.models.heads.head_init import HEAD_INITS
from tailtune.parity import report
from tailtune.parity.compare import SUBJECTS, main
from tailtune.parity.errors import error, largest_error, number_error
from tailtune.parity.job import Case, Job, Tensors, chosen
from tailtune.trainers.option_schema import declared

PARITY = json.loads((Path(__file__).parent.parent / "docs" / "parity.json").read_text())
CASES: list[dict[str, Any]] = PARITY["cases"]
FIGURES = ("features", "logits", "loss", "gradients", "after_3_steps")
TOLERANCES = {**dict.fromkeys((*FIGURES, "value"), 1e-4), "float64": 1e-5}
OF_LIFT: dict[str, set[str]] = {
    "tuner": set(LIFT_TUNERS),
    "head": {"CosineClassifier", "LinearClassifier", "L2NormedClassifier", "LayerNormedClassifier"},
    "loss": {"CE", "Focal", "LDAM", "CB", "GRW", "BS", "LA", "LADE"},
}
"""Entries that the original has, too."""
DRAWN = {"1_shot", "10_shot", "100_shot", "100_shot_linear_probe"}
"""Head initialisations with images that each side draws with its own random generator."""


def names(kind: str) -> set[str]:
    """Every part of a case's name: `lora + ssf_attn, partial 1` is of lora and of ssf_attn."""
    return {part for case in CASES if case["kind"] == kind for part in case["name"].split(",")[0].split(" + ")}


@pytest.mark.parametrize("kind", OF_LIFT)
def test_every_entry_that_lift_has_is_compared(kind: str) -> None:
    assert OF_LIFT[kind] <= names(kind)
    alone = {case["name"] for case in CASES if case["kind"] == kind}
    assert OF_LIFT[kind] <= alone, "each on its own, not only in combination"


def test_every_head_init_and_prompt_is_compared() -> None:
    assert set(HEAD_INITS) - DRAWN <= names("init") and "zero_shot" in names("init")
    prompts = {case["name"].split(", ")[1] for case in CASES if case["name"].startswith("text_feat, ")}
    assert set(PROMPTS) <= prompts


def test_metrics_schedule_and_sizes_are_compared() -> None:
    assert {"accuracy", "mean_acc", "many_acc", "med_acc", "few_acc", "hmean_acc", "gmean_acc"} <= names("metrics")
    assert {"worst_case_acc", "macro_f1", "ece"} <= names("metrics") and names("schedule")
    assert {"adaptformer", "mask"} <= names("size")


def test_every_error_is_below_the_tolerance() -> None:
    for case in CASES:
        wanted = (*FIGURES, "float64") if case["kind"] in ("tuner", "head", "loss") else ("value",)
        for name in wanted:
            assert 0 <= case[name] <= TOLERANCES[name], (case, name)
        assert all(case[name] is None for name in (*FIGURES, "float64", "value") if name not in wanted), case


def test_it_says_how_to_check_it_again() -> None:
    assert PARITY["tolerance"] == TOLERANCES
    assert PARITY["original"]["repository"].endswith("shijxcs/LIFT") and len(PARITY["original"]["commit"]) == 40
    assert PARITY["ours"] and PARITY["packages"]["torch"] and PARITY["hardware"] and PARITY["procedure"]


# --- experts: RIDE, SADE and BatchFormer -------------------------------------------------------------------------

EXPERTS = PARITY["experts"]
ROWS: list[dict[str, Any]] = EXPERTS["cases"]
TRAINED = ("logits", "loss", "gradients", "after_3_steps", "rates")
METHODS = {
    "ride": {"RIDE", "LDAM-DRW", "RIDE + distillation × E", "expert assignment"},
    "sade": {"SADE"},
    "batchformer": {"BatchFormer", "RIDE + distillation × 1"},
    "balanced": {"BatchFormer"},
}
"""Original → what of it is compared, the first words of a case's name."""


def test_experts_agree_in_fp64() -> None:
    for case in ROWS:
        if case["name"].startswith("test_training"):
            wanted = {"value"}
        elif case["name"].startswith("learning rates"):
            wanted = {"rates"}
        else:
            wanted = {*TRAINED, *(["value"] if case["name"] == "expert assignment" else [])}
        assert all(0 <= case[name] <= 1e-8 for name in wanted), case
        assert all(case[name] is None for name in (*TRAINED, "value") if name not in wanted), case


def test_all_methods_of_experts_are_compared() -> None:
    for repository, methods in METHODS.items():
        compared = {case["name"].split(",")[0] for case in ROWS if case["repository"] == repository}
        assert methods <= compared
    names = {case["name"] for case in ROWS}
    for factor in (-0.45, -0.2, 0.0):
        assert {f"RIDE, diversity factor {factor}, {when}" for when in ("before reweighting", "reweighted")} <= names
    assert {f"BatchFormer, add_bt {mode}" for mode in (1, 33)} <= names
    assert {f"test_training_{data}.py" for data in ("cifar", "imagenet", "places", "inat")} <= names
    networks = {case["model"].split("_")[0] for case in ROWS if case["logits"] is not None}
    assert {"resnet32", "resnet10", "resnet50"} <= networks
    rates = {case["model"] for case in ROWS if case["name"].startswith("learning rates")}
    assert len(rates) >= 16 and "resnet152_sade" in rates


def test_the_experts_part_says_how_to_check_it_again() -> None:
    assert {len(source["commit"]) for source in EXPERTS["originals"].values()} == {40}
    assert EXPERTS["tolerance"] == 1e-8 and EXPERTS["patches"] and EXPERTS["procedure"] and EXPERTS["ours"]


# --- DirMixE -----------------------------------------------------------------------------------------------------

DIRMIXE = PARITY["dirmixe"]
DATA = ("cifar10_ir100", "cifar100_ir100", "imagenet_lt", "inat2018")
COMPARED: dict[str, set[str]] = {
    "pool": {"value"},
    "pool of classes without ties": {"value"},
    "epochs with semi-variance": {"value"},
    "Dirichlet test sets": {"value"},
    **{f"loss of logits, {when}": {"loss", "gradients"} for when in ("warm", "final")},
    **{f"DirMixE, {when}": set(TRAINED) for when in ("warm", "final")},
}
"""Name of a case → its figures; of learning rates `rates`."""


def test_dirmixe_agrees() -> None:
    for case in DIRMIXE["cases"]:
        wanted = COMPARED.get(case["name"], {"rates"})
        assert all(0 <= case[name] <= 1e-8 for name in wanted), case
        assert all(case[name] is None for name in (*TRAINED, "value") if name not in wanted), case
        assert "value" not in wanted or case["value"] == 0, "what is drawn is the same, not only near"


def test_all_of_dirmixe_is_compared() -> None:
    compared = {(case["data"], case["name"]) for case in DIRMIXE["cases"]}
    everywhere = [name for name in COMPARED if name.startswith(("Dirichlet", "loss", "DirMixE"))]
    assert {(data, name) for data in DATA for name in everywhere} <= compared
    assert {("cifar10_ir100", "pool"), ("cifar100_ir100", "pool")} <= compared
    assert {name for _, name in compared} - set(COMPARED) == {f"learning rates of {n} epochs" for n in (200, 180, 100)}
    assert len(DIRMIXE["originals"]["dirmixe"]["commit"]) == 40 and DIRMIXE["tolerance"] == 1e-8
    assert DIRMIXE["patches"] and DIRMIXE["procedure"] and DIRMIXE["ours"]


# --- H2T ---------------------------------------------------------------------------------------------------------

H2T = PARITY["h2t"]
STAGES = {"stage 1", "stage 2"} | {
    f"stage 2, share {share}, batch norms {mode}" for share in (0, 0.25, 0.3, 1) for mode in ("shift", "are held")
}
OF_LOGITS = {"CE", "CE, reweighted", "LDAM", "LDAM, reweighted", "label-aware smoothing", "ResLT"} | {
    f"RIDE, diversity factor {factor}{end}" for factor in (-0.45, -0.2, 0.0) for end in ("", ", reweighted")
}
TAILS = {f"{name}_ir{ratio}" for name in ("cifar10", "cifar100") for ratio in (10, 50, 100, 200)}
EXACT = ("channels", "images of the long tail")
"""Beginnings of names: what is chosen is the same, not only near."""


def test_h2t_agrees() -> None:
    for case in H2T["cases"]:
        wanted = {"value"}
        if case["name"].startswith("stage"):
            wanted = {*TRAINED, "value"}
        elif case["name"].startswith("loss of logits"):
            wanted = {"loss", "gradients"}
        elif case["name"].startswith("learning rates"):
            wanted = {"rates", "value"}
        assert all(0 <= case[name] <= 1e-9 for name in wanted), case
        assert all(case[name] is None for name in (*TRAINED, "value") if name not in wanted), case
        assert not case["name"].startswith(EXACT) or case["value"] == 0, case


def test_all_of_h2t_is_compared() -> None:
    compared = {(case["data"], case["name"]) for case in H2T["cases"]}
    assert {("cifar100_ir100", name) for name in STAGES} <= compared
    of_logits = {
        (data, f"loss of logits, {name}") for data in ("cifar10_ir100", "cifar100_ir100") for name in OF_LOGITS
    }
    assert of_logits <= compared
    configs = {
        (f"cifar100_ir{ratio}", model) for ratio in (50, 100, 200) for model in ("resnet32_mixup", "resnet32_h2t")
    }
    rates = {(case["data"], case["model"]) for case in H2T["cases"] if case["name"].startswith("learning rates")}
    assert rates == configs <= {(case["data"], case["model"]) for case in H2T["cases"] if case["name"] in STAGES}
    tails = ("images of the long tail", "pair_sampler reverse", "pair_sampler shuffle")
    assert {(data, name) for data in TAILS for name in tails} <= compared
    assert {"test figures", "channels of 64, experts: 1", "channels of 48, experts: 3"} <= {
        name for _, name in compared
    }
    assert len(H2T["originals"]["h2t"]["commit"]) == 40 and H2T["tolerance"] == 1e-9
    assert H2T["patches"] and H2T["procedure"] and H2T["ours"]


# --- Focal-SAM ---------------------------------------------------------------------------------------------------


def test_focal_sam_agrees() -> None:
    part = PARITY["focal_sam"]
    assert {case["data"] for case in part["cases"]} == {"cifar10_ir100", "cifar100_ir100"} and len(part["cases"]) == 6
    assert all(0 <= case["after_3_steps"] <= 1e-6 for case in part["cases"])
    assert len(part["originals"]["focal_sam"]["commit"]) == 40 and part["patches"]


# --- BalPoE and LGLA ---------------------------------------------------------------------------------------------

BALPOE = PARITY["balpoe"]


def test_balpoe_and_lgla_agree() -> None:
    for case in BALPOE["cases"]:
        wanted = {"BalPoE": set(TRAINED), "loss of logits": {"loss", "gradients"}}.get(case["name"].split(",")[0])
        wanted = wanted or ({"rates"} if case["name"].startswith("learning rates") else {"value"})
        assert all(0 <= case[name] <= 1e-8 for name in wanted), case
        assert all(case[name] is None for name in (*TRAINED, "value") if name not in wanted), case
        assert case["name"] != "RandAugment" or case["value"] == 0, "the same pixels"


def test_all_of_balpoe_and_lgla_is_compared() -> None:
    compared = {(case["data"], case["name"]) for case in BALPOE["cases"]}
    names = {name for _, name in compared}
    assert {"BalPoE", "BalPoE, mixup, 7 experts", "evenly spaced strengths", "RandAugment"} <= names
    assert {(data, "BalPoE, mixup") for data in ("cifar10_ir100", "cifar100_ir100", "imagenet_lt")} <= compared
    assert {(data, "loss of logits, 3 experts") for data in DATA} <= compared
    rates = {case["model"] for case in BALPOE["cases"] if case["name"].startswith("learning rates")}
    models = {f"{net}_balpoe{end}" for net in ("resnet32", "resnet50", "resnext50") for end in ("", "_long")}
    assert models | {"resnext50_lgla"} == rates
    assert {len(source["commit"]) for source in BALPOE["originals"].values()} == {40} and BALPOE["tolerance"] == 1e-8
    assert BALPOE["patches"] and BALPOE["procedure"] and BALPOE["ours"]


# --- the command -------------------------------------------------------------------------------------------------

SEVERAL_ROWS = {"metrics", "long tail"}
"""Names of cases that have several rows, with names of their own."""


def checkouts(subject: str) -> dict[str, Path]:
    return dict.fromkeys(SUBJECTS[subject].sources, Path("/somewhere"))


def part_of(subject: str) -> dict[str, Any]:
    part: dict[str, Any] = PARITY if subject == report.TOP else PARITY[subject]
    return part


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_stored_report_is_of_these_cases(subject: str) -> None:
    part, about = part_of(subject), SUBJECTS[subject]
    cases, _ = about.ask(checkouts(subject))
    assert cases.keys() == about.comparisons.keys()
    listed = [case for kind in cases for case in cases[kind] if case["name"] not in SEVERAL_ROWS]
    rows = [{key: row.get(key) for key in ("name", "backbone", "model", "data")} for row in part["cases"]]
    for case in listed:
        facts = {key: case[key] for key in ("name", "backbone", "model", "data") if case.get(key)}
        assert any(facts.items() <= row.items() for row in rows), facts
    assert part["procedure"] == about.procedure and part["tolerance"] == about.tolerance
    assert part.get("patches", []) == list(about.patches)
    assert not any(map(about.above, part["cases"]))


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_case_keeps_its_number_without_the_others(subject: str) -> None:
    """The number is the random seed, so its figures are those that it has among all cases."""
    cases, _ = SUBJECTS[subject].ask(checkouts(subject))
    every = chosen(cases, "")
    files = [case["file"] for kind in every for case in every[kind]]
    assert len(files) == len(set(files))
    kind = list(cases)[0]
    last = every[kind][-1]
    assert last in chosen(cases, last["name"])[kind]
    json.dumps(every)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_our_options_of_a_case_are_known(subject: str) -> None:
    cases, schema = SUBJECTS[subject].ask(checkouts(subject))[0], declared()
    for case in (case for kind in cases for case in cases[kind]):
        data, model = case.get("data") or "fake_lt", case.get("model") or "tiny_clip"
        options = {"pretrained": "none", **case.get("options", {}), **case.get("our_options", {})}
        load_configs(data, model, [str(word) for pair in options.items() for word in pair], schema)


def test_a_report_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    rows = [{"name": "a", "value": 1.23456e-9}, {"name": "b", "value": None}]
    report.write({"tolerance": 1.0, "cases": rows}, "h2t", path)
    report.write({"original": {"commit": "c"}, "cases": []}, report.TOP, path)
    assert json.loads(path.read_text()) == {
        "original": {"commit": "c"},
        "cases": [],
        "h2t": {"tolerance": 1.0, "cases": [{"name": "a", "value": 1.2e-9}, {"name": "b", "value": None}]},
    }
    assert report.formatted(PARITY) == report.PARITY.read_text(), "the stored file is as it would be written"


def test_errors_are_relative_and_other_shapes_are_infinite() -> None:
    two = torch.tensor([3.0, 4.0])
    assert error(two + 0.5, two) == pytest.approx(0.5**0.5 / 5)
    assert error(two + 0.5, two, floor=10.0) == pytest.approx(0.5**0.5 / 10)
    assert error(two[:1], two) == math.inf
    assert error(two, 0 * two) == math.inf and error(0 * two, 0 * two) == 0
    assert largest_error({"a": two}, {"a": two, "b": two}) == math.inf, "a tensor is missing"
    assert largest_error({"a": two, "b": two / 100}, {"a": two, "b": 0 * two}, floor=0.1) == pytest.approx(0.1)
    assert number_error(1.1, 1.0) == pytest.approx(0.1) and number_error(0.0, 0.0) == 0


def test_an_original_answers_in_files_and_does_not_repeat_an_answer(tmp_path: Path) -> None:
    cases = chosen({"a": [{"name": "x", "repository": "one"}, {"name": "y", "repository": "two"}]}, "")
    asked = Job(tmp_path, cases, {"counts": [2, 1]}, {"images": torch.zeros(2)})
    asked.write()
    calls: list[str] = []

    def answer(case: Case, job: Job) -> Tensors:
        calls.append(case["name"])
        return {"sum": job.inputs["images"].sum() + job.settings["counts"][0], "drawn": torch.rand(1)}

    for part in ("one", "two", "one"):
        original = Job.read(tmp_path, part)
        original.answer("a", answer, seed=5)
        original.write_facts(part, {"a": lambda case, _: case["name"] * 2})
    assert calls == ["x", "y"]
    torch.manual_seed(5 + 1)
    assert asked.tensors(cases["a"][1])["drawn"] == torch.rand(1)
    assert [asked.fact("a", case) for case in cases["a"]] == ["xx", "yy"]

    changed = {"a": [{**cases["a"][0], "note": "changed"}]}
    Job(tmp_path, changed, {"counts": [2, 1]}, {"images": torch.zeros(2)}).write()
    Job.read(tmp_path, "one").answer("a", answer)
    assert calls == ["x", "y", "x"], "the file is of another case"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("lift {tmp}/none", "git clone https://github.com/shijxcs/LIFT"),
        ("lift {tmp}", "--commits"),
        ("lift {tmp} --only no_such_case", "no_such_case"),
        ("other {tmp}", "--help"),
        ("experts {tmp}", "--help"),
    ],
)
def test_bad_input_is_one_line(
    words: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert main(words.format(tmp=tmp_path).split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and part in printed
