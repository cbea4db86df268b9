"""The options of evaluations, a part of the table in schema.py."""

from collections.abc import Mapping
from types import MappingProxyType

from tailtune.configs.key import TEST, Key
from tailtune.configs.value_parsers import (
    as_bool,
    as_factors,
    as_float,
    as_int,
    as_ints,
    as_names,
    as_path,
    as_paths,
    as_str,
)

EVALUATION: Mapping[str, Key] = MappingProxyType(
    {
        "tte": Key(as_bool, False, TEST, "average the logits of several views, as tte_mode says"),
        "tte_mode": Key(
            as_str,
            "fivecrop",
            TEST,
            "views of tte: corners and centre, the same and mirrored, or training crops",
            ("fivecrop", "tencrop", "randaug"),
        ),
        "expand": Key(as_int, None, TEST, "pixels that the crops' resize adds; none: 1.5 patches", least=0, most=1024),
        "randaug_times": Key(as_int, 1, TEST, "training crops of tte_mode randaug", least=1, most=1000),
        "test_prec": Key(as_str, "fp32", TEST, "arithmetic of evaluation", ("fp32", "bf16", "fp64")),
        "test_train": Key(as_bool, False, TEST, "evaluate the training images"),
        "max_test_images": Key(
            as_int, None, TEST, "evaluate so many images only, for a quick look", least=1, most=10**9
        ),
        "many_above": Key(
            as_int, 100, TEST, "many-shot: more training images than this", least=0, most=10**9, logits=False
        ),
        "few_below": Key(
            as_int, 20, TEST, "few-shot: fewer training images than this", least=0, most=10**9, logits=False
        ),
        "group_imb_factor": Key(
            as_float,
            None,
            TEST,
            "group by the counts of this imbalance (LIFT: 0.01 for every CIFAR-100)",
            least=0.0,
            logits=False,
        ),
        "test_dists": Key(
            as_names,
            None,
            TEST,
            "label distributions to evaluate on: uniform, forward50, backward50 …; all: those of the data; dirichlet",
            logits=False,
        ),
        "shift_ratios": Key(
            as_ints, [2, 5, 10, 25, 50], TEST, "imbalance ratios that `all` means", least=1, most=10**6, logits=False
        ),
        "shift_order": Key(
            as_str,
            "counts",
            TEST,
            "frequent classes first: by training count, as in the published lists, or by label",
            ("counts", "published", "label"),
            logits=False,
        ),
        "shift_max": Key(
            as_int,
            None,
            TEST,
            "images of a shift's largest class; none: smallest test class",
            least=1,
            logits=False,
            most=10**9,
        ),
        "shift_factors": Key(
            as_factors, None, TEST, "smallest / largest class where it is not 1/ratio: {forward3: 0.3333}", logits=False
        ),
        "shift_files": Key(
            as_path, None, TEST, "published list of a distribution, with {name} in it; none: drawn", logits=False
        ),
        "shift_seed": Key(
            as_int, 0, TEST, "of the draw of a distribution's images", least=0, most=2**63 - 1, logits=False
        ),
        "dirichlet_trials": Key(
            as_int, 3, TEST, "draws of each part of test_dists dirichlet", least=1, most=100, logits=False
        ),
        "dirichlet_ratio": Key(
            as_float, 100.0, TEST, "its largest / smallest class, undrawn", least=1.0, most=1e6, logits=False
        ),
        "dirichlet_concentration": Key(
            as_float, None, TEST, "Σα; none: images of its largest class", most=1e9, logits=False
        ),
        "dirichlet_least": Key(as_int, 1, TEST, "its images of a class at least", least=0, most=10**6, logits=False),
        "dirichlet_list": Key(as_path, None, TEST, "list in whose order it shuffles; none: test_list", logits=False),
        "dirichlet_learn": Key(
            as_str, "independent", TEST, "images adapt learns from", ("independent", "equal", "disjoint"), logits=False
        ),
        "adapt": Key(as_str, None, TEST, "entry of ADAPTS: expert weights from unlabelled test images", logits=False),
        "adapt_views": Key(as_str, "sade_imagenet", TEST, "entry of AUGMENTS: its views of an image", logits=False),
        "adapt_epochs": Key(as_int, 5, TEST, "its passes over the views", least=1, most=1000, logits=False),
        "adapt_lr": Key(as_float, 0.1, TEST, "its learning rate", least=0.0, logits=False),
        "adapt_weight_decay": Key(as_float, 5e-4, TEST, "its weight decay", least=0.0, logits=False),
        "adapt_entropy": Key(as_float, 0.0, TEST, "its factor on the entropy of predictions", logits=False),
        "adapt_batch_size": Key(
            as_int, 128, TEST, "images a step of it (SADE online: 64)", least=1, most=10**6, logits=False
        ),
        "adapt_seed": Key(as_int, 0, TEST, "of its views and order", least=0, most=2**63 - 1, logits=False),
        "target_prior": Key(
            as_path,
            None,
            TEST,
            "class frequencies that predictions are made for: entry of TARGETS, a distribution such as forward50, or "
            "a JSON file of such (they sum to 1) or of images a class (whole numbers)",
            logits=False,
        ),
        "calibrate": Key(as_bool, True, TEST, "target_prior: a temperature from the validation split", logits=False),
        "ensemble": Key(as_str, None, TEST, "entry of ENSEMBLES: the finished run with its start, others, zero-shot"),
        "ensemble_alpha": Key(
            as_float, 0.5, TEST, "share of the trained run in ensemble wise and logits", least=0.0, most=1.0
        ),
        "ensemble_runs": Key(as_paths, None, TEST, "other finished runs of ensemble soup, folders as model_dir"),
    }
)
