"""The comparison with H2T: both stages, masks, losses, rates, test figures and the long tail. Two minutes.

    git -C /somewhere/H2T checkout f96309a

That commit is the last one that runs: the networks of the next one stop with a TypeError.
"""

from tailtune.parity.experts.ours import FIGURES
from tailtune.parity.h2t.cases import ask, inputs
from tailtune.parity.h2t.ours import (
    compare_figures,
    compare_loss,
    compare_masks,
    compare_rates,
    compare_stage,
    compare_tail,
)
from tailtune.parity.subject import Subject

PATCHES = (
    "fp64, no CUDA and boolean masks as in the part `experts`",
    "pathlib2, which only saves a copy of the code, is pathlib",
    "the config takes keys that it does not know: one YAML has `cos`",
    "the data set is one batch of random images for each of three epochs, with the class counts of the data",
    "the checkpoint that both stages read is a random network with shaken batch norms; none is written",
    "ResLT: the 1e-7 that is added to each probability before the logarithm is taken off again",
    "of test figures: tensors are printed with all digits",
    "CIFAR's images are their positions, and its classes take turns",
)
PROCEDURE = (
    "logits, loss, gradients, after_3_steps, rates: as in the part `experts`; of the stages by the original's "
    "`main_worker` with a YAML of its own and three epochs of one batch of 8 images each, so that the schedule's first "
    "three rates count (stage 2: a cosine over three epochs). The λ and orders of stage 1 are the original's, the "
    "masks of stage 2 come from the same seed. value: of stages the running statistics; of learning rates weight "
    "decay, momentum and batch size; of channels the share that one side alone overwrites, for shares 0 to 1; of test "
    "figures (accuracy, of 36 head, 35 medium and 29 tail classes too, 15-bin ECE, MCE and diagram) the largest "
    "error; of the long tail the share of images that differ; of samplers the class probabilities. Their "
    "`reweight_epoch` r is drw_epoch r + 1 here: they count epochs from 0 and ask for later ones."
)

H2T = Subject(
    name="h2t",
    about="H2T at commit f96309a: both stages, channels, losses, learning rates, test figures, long tails",
    sources={"h2t": "https://github.com/Keke921/H2T"},
    originals={"h2t": ("h2t", ".")},
    names={"model": 16, "data": 16, "name": 48},
    tolerance=1e-9,
    figures=FIGURES,
    procedure=PROCEDURE,
    patches=PATCHES,
    ask=ask,
    inputs=inputs,
    comparisons={
        "stages": compare_stage,
        "masks": compare_masks,
        "losses": compare_loss,
        "rates": compare_rates,
        "figures": compare_figures,
        "tails": compare_tail,
    },
)
