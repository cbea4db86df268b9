"""Every command line of LIFT+'s scripts: generated, translated, and every option at work.

The digests are of the original's lines (shijxcs/LIFT-plus, commit ea555ea), sorted, without comments and surplus
spaces.
"""

import hashlib
from functools import cache

import pytest
from conftest import Cli
from yacs.config import CfgNode

from tailtune.configs.errors import UserError
from tailtune.configs.lift_plus_words import METHODS, OF_TOWER, translated
from tailtune.configs.schema import schema_of
from tailtune.models import build_model
from tailtune.scripts import _grid
from tailtune.trainers.config_checks import check

ORIGINAL = {
    "main": (22, "41bf01a4c55db5fb"),
    "ablation": (10, "62b61b228ac9f259"),
    "ft_methods": (18, "8cb5fe94287fb4bf"),
    "mda_func": (15, "7a8c8de662665de7"),
    "init_methods": (8, "6b00f0fb29dfa619"),
    "losses": (21, "0adde97cdebae6cc"),
    "classifiers": (21, "89f39dc0161d727f"),
    "bottle_dim": (29, "2a351b88c375e37f"),
    "epochs": (44, "a32be6e3d867cd25"),
    "partial": (126, "6f915009ed39e861"),
    "aft_ratio": (120, "d1bae8e23abf4ad5"),
    "expand": (78, "648bef3c504f8bfe"),
    "backbones": (12, "9f2654a30e288fcd"),
    "zsclip": (12, "1284f27ebb2e7b53"),
}
"""Grid → number of lines of the original's script, and the start of their SHA-256."""


@cache
def lines(name: str) -> list[tuple[str, ...]]:
    return [cell.words for cell in _grid.read(f"lift_plus/{name}").cells]


def test_all_scripts_of_the_original_are_here() -> None:
    assert {name for name in _grid.names() if name.startswith("lift_plus/")} == {
        f"lift_plus/{each}" for each in ORIGINAL
    }
    assert sum(number for number, _ in ORIGINAL.values()) == 536


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_grid_generates_the_lines_of_the_original(name: str) -> None:
    commands = sorted(" ".join(("python main.py", *words)) for words in lines(name))
    assert (len(commands), hashlib.sha256("\n".join(commands).encode()).hexdigest()[:16]) == ORIGINAL[name]


ON = {"fft": "full_tuning", "bitfit": "bias_tuning", "pt": "vpt_deep", "ssf": "ssf_attn"}
HEADS = {"L2NormClassifier": "L2NormedClassifier"}
INITS = {"semantic": "text_feat", "class_mean": "100_shot", "linear_probing": "100_shot_linear_probe", "None": None}


def check_option(key: str, text: str, cfg: CfgNode, given: dict[str, str]) -> None:
    """An option of a line has its effect in the config."""
    schema = schema_of(cfg)
    if key in ("tte_expand", "expand"):
        assert (cfg.expand if cfg.tte else cfg.crop_margin) == int(text)
    elif key == "accum_step":
        assert cfg.micro_batch_size == 128 // int(text)
    elif key == "mda":
        assert cfg.augment == ("mda" if text == "True" else "lift")
    elif key == "classifier":
        assert cfg.classifier == HEADS.get(text, text)
    elif key == "classifier_init":
        assert cfg.init_head == INITS[text]
    elif key == "classifier_scale":
        assert cfg.scale == float(text)
    elif key == "v.adaptformer_dim":
        assert cfg.adapter_dim == int(text)
    elif key.startswith("v."):
        name = key[2:].removesuffix("_layers")
        name = ON.get(name, name) + ("_layers" if key.endswith("_layers") else "")
        assert cfg[name] == schema[name].parse(text)
    else:
        assert cfg[key] == schema[key].parse(text)


@pytest.mark.parametrize("name", ORIGINAL)
def test_every_option_of_a_line_is_in_the_config(name: str) -> None:
    for words in lines(name):
        cfg, method = _grid.config(words), words[5]
        given = dict(zip(words[6::2], words[7::2], strict=True))
        for key, text in given.items():
            check_option(key, text, cfg, given)
        epochs = {"lift": 10}.get(method, 5) if "num_epochs" not in given else int(given["num_epochs"])
        assert (cfg.num_epochs, cfg.interpolation, cfg.zero_shot) == (epochs, "bicubic", method == "zs"), words
        if "lr" not in given:
            assert cfg.lr == (0.01 if method == "lift" else 0.02)
        if "mda" not in given:
            assert cfg.augment == ("lift" if method == "lift" else "mda")
        tuned = {"lift", "lift+"} & {method} and "v.adaptformer" not in given
        assert cfg.adaptformer == (bool(tuned) or given.get("v.adaptformer") == "True"), words
        assert (cfg.full_tuning, cfg.aft) == (method == "fft", method == "aft")


