"""Every option of the toolkit: one table of key → type, default, class, meaning.

The class of a key says what a changed value means:

* ``train``   another trained model: part of the run's name and of its config hash;
* ``test``    another evaluation of the same model: part of the evaluation's key;
* ``runtime`` the same numbers, got differently: part of neither.

Keys are LIFT's own wherever LIFT has them. `None` (or `null`) is accepted only where the default is none or
`optional` is set. Names of table entries (losses, heads, data sets …) are checked where they are looked up.
"""

from collections.abc import Mapping
from types import MappingProxyType

from tailtune.configs.evaluation_keys import EVALUATION
from tailtune.configs.key import RUNTIME, TRAIN, Key
from tailtune.configs.value_parsers import (
    as_bool,
    as_factors,
    as_float,
    as_folder,
    as_int,
    as_ints,
    as_mapping,
    as_micro,
    as_pair,
    as_path,
    as_scale,
    as_span,
    as_str,
    as_triple,
)

SCHEMA: Mapping[str, Key] = MappingProxyType(
    {
        # --- set by the loader -----------------------------------------------------------------------------------
        "data": Key(as_str, "", TRAIN, "name of the data config", internal=True),
        "model": Key(as_str, "", TRAIN, "name of the model config", internal=True),
        "after_hash": Key(as_str, "", TRAIN, "config hash of the stage before", internal=True),
        "data_dir": Key(as_str, "", RUNTIME, "folder of a data config given by path", internal=True),
        "run_name": Key(as_str, "", RUNTIME, "name of the run's folder", internal=True),
        "test_key": Key(as_str, "", RUNTIME, "name of the evaluation", internal=True),
        "coupled_micro": Key(
            as_micro, None, TRAIN, "micro_batch_size, where a loss or method depends on it", internal=True
        ),
        "micro_explicit": Key(as_bool, False, RUNTIME, "micro_batch_size was asked for by the user", internal=True),
        # --- data ------------------------------------------------------------------------------------------------
        "dataset": Key(as_str, "", TRAIN, "entry of DATASETS: CIFAR10, ImageList, ImageFolder …"),
        "root": Key(as_path, "./data", RUNTIME, "folder of the images (CIFAR: where torchvision keeps its archive)"),
        "lists": Key(as_path, None, RUNTIME, "folder of the list files and of categories.json; none: root"),
        "num_classes": Key(as_int, None, TRAIN, "number of classes; none: counted in the data", least=2, most=100_000),
        "class_counts": Key(as_path, None, TRAIN, "JSON with the training counts, for work without the lists"),
        "train_list": Key(as_path, None, TRAIN, "list file, one `relative/path label` a line"),
        "test_list": Key(as_path, None, TRAIN, "list file of the test images"),
        "val_list": Key(as_path, None, TRAIN, "list file of validation images"),
        "val_per_class": Key(
            as_int, 0, TRAIN, "validation images a class, held out of the training split", least=0, most=10**6
        ),
        "test_per_class": Key(
            as_int, 0, TRAIN, "test images a class, held out where no test split exists", least=0, most=10**6
        ),
        "classnames": Key(as_str, None, TRAIN, "text file, one name a line; or an entry such as `imagenet`"),
        "label_field": Key(as_str, "", TRAIN, "iNaturalist: `id` as in the lists, or a taxon: name, genus, …"),
        "imb_factor": Key(as_float, None, TRAIN, "make it long-tailed: smallest class / largest class", least=0.0),
        "on_bad_image": Key(as_str, "raise", RUNTIME, "an unreadable image: stop or leave out", ("raise", "skip")),
        "data_fingerprint": Key(
            as_str, "size", RUNTIME, "how a run knows its images again: their sizes, or all bytes", ("size", "content")
        ),
        "augment": Key(as_str, "lift", TRAIN, "entry of AUGMENTS, the training transform", data_wins=True),
        "interpolation": Key(as_str, None, TRAIN, "of every resize; none: the backbone's own", ("bilinear", "bicubic")),
        # --- model -----------------------------------------------------------------------------------------------
        "backbone": Key(as_str, "CLIP-ViT-B/16", TRAIN, "entry of BACKBONES, `open_clip:NAME` or `timm:NAME`"),
        "pretrained": Key(
            as_path, "default", TRAIN, "`default`, an open_clip tag, or a local file; none: random", optional=True
        ),
        "resolution": Key(
            as_int, None, TRAIN, "side of the input image in pixels; none: the backbone's own", least=1, most=4096
        ),
        "pixel_mean": Key(as_triple, None, TRAIN, "of the pixels (0 to 1, RGB); none: of the backbone's pre-training"),
        "pixel_std": Key(as_triple, None, TRAIN, "their deviation; none: of the backbone's pre-training"),
        "method": Key(as_str, "classify", TRAIN, "entry of METHODS"),
        "after": Key(as_str, None, TRAIN, "model config of a run that is finished first and starts this one"),
        "classifier": Key(as_str, "CosineClassifier", TRAIN, "entry of HEADS"),
        "scale": Key(as_float, 25.0, TRAIN, "factor on cosine logits, also of LDAM's margins, GCL's noise", least=0.0),
        "init_head": Key(as_str, None, TRAIN, "entry of HEAD_INITS; none: random"),
        "prompt": Key(
            as_str, "default", TRAIN, "entry of PROMPTS, or a sentence with {} in it; for text_feat and zero_shot"
        ),
        "descriptors": Key(as_path, None, TRAIN, "JSON, class name → list of strings, for prompt descriptor"),
        "zero_shot": Key(as_bool, False, TRAIN, "classify with the text features, train nothing"),
        "num_experts": Key(
            as_int, 1, TRAIN, "classifiers whose logits are averaged; more than one: experts", least=1, most=64
        ),
        "expert_split": Key(
            as_int,
            None,
            TRAIN,
            "last stages or blocks that each expert has for itself; 0: its head only; none: the backbone's own",
            least=0,
            most=100,
        ),
        "reduce_dimension": Key(as_bool, False, TRAIN, "narrower own stages of the experts (our ResNets)"),
        # --- tuners: a flag is the tuner's name in TUNERS --------------------------------------------------------
        "full_tuning": Key(as_bool, False, TRAIN, "train the blocks themselves"),
        "bias_tuning": Key(as_bool, False, TRAIN, "train the biases of the blocks"),
        "ln_tuning": Key(as_bool, False, TRAIN, "train the layer norms of the blocks"),
        "bn_tuning": Key(as_bool, False, TRAIN, "train the batch norms of a convolutional network"),
        "mask": Key(as_bool, False, TRAIN, "train a random subset of the blocks' linear weights"),
        "vpt_shallow": Key(as_bool, False, TRAIN, "prompt tokens before the first block"),
        "vpt_deep": Key(as_bool, False, TRAIN, "new prompt tokens before every block"),
        "lora": Key(as_bool, False, TRAIN, "low-rank updates of query and value"),
        "lora_mlp": Key(as_bool, False, TRAIN, "low-rank updates of the MLP"),
        "ssf_attn": Key(
            as_bool, False, TRAIN, "scale and shift of the attention's layers; CLIP ResNet: of its feature"
        ),
        "ssf_mlp": Key(as_bool, False, TRAIN, "scale and shift of the MLP's layers"),
        "ssf_ln": Key(as_bool, False, TRAIN, "scale and shift behind the layer norms"),
        "adapter": Key(as_bool, False, TRAIN, "bottleneck after the MLP"),
        "adaptformer": Key(as_bool, False, TRAIN, "bottleneck parallel to the MLP"),
        "partial": Key(
            as_span, None, TRAIN, "blocks that tuners act on: k = the last k, [start,end); none: all", most=1000
        ),
        "vpt_len": Key(as_int, None, TRAIN, "number of prompt tokens; none: 10", least=1, most=1024),
        "adapter_dim": Key(
            as_int, None, TRAIN, "bottleneck of adapters and LoRA; none: from num_classes", least=1, most=4096
        ),
        "adaptformer_scale": Key(as_scale, "learnable", TRAIN, "factor of AdaptFormer: learnable, or a fixed number"),
        "mask_ratio": Key(as_float, None, TRAIN, "share that mask trains; none: from num_classes", least=0.0, most=1.0),
        "mask_seed": Key(as_int, None, TRAIN, "of the draw of mask; none: 0", least=0, most=2**63 - 1),
        "peft": Key(as_str, None, TRAIN, "tuner of the peft library around the backbone's layers, entry of PEFTS"),
        "peft_args": Key(as_mapping, None, TRAIN, "its configuration: {r: 8, target_modules: [qkv]}"),
        # --- training --------------------------------------------------------------------------------------------
        "seed": Key(as_int, 0, TRAIN, "of initial weights, order and augmentation", least=0, most=2**63 - 1),
        "deterministic": Key(as_bool, True, TRAIN, "cuDNN may choose reproducible kernels only"),
        "prec": Key(
            as_str,
            "amp",
            TRAIN,
            "arithmetic of training; amp is fp16 with loss scaling, fp64 is for checks",
            ("fp32", "bf16", "amp", "fp16", "fp64"),
        ),
        "residual_dtype": Key(as_str, None, TRAIN, "of the residual stream; none: as prec", ("fp32",)),
        "num_epochs": Key(as_int, 10, TRAIN, "passes over the training split", least=0, most=10**6),
        "max_steps": Key(
            as_int, None, TRAIN, "stop after so many optimizer steps, for a quick look", least=1, most=10**9
        ),
        "batch_size": Key(as_int, 128, TRAIN, "images an optimizer step, over all processes", least=1, most=10**6),
        "micro_batch_size": Key(as_micro, None, RUNTIME, "images a process holds at once; auto: what fits", most=10**6),
        "lr": Key(as_float, 0.01, TRAIN, "learning rate at the start", least=0.0),
        "optimizer": Key(as_str, "sgd", TRAIN, "entry of OPTIMIZERS: the rule by which gradients change the weights"),
        "weight_decay": Key(as_float, 5e-4, TRAIN, "strength of weight decay; decay_rule says on what", least=0.0),
        "decay_rule": Key(
            as_str,
            None,
            TRAIN,
            "what weight decay acts on: all that trains, or matrices, which leaves out biases, norms and other "
            "parameters of one dimension; none: all for sgd, matrices for adamw",
            ("all", "matrices"),
        ),
        "momentum": Key(as_float, 0.9, TRAIN, "momentum of optimizer sgd", least=0.0, most=1.0),
        "nesterov": Key(as_bool, False, TRAIN, "optimizer sgd uses Nesterov's momentum"),
        "adam_betas": Key(
            as_pair, [0.9, 0.999], TRAIN, "optimizer adamw: decay of its two running means", least=0.0, most=1.0
        ),
        "adam_eps": Key(as_float, 1e-8, TRAIN, "optimizer adamw: added to its denominator", least=0.0),
        "schedule": Key(as_str, "cosine", TRAIN, "entry of SCHEDULES: the learning rate over the epochs"),
        "lr_steps": Key(
            as_ints, None, TRAIN, "multistep: epochs (the first is 0) that multiply it by lr_gamma", most=10**6
        ),
        "lr_gamma": Key(as_float, 0.1, TRAIN, "factor of schedule multistep", least=0.0),
        "warmup_epochs": Key(
            as_int, 0, TRAIN, "epochs over which the learning rate rises to its start", least=0, most=10**6
        ),
        "warmup_steps": Key(
            as_int,
            0,
            TRAIN,
            "optimizer steps over which the learning rate rises linearly, in place of warmup_epochs",
            least=0,
            most=10**9,
        ),
        "lr_factors": Key(
            as_factors,
            None,
            TRAIN,
            "factors on it of parameter groups: {tuner: 0.1, head: 1}; the rate that is shown is without",
            least=0.0,
        ),
        "sampler": Key(as_str, "shuffle", TRAIN, "entry of SAMPLERS: which training images make up an epoch"),
        "pair_sampler": Key(as_str, None, TRAIN, "entry of SAMPLERS: a second image beside each, for method h2t"),
        "loss_type": Key(as_str, "LA", TRAIN, "entry of LOSSES"),
        "tau": Key(as_float, 1.0, TRAIN, "strength of logit adjustment (LA)"),
        "smooth_head": Key(
            as_float, 0.3, TRAIN, "LAS: label smoothing of the most frequent class", least=0.0, most=1.0
        ),
        "smooth_tail": Key(as_float, 0.0, TRAIN, "LAS: label smoothing of the rarest class", least=0.0, most=1.0),
        "drw_epoch": Key(
            as_int,
            None,
            TRAIN,
            "from this epoch on (the first is 0) classes are weighted by effective number",
            least=0,
            most=10**6,
        ),
        **EVALUATION,
        # --- how it runs -----------------------------------------------------------------------------------------
        "test_only": Key(as_bool, False, RUNTIME, "evaluate the trained run"),
        "model_dir": Key(as_path, None, RUNTIME, "with test_only: folder of the run whose checkpoint is evaluated"),
        "export": Key(
            as_str, None, RUNTIME, "write the finished run's model for others", ("peft", "merged", "onnx", "lift")
        ),
        "output_dir": Key(
            as_folder, None, RUNTIME, "folder of the run below output/, or an absolute path; none: named by its options"
        ),
        "resume": Key(as_bool, True, RUNTIME, "continue an unfinished run; False starts over"),
        "gpu": Key(as_int, None, RUNTIME, "CUDA device of a single process", least=0, most=1023),
        "num_workers": Key(as_int, 8, RUNTIME, "processes that decode images", least=0, most=256),
        "print_freq": Key(as_int, 10, RUNTIME, "optimizer steps between two lines of the log", least=1, most=10**9),
        "save_every": Key(
            as_int, None, RUNTIME, "optimizer steps between two saved states; none: epochs", least=1, most=10**9
        ),
        "test_batch_size": Key(as_int, 64, RUNTIME, "images an evaluation step", least=1, most=10**5),
    }
)

