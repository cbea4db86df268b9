"""The comparison with Focal-SAM: steps of its optimizers and of ours, in fp64. Two minutes on two cores."""

from tailtune.parity.experts.ours import FIGURES
from tailtune.parity.focal_sam.cases import ask, inputs
from tailtune.parity.focal_sam.ours import compare_steps
from tailtune.parity.subject import Subject

PATCHES = (
    "no CUDA: Tensor.cuda leaves its object where it is; FloatTensor and the default dtype are fp64",
    "the original's module utils, which only draws and logs, is a stand-in",
)
PROCEDURE = (
    "after_3_steps: ResNet-32 with the original's initial weights takes three steps of 8 images with the published "
    "settings of CIFAR, in fp64, with the original's optimizer and with our passes and optimizer. The largest relative "
    "error of the change of any parameter. The original adds 1e-9 to the class frequencies inside the logarithm."
)

FOCAL_SAM = Subject(
    name="focal_sam",
    about="Focal-SAM: steps of Focal-SAM and SAM",
    sources={"focal_sam": "https://github.com/scongl/Focal-SAM"},
    originals={"focal_sam": ("focal_sam", ".")},
    names={"model": 20, "data": 16, "name": 30},
    tolerance=1e-5,
    figures=FIGURES,
    procedure=PROCEDURE,
    patches=PATCHES,
    ask=ask,
    inputs=inputs,
    comparisons={"steps": compare_steps},
)
