"""The comparison with CoOp, MaPLe and CLIP-LoRA: small CLIPs of random weights, in fp32 and in fp64."""

from tailtune.parity.subject import Subject
from tailtune.parity.text.cases import ask, inputs
from tailtune.parity.text.ours import FIGURES, compare_network

PATCHES = (
    "fp64: the default dtype is set, and CLIP's layer norms compute in it; MaPLe's conversions to half precision do "
    "nothing, nor does the conversion of a model to fp32",
    "gdown, pandas, tabulate and wilds, with which Dassl reads data and prints, are stand-ins",
    "CLIP-LoRA: its dropout has probability 0 but stays in the path; its function for training needs CUDA, so that its "
    "layers and its optimizer train in a loop of the driver",
)
PROCEDURE = (
    "Small CLIPs with random weights, made by each original's own class (12 blocks of width 64 in both encoders; for "
    "MaPLe, whose code has the widths 512 and 768 in it, 3 blocks), on a CPU in fp32. What trains is moved off its "
    "start by noise of 0.05 on the original's side, but for contexts from words in CoOp, and copied into ours. logits: "
    "evaluation mode, before training; CLIP-LoRA's weights are merged then. loss, gradients: the first of three "
    "batches of 8 images of 6 classes, cross-entropy. after_3_steps: what trains, loss and logits after three steps of "
    "Dassl's trainers (SGD 0.002, of MaPLe 0.0035, momentum 0.9, weight decay 5e-4) or of CLIP-LoRA's AdamW, and our "
    "three steps. An error is |ours - original| / |original| in the L2 norm; gradients, and what trains, are one "
    "vector. float64: the largest of these errors when both compute in fp64, each gradient, and each change over the "
    "three steps, for itself. A gradient with a norm below 1e-3 of the largest one's is measured by that."
)

TEXT = Subject(
    name="text",
    about="CoOp, MaPLe and CLIP-LoRA: contexts and low-rank updates, three steps",
    sources={
        "coop": "https://github.com/KaiyangZhou/CoOp",
        "maple": "https://github.com/muzairkhattak/multimodal-prompt-learning",
        "clip_lora": "https://github.com/MaxZanella/CLIP-LoRA",
        "dassl": "https://github.com/KaiyangZhou/Dassl.pytorch",
    },
    originals={"coop": ("coop", "."), "maple": ("maple", "."), "clip_lora": ("clip_lora", ".")},
    names={"repository": 10, "backbone": 15, "name": 38},
    tolerance={**dict.fromkeys(FIGURES, 1e-5), "float64": 1e-9},
    figures=FIGURES,
    procedure=PROCEDURE,
    patches=PATCHES,
    ask=ask,
    inputs=inputs,
    comparisons={"networks": compare_network},
    environment={"OMP_NUM_THREADS": "1"},
)
