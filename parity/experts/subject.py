"""The comparison with RIDE, SADE and BatchFormer: whole networks in fp64. Half an hour on two cores, 10 GB of files."""

from tailtune.parity.experts.cases import ask, inputs
from tailtune.parity.experts.ours import FIGURES, compare_network, compare_rates, compare_weights
from tailtune.parity.subject import Subject

PATCHES = (
    "fp64: the default dtype; torch.float, Tensor.float and torch.FloatTensor give fp64, so that no table is rounded",
    "no CUDA: Tensor.cuda and Module.cuda leave their object where it is",
    "masks: torch.uint8 gives booleans, which today's PyTorch wants",
    "torch.sort is stable: the inverse prior of SADE's classes with equal counts otherwise depends on the processor",
    "pandas, higher and h5py, which only log or are not called, are stand-ins",
    "the data loader is one of three batches of random images, with the class counts of the data set",
    "batch norms are moved off ones and zeros, their running statistics too",
    "the teacher's checkpoint is a random network, and the teacher is put into evaluation mode",
    "dropout of BatchFormer is 0",
    "the last bias of an expert assignment is shifted so that about half of the images ask a second expert",
    "general BatchFormer: files of class counts in its author's home are not read; the loss counts a third, because "
    "the code adds the means of both halves and of the whole",
)
PROCEDURE = (
    "The originals' own train.py with a config of theirs and the options of their README, up to the trainer; one epoch "
    "of three batches by their loop (8 images of 32 pixels, or 4 of 224, or 2 for networks of 50 layers and more; "
    "training-mode batch norms; SGD with the config's momentum, Nesterov, weight decay and first learning rate). Ours: "
    "the model config beside it and the same weights, epoch number and batches. logits: of every expert, evaluation "
    "mode. loss, gradients: the first batch. after_3_steps: all weights, running statistics, their changes, losses and "
    "logits. rates: learning rates of all parameter groups. value: share of images that ask another number of experts; "
    "of test_training_*.py the weights of the experts before softmax after each of up to five epochs. An error is "
    "|ours - original| / |original| in the L2 norm, the largest over the tensors; a gradient or a change below 1e-3 of "
    "the largest one's norm is measured by that."
)

EXPERTS = Subject(
    name="experts",
    about="RIDE, SADE and BatchFormer: networks, losses, three steps, learning rates, test-time weights of the experts",
    sources={
        "ride": "https://github.com/frank-xwang/RIDE-LongTailRecognition",
        "sade": "https://github.com/Vanint/SADE-AgnosticLT",
        "batchformer": "https://github.com/zhihou7/BatchFormer",
    },
    originals={
        "ride": ("ride", "."),
        "sade": ("sade", "."),
        "batchformer": ("batchformer", "long-tailed_recognition/RIDE-LongTailRecognition"),
        "balanced": ("batchformer", "long-tailed_recognition/BalancedSoftmax"),
    },
    names={"repository": 12, "model": 27, "data": 15, "name": 47},
    tolerance=1e-8,
    figures=FIGURES,
    procedure=PROCEDURE,
    patches=PATCHES,
    ask=ask,
    inputs=inputs,
    comparisons={"networks": compare_network, "rates": compare_rates, "scripts": compare_weights},
)
