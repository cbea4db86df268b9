"""The comparison with BalPoE and LGLA: strengths, RandAugment, learning rates, networks in fp64."""

from tailtune.parity.balpoe.cases import ask, inputs
from tailtune.parity.balpoe.ours import compare_loss, compare_pictures, compare_strengths
from tailtune.parity.experts.ours import FIGURES, compare_network, compare_rates
from tailtune.parity.subject import Subject

PATCHES = (
    "fp64, no CUDA, stable sorts, batch norms and data loader as in the part `experts`",
    "pandas, pytorch_lightning, torchsummary and thop, which only log or count, are stand-ins",
)
PROCEDURE = (
    "logits, loss, gradients, after_3_steps, rates: as in the part `experts`, with the original's shares and orders of "
    "mixup on both sides. Of LGLA the loss of logits: its network for CIFAR mixes its experts in the shortcuts, and "
    "its others compute all experts as one grouped network. value: of the strengths of 1 to 7 experts the largest "
    "difference; of RandAugment the share of 300 pictures that differ in any pixel, with the same random seeds."
)

BALPOE = Subject(
    name="balpoe",
    about="BalPoE and LGLA: networks, loss, three steps, learning rates, RandAugment",
    sources={
        "balpoe": "https://github.com/emasa/BalPoE-CalibratedLT",
        "lgla": "https://github.com/Tao0-0/LGLA",
    },
    originals={"balpoe": ("balpoe", "."), "lgla": ("lgla", ".")},
    names={"repository": 9, "model": 22, "data": 16, "name": 30},
    tolerance=1e-8,
    figures=FIGURES,
    procedure=PROCEDURE,
    patches=PATCHES,
    ask=ask,
    inputs=inputs,
    comparisons={
        "strengths": compare_strengths,
        "pictures": compare_pictures,
        "rates": compare_rates,
        "losses": compare_loss,
        "networks": compare_network,
    },
)
