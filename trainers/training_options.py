"""Options of training and of how a command runs."""

from dataclasses import dataclass

from tailtune.configs.option import option
from tailtune.configs.value_parsers import as_factors, as_float, as_folder, as_int, as_micro, as_path, as_str


@dataclass(frozen=True)
class TrainingOptions:
    """Randomness, arithmetic, length, batches and the optimizer."""

    seed: int = option(
        0,
        "Random seed of the initial weights, of the order of the images and of their augmentation.",
        stages="all",
        least=0,
        most=2**63 - 1,
    )
    deterministic: bool = option(True, "A GPU uses kernels whose results are reproducible, where PyTorch has them.")
    prec: str = option(
        "amp",
        "Arithmetic of training: amp is fp16 with loss scaling; fp64 is for checks.",
        stages="all",
        choices=("fp32", "bf16", "amp", "fp16", "fp64"),
    )
    residual_dtype: str | None = option(
        None,
        "Number format of a ViT's residual stream in training. None means that of `prec`.",
        as_str,
        choices=("fp32",),
    )
    num_epochs: int = option(10, "Number of passes over the training split.", least=0, most=10**6)
    max_steps: int | None = option(
        None,
        "Number of optimizer steps after which training stops, for a quick look. None means that it runs to the end.",
        as_int,
        stages="all",
        least=1,
        most=10**9,
    )
    batch_size: int = option(128, "Number of images in one optimizer step, over all processes.", least=1, most=10**6)
    micro_batch_size: int | str | None = option(
        None,
        "Number of images that a process computes at once. `auto` means as many as fit into `memory_budget_gb`; None "
        "means its whole share of `batch_size`.",
        as_micro,
        cls="runtime",
        recorded="config",
        most=10**6,
    )
    memory_budget_gb: float | None = option(
        None,
        "GiB of memory that a process may use on its device, for `micro_batch_size auto`. None means 20, or what the "
        "device has if that is less.",
        as_float,
        cls="runtime",
        least=0.0,
    )
    grad_checkpoint: bool = option(
        False,
        "The activations of each block are computed again in the backward pass, and not kept: a step needs less memory "
        "and more time.",
        cls="runtime",
        recorded="config",
    )
    compile: bool = option(
        False,
        "The blocks of a ViT are compiled by torch.compile in training. The numbers agree up to rounding.",
        cls="runtime",
        recorded="config",
    )
    lr: float = option(0.01, "Learning rate at the start of the schedule.", least=0.0)
    optimizer: str = option("sgd", "Rule by which gradients change the weights.", table="OPTIMIZERS")
    weight_decay: float = option(5e-4, "Strength of weight decay. `decay_rule` says what it acts on.", least=0.0)
    decay_rule: str | None = option(
        None,
        "What weight decay acts on: all that trains, or matrices, which leaves out biases, norms and other parameters "
        "of one dimension. None means all for sgd and matrices for adamw.",
        as_str,
        choices=("all", "matrices"),
    )
    schedule: str = option("cosine", "Course of the learning rate over the epochs.", table="SCHEDULES")
    warmup_epochs: int = option(0, "Number of epochs over which the learning rate rises to `lr`.", least=0, most=10**6)
    warmup_steps: int = option(
        0,
        "Number of optimizer steps over which the learning rate rises linearly to `lr`, in place of warmup_epochs.",
        least=0,
        most=10**9,
    )
    lr_factors: dict[str, float] | None = option(
        None,
        "Factors on the learning rate of parameter groups, such as {tuner: 0.1, head: 1}. The rate in the log has "
        "none of them.",
        as_factors,
        least=0.0,
    )


@dataclass(frozen=True)
class RunOptions:
    """What a command does, where, and with which resources."""

    test_only: bool = option(
        False, "The command evaluates a finished run and trains nothing.", cls="runtime", stages="last"
    )
    model_dir: str | None = option(
        None,
        "Folder of the run whose checkpoint is evaluated, with test_only. None means the run of this command.",
        as_path,
        cls="runtime",
        stages="last",
    )
    export: str | None = option(
        None,
        "File format in which the finished run's model is written for other programs. None means that it is not.",
        as_str,
        cls="runtime",
        stages="last",
        choices=("peft", "merged", "onnx", "lift", "lift_plus", "hub"),
    )
    export_fp16: bool = option(
        False, "The ONNX file of export onnx computes in half precision.", cls="runtime", stages="last"
    )
    push_to_hub: str | None = option(
        None,
        "Repository USER/NAME on the Hugging Face Hub to which export hub uploads the model. None means no upload.",
        as_str,
        cls="runtime",
        stages="last",
    )
    report: str = option(
        "html",
        "Report beside each result: a page, the page and every figure as PNG and PDF, or none.",
        cls="runtime",
        stages="last",
        choices=("none", "html", "all"),
    )
    output_dir: str | None = option(
        None,
        "Folder of the run, below output/ or as an absolute path. None means that the options name it.",
        as_folder,
        cls="runtime",
        stages="last",
        recorded="config",
    )
    resume: bool = option(True, "An unfinished run continues. False starts it over.", cls="runtime", stages="last")
    gpu: int | None = option(
        None,
        "Number of the CUDA device that a single process uses. None means the first one.",
        as_int,
        cls="runtime",
        least=0,
        most=1023,
    )
    num_workers: int | None = option(
        None,
        "Number of processes that decode images. None means 0 for batches that are cut out of memory at once, and "
        "otherwise one for each processor, at most 16.",
        as_int,
        cls="runtime",
        recorded="config",
        least=0,
        most=256,
    )
    profile_data: bool = option(
        False, "The log says after each epoch whether training waited for images, and for what.", cls="runtime"
    )
    print_freq: int = option(
        10,
        "Number of optimizer steps between two lines of the log. An epoch of at most twice as many steps has one line.",
        cls="runtime",
        least=1,
        most=10**9,
    )
    save_every: int | None = option(
        None,
        "Number of optimizer steps between two saved states. None means one state an epoch.",
        as_int,
        cls="runtime",
        least=1,
        most=10**9,
    )
    test_batch_size: int = option(
        64, "Number of images that a process evaluates at once.", cls="runtime", least=1, most=10**5
    )
