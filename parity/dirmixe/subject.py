"""The comparison with DirMixE: test priors, losses, networks in fp64, drawn test sets. Ten minutes on two cores."""

from tailtune.parity.dirmixe.cases import ask, inputs
from tailtune.parity.dirmixe.ours import compare_loss, compare_phases, compare_pool, compare_sets
from tailtune.parity.experts.ours import FIGURES, compare_network, compare_rates
from tailtune.parity.subject import Subject

SCALAR_SORT = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}
"""Lets NumPy in the original's process sort without vector instructions, which order equal counts otherwise."""
PATCHES = (
    "no CUDA: Tensor.cuda and Module.cuda leave their object where it is; torch.sort is stable",
    "losses and networks in fp64, batch norms and data loader as in the part `experts`; pools and test sets in fp32",
    "the config of iNaturalist names a kind of data that the loss refuses: ImageNet in its place",
    "NumPy sorts without vector instructions, as when the published lists were made: it decides between equal counts",
    "CIFAR's images are their positions, and its classes take turns; pandas, which only logs, is a stand-in",
    "training lists are made from our class counts",
)
PROCEDURE = (
    "logits, loss, gradients, after_3_steps, rates: as in the part `experts`, with the original's draws on both sides. "
    "Loss of logits: 60 draws, 16 samples. value: of pools the largest difference of any w or k in three epochs of the "
    "whole pool; of the semi-variance the epochs, of 200, 180 and 100, in which one side counts it and the other does "
    "not; of test sets the share of the 9 trials' sets (to learn from and to evaluate) that are not the same images."
)

DIRMIXE = Subject(
    name="dirmixe",
    about="DirMixE: test priors, losses, three steps, learning rates, drawn test sets",
    sources={"dirmixe": "https://github.com/scongl/DirMixE"},
    originals={"dirmixe": ("dirmixe", ".")},
    names={"model": 20, "data": 16, "name": 30},
    tolerance=1e-8,
    figures=FIGURES,
    procedure=PROCEDURE,
    patches=PATCHES,
    ask=ask,
    inputs=inputs,
    comparisons={
        "phases": compare_phases,
        "pools": compare_pool,
        "losses": compare_loss,
        "sets": compare_sets,
        "rates": compare_rates,
        "networks": compare_network,
    },
    environment=SCALAR_SORT,
)
