"""Our side of the comparison with Focal-SAM: through our configs, builders and the passes of the trainer."""

import torch
from torch import Tensor

from tailtune.datasets.build_data import build_info
from tailtune.models import build_model
from tailtune.parity.errors import largest_error
from tailtune.parity.experts.ours import row
from tailtune.parity.focal_sam.cases import IMAGES, config_of
from tailtune.parity.job import Case, Job
from tailtune.parity.subject import Row
from tailtune.trainers.distributed import Devices, make_accelerator
from tailtune.trainers.flat_minima import sam_mode
from tailtune.trainers.methods import build_method
from tailtune.trainers.methods.base import Batch, Step
from tailtune.trainers.optimizers_and_schedules import Plan, build_optimizer, set_lr
from tailtune.trainers.step_passes import StepPasses


def compare_steps(case: Case, job: Job) -> list[Row]:
    """How far the parameters have moved after three steps, as the largest error of any tensor."""
    original, cfg = job.tensors(case), config_of(case)
    info = build_info(cfg)
    method = build_method(cfg, build_model(cfg, info.class_names, pixel_stats=(info.mean, info.std)), info).double()
    method.model.set_precision(torch.float64)
    parameters = list(method.parameters())
    for number, parameter in enumerate(parameters):
        parameter.data.copy_(original[f"start.{number}"])
    plan, accelerator = Plan.of(cfg, IMAGES), make_accelerator(Devices("fp64", 0, True))
    optimizer = build_optimizer(method.param_groups(), plan)
    set_lr(optimizer, plan, epoch=0)
    method.train()
    for number, (images, labels) in enumerate(
        zip(job.inputs["images"], job.inputs[f"labels.{case['data']}"], strict=True)
    ):
        method.before_step(number + 1)
        batch: Batch = {"image": images, "label": labels, "weight": torch.ones(IMAGES).double()}
        passes = StepPasses(accelerator, method, method, IMAGES, 1, iter([batch]), _weight)
        sam_mode(cfg.sam).gradients(passes, plan, 0)
        optimizer.step()
        optimizer.zero_grad()
    start = [original[f"start.{number}"] for number in range(len(parameters))]
    ours = {f"{number}": parameters[number].detach() - old for number, old in enumerate(start)}
    theirs = {f"{number}": original[f"after.{number}"] - old for number, old in enumerate(start)}
    return [row(case, after_3_steps=largest_error(ours, theirs, floor=1e-3))]


def _weight(batch: Batch, outcome: Step) -> Tensor:
    return outcome.weight.detach()
