"""The parts `lift_plus` and `text` of docs/parity.json: what is compared, and how near it is."""

import json
from pathlib import Path
from typing import Any

from tailtune.configs.lift_plus_words import TUNERS
from tailtune.datasets.images.growing_crop import AREA_SCHEDULES
from tailtune.parity.lift_plus.cases import HEADS, INITS, LOSSES, OF_RESNET, SIDES

PARITY = json.loads((Path(__file__).parent.parent / "docs" / "parity.json").read_text())
PLUS, TEXT = PARITY["lift_plus"], PARITY["text"]
TRAINED = {"logits", "loss", "gradients", "after_3_steps", "float64"}
IN_FP32, IN_FP64 = 1e-5, 1e-9


def near(case: dict[str, Any], wanted: set[str]) -> bool:
    """Whether a row has these figures, and they are below the tolerance. The weights of CB are fp32 on both sides."""
    in_fp64 = 1e-6 if case["name"] == "CB" else IN_FP64
    figures = {name: case[name] for name in (*TRAINED, "features", "value") if name in case}
    is_near = all(0 <= figures[name] <= (in_fp64 if name == "float64" else IN_FP32) for name in wanted)
    return is_near and all(value is None for name, value in figures.items() if name not in wanted)


def of_kind(kind: str, backbone: str = "CLIP-ViT-small") -> set[str]:
    return {case["name"] for case in PLUS["cases"] if (case["kind"], case["backbone"]) == (kind, backbone)}


def test_lift_plus_agrees() -> None:
    for case in PLUS["cases"]:
        wanted = {"tuner": TRAINED | {"features"}, "text": TRAINED}.get(case["kind"], {"value"})
        wanted = TRAINED | {"features"} if case["kind"] in ("head", "loss") else wanted
        assert near(case, wanted), case
        assert case["kind"] not in ("pictures", "size") or case["value"] == 0, "the same pixels and numbers"


def test_all_of_lift_plus_is_compared() -> None:
    _, resnet, _, timm_resnet = SIDES
    assert set().union(*INITS.values()) == {"semantic", "class_mean", "linear_probing"}
    for backbone in SIDES:
        tuners = set(OF_RESNET if backbone in (resnet, timm_resnet) else TUNERS)
        assert {*tuners, "none"} <= of_kind("tuner", backbone)
        assert set(INITS[backbone]) == of_kind("init", backbone)
    assert {f"{tuner}, layers 1" for tuner in TUNERS} <= of_kind("tuner")
    assert set(HEADS) <= of_kind("head") and set(LOSSES) == of_kind("loss")
    towers = {*TUNERS, *(f"{tuner}, layer 1" for tuner in TUNERS), "clip_adapter", "proj_tuning"}
    assert towers <= of_kind("text")
    assert {name.split(", ")[1] for name in of_kind("text") if name.startswith("coop, ")} == {"end", "middle", "front"}
    assert {f"mda, {schedule}" for schedule in AREA_SCHEDULES} <= of_kind("pictures")
    sizes = {f"{tuner}, layers {layers}" for tuner in ("pt", "lora", "adapter", "aft") for layers in ("None", "1")}
    assert sizes <= of_kind("size")


def test_coop_maple_and_clip_lora_agree() -> None:
    assert all(near(case, TRAINED) for case in TEXT["cases"])
    compared = {(case["repository"], case["name"]) for case in TEXT["cases"]}
    places = ("end", "middle", "front")
    assert {("coop", f"4 contexts, {place}{end}") for place in places for end in ("", ", of each class")} <= compared
    assert {("coop", "from words"), ("maple", "2 contexts in 3 blocks, from words")} <= compared
    positions = ("all", "bottom", "mid", "up", "half-up", "half-bottom", "top3")
    assert {("clip_lora", f"position {position}") for position in positions} <= compared
    assert {("clip_lora", f"encoder {encoder}") for encoder in ("text", "vision")} <= compared
    assert {("clip_lora", name) for name in ("rank 4, scale 3", "of q, k, v, o", "without dropout")} <= compared


def test_both_parts_say_how_to_check_them_again() -> None:
    for part, number in ((PLUS, 2), (TEXT, 4)):
        commits = [source["commit"] for source in part["originals"].values()]
        assert len(commits) == number and {len(commit) for commit in commits} == {40}
        assert part["patches"] and part["procedure"] and part["ours"]
