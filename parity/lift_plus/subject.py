"""The comparison with LIFT+: small networks of random weights, in fp32 and in fp64, and its crops."""

from tailtune.parity.lift_plus.cases import ask, inputs
from tailtune.parity.lift_plus.ours import FIGURES, compare_network, compare_pictures, compare_schedule, compare_size
from tailtune.parity.subject import Subject

PATCHES = (
    "fp64: the default dtype is set, and layer norms and conversions to fp32 compute in it",
    "no CUDA: LDAM has the tensor types of a CPU and boolean masks",
    "TensorBoard is a stand-in; backbones and images come from tensors",
    "the solver of linear_probing gets features in fp64",
)
PROCEDURE = (
    "As in the part of LIFT, with small networks of LIFT+'s four kinds (CLIP ViT and ResNet, timm ViT and ResNet) and "
    "SGD of 0.02. Our options are those that `-b … -m lp KEY VALUE` of LIFT+ means here, and the checkpoint that the "
    "original starts from is read by the importer. Errors as in the part `text`. text: no classifier; text features "
    "train, and the factor of their cosines is computed in fp64 for float64. value: of head initialisations the head's "
    "weight; of sizes the number of parameters that train; of pictures the share of 60 that differ in any pixel from "
    "those of the original's transform, over 5 epochs, 4 sizes and 3 random seeds."
)

LIFT_PLUS = Subject(
    name="lift_plus",
    about="LIFT+: tuners of both towers, heads, losses, head initialisation, sizes, schedule, crops",
    sources={"lift_plus": "https://github.com/shijxcs/LIFT-plus", "clip": "https://github.com/openai/CLIP"},
    originals={"lift_plus": ("lift_plus", ".")},
    names={"kind": 9, "backbone": 17, "name": 47},
    tolerance={**dict.fromkeys(FIGURES, 1e-5), "float64": 1e-6},
    figures=FIGURES,
    procedure=PROCEDURE,
    patches=PATCHES,
    ask=ask,
    inputs=inputs,
    comparisons={
        "networks": compare_network,
        "size": compare_size,
        "schedule": compare_schedule,
        "pictures": compare_pictures,
    },
    environment={"OMP_NUM_THREADS": "1"},
)