@pytest.mark.parametrize("name", ORIGINAL)
def test_lines_that_differ_are_different_runs_or_evaluations(name: str) -> None:
    found = {(cfg.run_name, cfg.test_key) for cfg in map(_grid.config, lines(name))}
    assert len(found) == len(lines(name))


def test_the_lines_of_every_script_pass_the_checks() -> None:
    """One line of each backbone, method and set of options; the tests above go through all."""
    kinds: dict[object, tuple[str, ...]] = {}
    for name in ORIGINAL:
        for words in lines(name):
            kinds.setdefault((words[3], words[5], words[6::2]), words)
    for words in kinds.values():
        check(_grid.config(words))


COUNTS = {
    "imagenet_lt -b clip_vit_b16 -m lift+": (617_868, 768_000),
    "places_lt -b in21k_vit_b16 -m lift+": (175_212, 280_320),
    "places_lt -b clip_vit_b16 -m lp": (0, 280_320),
    "places_lt -b clip_vit_b16 -m lp v.lora True v.pt True": (294_912, 280_320),
    "imagenet_lt -b clip_vit_b16 -m lift+ v.adaptformer_layers range(3)": (3 * (1537 * 128 + 2305), 768_000),
    "places_lt -b clip_vit_b16 -m aft": (280_284, 280_320),
    "places_lt -b clip_vit_b16 -m aft v.aft_loc mlp": (280_296, 280_320),
    "places_lt -b clip_vit_b16 -m fft v.fft_layers [0,11]": (2 * 7_087_872, 280_320),
    "places_lt -b clip_vit_b16 -m lp v.ssf True": (165_888, 280_320),
    "places_lt -b clip_rn50 -m fft": (23_498_496, 373_760),
    "places_lt -b clip_rn50 -m lp v.bitfit True": (26_496, 373_760),
    "places_lt -b clip_rn50 -m lp v.ssf True": (2_048, 373_760),
    "places_lt -b in1k_rn152 -m lp v.bitfit True": (75_648, 747_520),
    "places_lt -b clip_vit_b16 -m lift+ classifier LinearClassifier": (175_212, 280_685),
    "places_lt -b clip_vit_b16 -m coop": (2_048, 0),
    "places_lt -b clip_vit_l14 -m coop": (3_072, 0),
    "places_lt -b clip_rn50 -m coop": (2_048, 0),
    "places_lt -b clip_vit_b16 -m coop coop_ctx_len 16 coop_cls_pos middle l.lora True": (16 * 512 + 98_304, 0),
    "places_lt -b clip_vit_b16 -m lift+ classifier None": (175_212, 0),
    "places_lt -b clip_vit_b16 -m lift+ classifier None l.adaptformer True": (175_212 + 67_644, 0),
    "places_lt -b clip_vit_b16 -m lp classifier None l.adapter True": (67_632, 0),
    "places_lt -b clip_vit_l14 -m lp classifier None l.lora True": (147_456, 0),
    "places_lt -b clip_vit_b16 -m lp classifier None l.pt True": (12_288, 0),
    "places_lt -b clip_vit_b16 -m lp classifier None l.ssf True": (110_592, 0),
    "places_lt -b clip_vit_b16 -m lp classifier None l.bitfit True": (67_584, 0),
    "places_lt -b clip_vit_b16 -m lp classifier None l.fft True": (37_828_608, 0),
    "places_lt -b clip_vit_b16 -m lp classifier None l.fft True l.fft_layers range(3)": (37_828_608 // 4, 0),
    "places_lt -b clip_vit_b16 -m lp classifier None clip_adapter True": (11_272 // 2, 11_272 // 2),
    "places_lt -b clip_vit_b16 -m lp classifier None proj_tuning True": (655_360, 0),
    "places_lt -b clip_vit_l14 -m lp classifier None l.adapter True": (101_424, 0),
    "places_lt -b clip_vit_l14 -m lp classifier None l.adaptformer True": (101_436, 0),
    "places_lt -b clip_vit_l14 -m lp classifier None l.pt True": (18_432, 0),
    "places_lt -b clip_vit_l14 -m lp classifier None l.ssf True": (165_888, 0),
    "places_lt -b clip_vit_l14 -m lp classifier None l.bitfit True": (101_376, 0),
    "places_lt -b clip_vit_l14 -m lp classifier None l.fft True": (85_054_464, 0),
    "places_lt -b clip_vit_l14 -m lp classifier None clip_adapter True": (16_904 // 2, 16_904 // 2),
    "places_lt -b clip_vit_l14 -m lp classifier None proj_tuning True": (1_376_256, 0),
    "cifar100_ir100 -b clip_vit_b16 -m lp classifier LinearClassifier": (0, 76_900),
    "imagenet_lt -b clip_vit_b16 -m lp classifier L2NormClassifier": (0, 768_000),
    "inat2018 -b clip_vit_b16 -m lp classifier LinearClassifier": (0, 6_261_198),
    "inat2018 -b clip_vit_b16 -m lp classifier LayerNormClassifier": (0, 6_253_056),
}
"""Line → learned parameters of tuner and head, as the original counts them (successors.md §2.6)."""


@pytest.mark.parametrize("line", COUNTS)
def test_parameters_of_a_line(line: str) -> None:
    counts = check(_grid.config(f"-d {line} pretrained none".split())).counts()
    assert (counts["tuner"], counts["head"]) == COUNTS[line]


WITHOUT = "LIFT\\+ trains text without a classifier only; add 'classifier None'"
REFUSED = {
    "clip_vit_b16 coop classifier CosineClassifier": f"coop True: {WITHOUT}",
    "clip_vit_b16 lift+ l.lora True": f"l.lora True: {WITHOUT}",
    "clip_vit_b16 lift+ clip_adapter True proj_tuning True": f"proj_tuning True, clip_adapter True: {WITHOUT}",
    "clip_vit_b16 zs l.lora True": "l.lora True: zero_shot True trains nothing",
    "clip_vit_b16 lift+ clip_adapter residual": "clip_adapter must be True or False, not 'residual'",
    "clip_vit_b16 coop coop_init photo": "coop_init photo ends LIFT\\+ with an error; leave it out",
    "clip_vit_b16 coop coop_ctx_len None": "coop_ctx_len None: there is no rule for this size here",
    "clip_vit_b16 coop l.lora True l.lora_dim None": "l.lora_dim None: there is no rule for this size here",
    "clip_vit_b16 coop l.lora True l.lora_layers half": "l.lora_layers must be .*, not 'half'",
    "clip_vit_b16 lift+ v.lora Yes": "v.lora must be True or False, not 'Yes'",
    "clip_vit_b16 lift+ v.lorra True": "unknown option of LIFT\\+ 'v.lorra'; did you mean 'v.lora'",
    "clip_vit_b16 lift+ l.rank 2": "unknown option of LIFT\\+ 'l.rank'",
    "clip_vit_b16 lift+ classifier Cosine": "unknown value of classifier 'Cosine'",
    "clip_vit_b16 lift+ accum_step 3": "accum_step 3 must be a whole number that divides batch_size 128",
    "clip_vit_b16 lift+ accum_step 0": "accum_step 0 must be a whole number",
    "clip_vit_b16 lift+ v.lora True v.lora_dim 8": "all tuners have one adapter_dim here",
    "clip_rn50 fft v.fft_layers 3": "v.fft_layers has no effect on a residual network in LIFT\\+",
    "clip_vit_b17 lift+": "unknown backbone of LIFT\\+ \\(-b\\) 'clip_vit_b17'; did you mean 'clip_vit_b16'",
    "clip_vit_b16 lift++": "unknown method of LIFT\\+ \\(-m\\) 'lift\\+\\+'; did you mean 'lift\\+'",
    "clip_vit_b16 lift+ tte": "'tte' has no value",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused_says_why(line: str) -> None:
    backbone, method, *pairs = line.split()
    with pytest.raises(UserError, match=REFUSED[line]):
        translated(backbone, method, pairs)


TEXT = "classifier TextClassifier"
CONTEXT = "context coop context_len 8 context_position end"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("lift+", ""),
        ("lift+ l.lora False l.pt_len 2 coop False coop_ctx_len 4 clip_adapter False", ""),
        ("lift+ lr 0.1 lr=0.3", "lr 0.3"),
        ("lift+ expand None accum_step 1", ""),
        ("lift+ prec_train fp32 prec_test fp16", "prec fp32 test_prec fp32"),
        ("lift+ mean (0.1,0.2,0.3)", "pixel_mean [0.1,0.2,0.3]"),
        ("lift+ v.lora True v.lora_dim 8 v.adaptformer_dim 8", "lora True adapter_dim 8"),
        ("lp v.lora_dim 8 v.lora False", "adaptformer False"),
        ("lp pretrained none resume False", "adaptformer False pretrained none resume False"),
        ("zs classifier None", "adaptformer False zero_shot True"),
        ("lift+ classifier None", "classifier TextClassifier"),
        (
            "coop",
            "adaptformer False classifier TextClassifier context coop context_len 4 context_position end num_epochs 50 "
            "batch_size 32 lr 0.002 augment lift",
        ),
        ("lift+ coop True classifier None coop_ctx_len 8 coop_init None", f"{TEXT} {CONTEXT}"),
        (
            "lift+ classifier None l.pt True l.pt_layers [0]",
            f"{TEXT} text_vpt_deep True text_partial [0,1] text_vpt_len 2",
        ),
        ("lift+ classifier None l.pt True l.pt_layers deep l.pt_len 5", f"{TEXT} text_vpt_deep True text_vpt_len 5"),
        (
            "lift+ classifier None l.ssf True l.fft True l.ssf_layers range(3) l.fft_layers [2,0,1]",
            f"{TEXT} text_full_tuning True text_ssf_attn True text_ssf_mlp True text_partial [0,3]",
        ),
        (
            "lift+ classifier None l.adapter True l.adapter_dim 8 l.adapter_layers 6 l.lora_dim 2",
            f"{TEXT} text_adapter True adapter_init uniform text_adapter_dim 8 text_partial 6",
        ),
        (
            "lift+ classifier None proj_tuning True clip_adapter True",
            f"{TEXT} projection_tuning True clip_adapter residual clip_adapter_dim 4",
        ),
        (
            "lift+ classifier None coop_ctx_len 8 clip_adapter_dim 2 l.pt_len 3 text_clip_lora True",
            f"{TEXT} text_clip_lora True",
        ),
        ("lp v.ssf True", "adaptformer False ssf_attn True ssf_mlp True"),
        (
            "lp v.ssf True v.ssf_layers 3",
            "adaptformer False ssf_attn True ssf_mlp True ssf_mlp_layers 3 ssf_attn_layers 3",
        ),
    ],
)
def test_words_of_a_line(line: str, words: str) -> None:
    method, *pairs = line.split()
    assert translated("clip_vit_b16", method, pairs) == ("clip_vit_b16_lift_plus", words.split())


def test_a_line_of_ours_stays_as_it_is() -> None:
    assert translated(None, "clip_vit_b16_peft", ["lr", "0.1"]) == ("clip_vit_b16_peft", ["lr", "0.1"])


def test_every_option_of_both_towers_is_known() -> None:
    tuners = ("fft", "bitfit", "pt", "lora", "adapter", "adaptformer", "ssf", "aft")
    others = {f"{tuner}_layers" for tuner in tuners} | {"pt_len", "lora_dim", "adapter_dim", "adaptformer_dim"}
    assert set(OF_TOWER) == {*tuners, *others, "aft_ratio", "aft_loc", "aft_seed"} and len(METHODS) == 7


def test_adaptformer_on_a_residual_network_is_refused() -> None:
    with pytest.raises(UserError, match="adaptformer acts inside the blocks of a ViT"):
        check(_grid.config(["-d", "places_lt", "-b", "clip_rn50", "-m", "lift+", "pretrained", "none"]))


def test_the_command_line_takes_a_line(launch: Cli) -> None:
    done = launch("-d fake_lt -b tiny_clip -m lift+ num_epochs 1 max_test_images 20 pretrained none v.lora True")
    assert done.returncode == 0, done.stderr
    assert "tiny_clip_lift_plus" in done.stdout
    again = launch("-d fake_lt -m tiny_clip_lift_plus num_epochs 1 max_test_images 20 pretrained none lora True")
    assert again.returncode == 0 and "finished before" in again.stdout, "the same run"
    wrong = launch("-d fake_lt -b tiny_clip -m lift+ l.pt True")
    assert wrong.returncode == 2 and wrong.stderr == (
        "error: l.pt True: LIFT+ trains text without a classifier only; add 'classifier None', or leave this out\n"
    )


def test_the_command_line_trains_text(launch: Cli) -> None:
    done = launch("-d fake_lt -b tiny_clip -m coop num_epochs 1 max_test_images 20 pretrained none l.pt True")
    assert done.returncode == 0, done.stderr


def test_text_tuners_start_as_in_lift_plus() -> None:
    """W_down of adapters from U(-1/√D, 1/√D), which no draw leaves, and not from a normal distribution."""
    line = "-d fake_lt -b tiny_clip -m lp classifier None pretrained none l.adaptformer True clip_adapter True"
    model = build_model(_grid.config(line.split()), ["cat"] * 3)
    weights = {name: each for name, each in model.named_parameters() if "down_proj.weight" in name}
    assert len(weights) == 2 + model.text.depth
    for name, each in weights.items():
        bound = each.shape[1] ** -0.5
        assert 0.9 * bound < float(each.detach().abs().max()) <= bound, name
