"""The comparison with LIFT: small networks of random weights, in fp32 and in fp64. Two minutes on one core."""

from tailtune.parity.lift.cases import ask, inputs
from tailtune.parity.lift.ours import FIGURES, compare_metrics, compare_network, compare_schedule, compare_size
from tailtune.parity.subject import Subject

PROCEDURE = (
    "Small networks with random weights, made by the original's classes (CLIP ViT: 3 blocks of width 128; CLIP ResNet: "
    "width 8) and by timm (ViT-Ti/16, its 'IN21K' kind), on a CPU in fp32. Tuner and head are moved off their special "
    "starts by noise of 0.05 on the original's side; its state dicts are loaded into ours by the importer of its "
    "checkpoints. features, logits: evaluation mode, before training. loss, gradients: the first of three batches of "
    "12 images of 10 long-tailed classes. after_3_steps: tuner, head, running statistics, loss and logits after the "
    "original's own Trainer.train() on these batches (SGD 0.01, momentum 0.9, weight decay 5e-4) and our three steps. "
    "An error is |ours - original| / |original| in the L2 norm, the largest over the tensors; a gradient with a norm "
    "below 1e-3 of the largest one's is measured by that, because some are zero but for rounding (biases of keys). "
    "float64: the largest of these errors, and of those of the change over the three steps, when both compute in fp64. "
    "value: what the other kinds compare (init: the head's weight; zero_shot: logits)."
)

LIFT = Subject(
    name="lift",
    about="LIFT: every tuner, head, loss and head initialisation, metrics, schedule, sizes",
    sources={"lift": "https://github.com/shijxcs/LIFT"},
    originals={"lift": ("lift", ".")},
    names={"kind": 9, "backbone": 17, "name": 47},
    tolerance={**dict.fromkeys(FIGURES, 1e-4), "float64": 1e-5},
    figures=FIGURES,
    procedure=PROCEDURE,
    ask=ask,
    inputs=inputs,
    comparisons={
        "networks": compare_network,
        "metrics": compare_metrics,
        "schedule": compare_schedule,
        "size": compare_size,
    },
    environment={"OMP_NUM_THREADS": "1"},
)