ALIASES = {"test_ensemble": "tte"}
"""Names of the first generation of LIFT (PEL)."""

KNOWN_AS = {
    **dict.fromkeys(("learning_rate", "base_lr", "init_lr", "blr"), "lr"),
    **dict.fromkeys(("epochs", "max_epochs", "num_train_epochs", "n_epochs", "total_epochs"), "num_epochs"),
    **dict.fromkeys(("steps", "max_iter", "iterations", "num_steps"), "max_steps"),
    **dict.fromkeys(("bs", "batch", "train_batch_size", "bsz"), "batch_size"),
    **dict.fromkeys(("grad_accum", "gradient_accumulation_steps", "accumulation_steps"), "micro_batch_size"),
    **dict.fromkeys(("eval_batch_size", "val_batch_size"), "test_batch_size"),
    **dict.fromkeys(("wd", "decay", "l2"), "weight_decay"),
    **dict.fromkeys(("scheduler", "lr_scheduler", "lr_schedule", "sched"), "schedule"),
    **dict.fromkeys(("milestones", "lr_milestones"), "lr_steps"),
    **dict.fromkeys(("gamma", "lr_decay"), "lr_gamma"),
    **dict.fromkeys(("warmup", "num_warmup_epochs"), "warmup_epochs"),
    **dict.fromkeys(("num_warmup_steps", "warmup_iters", "warmup_iterations"), "warmup_steps"),
    **dict.fromkeys(("optim", "opt", "optimiser", "optim_name"), "optimizer"),
    **dict.fromkeys(("betas", "adam_beta", "adamw_betas"), "adam_betas"),
    **dict.fromkeys(("eps", "epsilon", "adam_epsilon", "opt_eps"), "adam_eps"),
    **dict.fromkeys(("workers", "dataloader_num_workers", "n_threads"), "num_workers"),
    **dict.fromkeys(("precision", "dtype", "mixed_precision", "fp16", "bf16"), "prec"),
    **dict.fromkeys(("gpu_id", "gpus", "device", "cuda"), "gpu"),
    **dict.fromkeys(("arch", "net", "network", "model_name"), "backbone"),
    **dict.fromkeys(("weights", "checkpoint_path", "ckpt"), "pretrained"),
    **dict.fromkeys(("img_size", "image_size", "input_size", "crop_size"), "resolution"),
    **dict.fromkeys(("mean", "image_mean"), "pixel_mean"),
    **dict.fromkeys(("std", "image_std"), "pixel_std"),
    **dict.fromkeys(("data_path", "data_root", "data_dir", "root_dir", "dataset_dir"), "root"),
    **dict.fromkeys(("classes", "n_classes", "nb_classes", "num_cls"), "num_classes"),
    **dict.fromkeys(("class_names", "names"), "classnames"),
    **dict.fromkeys(("imb_ratio", "imbalance_factor", "imbalance_ratio", "imb"), "imb_factor"),
    **dict.fromkeys(("augmentation", "aug", "transform", "data_aug"), "augment"),
    **dict.fromkeys(("loss", "criterion", "loss_fn"), "loss_type"),
    **dict.fromkeys(("head", "head_type"), "classifier"),
    **dict.fromkeys(("experts", "n_experts"), "num_experts"),
    **dict.fromkeys(("rank", "lora_rank", "lora_r", "bottleneck", "adapter_size"), "adapter_dim"),
    **dict.fromkeys(("prompt_len", "num_tokens", "n_ctx"), "vpt_len"),
    **dict.fromkeys(("finetune", "fine_tune", "ft"), "full_tuning"),
    **dict.fromkeys(("linear_prob", "init", "head_init"), "init_head"),
    **dict.fromkeys(("template", "templates"), "prompt"),
    **dict.fromkeys(("out", "output", "save_dir", "out_dir", "log_dir", "exp_name", "name"), "output_dir"),
    **dict.fromkeys(("eval", "evaluate", "eval_only", "test"), "test_only"),
    **dict.fromkeys(("load_dir", "checkpoint", "ckpt_path"), "model_dir"),
    **dict.fromkeys(("log_freq", "log_interval", "print_every"), "print_freq"),
    **dict.fromkeys(("save_freq", "save_steps", "save_period", "checkpoint_every"), "save_every"),
    **dict.fromkeys(("tta", "test_time_augmentation"), "tte"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
}
"""What other projects call an option → our name: what "did you mean" says first. Nothing reads a value by them."""

SHARED = (
    *("dataset", "num_classes", "class_counts", "train_list", "test_list", "val_list", "val_per_class"),
    *("test_per_class", "classnames", "descriptors", "label_field", "imb_factor", "seed", "prec", "max_steps"),
    "max_test_images",
)
"""Besides runtime keys, what the command line sets for every stage of a chain."""
