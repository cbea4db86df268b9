"""Residual networks of images, written once: CIFAR's and ImageNet's, whole or as a trunk and the branches of experts.

He et al. 2016 (arXiv:1512.03385), Xie et al. 2017 (arXiv:1611.05431); experts as in RIDE (arXiv:2010.01809, §4).
Weights have the names of torchvision and timm; what an expert has for itself stands below `branches.<expert>`.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.seeding import seeded

CIFAR_WIDTH, IMAGENET_WIDTH = 16, 64


@dataclass(frozen=True)
class Design:
    """The shape of a network.

    Args:
        blocks: of each stage.
        bottleneck: a block is 1x1, 3x3 and 1x1 instead of two 3x3 convolutions.
        groups, group_width: of a bottleneck's 3x3 convolution, the width for 64 planes.
        cifar: for images of 32 pixels: a small stem, no pooling behind it, shortcuts without weights.
    """

    blocks: tuple[int, ...]
    bottleneck: bool = False
    groups: int = 1
    group_width: int = 64
    cifar: bool = False

    def planes(self, reduced: bool = False) -> list[int]:
        """Of each stage; `reduced` takes a quarter from the last two, whether an expert owns them or not."""
        first = CIFAR_WIDTH if self.cifar else IMAGENET_WIDTH
        full = [first * 2**index for index in range(len(self.blocks))]
        return [*full[:-2], *(each * 3 // 4 for each in full[-2:])] if reduced else full

    @property
    def expansion(self) -> int:
        """Channels behind a block, as a multiple of its planes."""
        return 4 if self.bottleneck else 1


class Pad(nn.Module):
    """The shortcut without weights: every second pixel, and half of the new channels, zeros, on each side."""

    def __init__(self, new: int) -> None:
        super().__init__()
        self.each_side = new // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C + new, H / 2, W / 2]"""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.each_side, self.each_side))


class Basic(nn.Module):
    """Two 3x3 convolutions."""

    def __init__(self, design: Design, before: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(before, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = shortcut(design, before, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3 with the stride and the groups, 1x1."""

    def __init__(self, design: Design, before: int, planes: int, stride: int) -> None:
        super().__init__()
        inner, after = planes * design.group_width // 64 * design.groups, planes * design.expansion
        self.conv1, self.bn1 = conv(before, inner, 1), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = conv(inner, inner, 3, stride, design.groups), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = conv(inner, after, 1), nn.BatchNorm2d(after)
        self.downsample = shortcut(design, before, after, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class GlobalAveragePool(nn.Module):
    """The mean over the map [B, C, H, W] → [B, C], whatever its size."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class ResNet(nn.Module):
    """Normalised images [B, 3, H, W] → features [B, feature_dim], or the map that the branches go on from.

    Args:
        design: the shape.
        branches: each gives features [B, feature_dim]; 0: the network is whole.
        own: stages of a branch, the last ones.
        reduced: the last two stages are narrower.
    """

    def __init__(self, design: Design, branches: int = 0, own: int = 0, reduced: bool = False) -> None:
        super().__init__()
        planes = design.planes(reduced)
        depth, cut = len(planes), len(planes) - own if branches else len(planes)
        widths = [planes[0], *(each * design.expansion for each in planes)]  # before each stage, and behind the last

        def stages(start: int, end: int) -> "OrderedDict[str, nn.Module]":
            made = {f"layer{i + 1}": stage(design, i, widths[i], planes[i]) for i in range(start, end)}
            return OrderedDict(made | ({"pool": GlobalAveragePool()} if end == depth else {}))

        self.feature_dim, self.depth = widths[-1], depth
        self.conv1 = conv(3, planes[0], 3) if design.cifar else conv(3, planes[0], 7, stride=2)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.maxpool = nn.Identity() if design.cifar else nn.MaxPool2d(3, stride=2, padding=1)
        shared = stages(0, cut)
        for name, module in shared.items():
            self.add_module(name, module)
        self.shared = list(shared)
        self.branches = nn.ModuleList(nn.Sequential(stages(cut, depth)) for _ in range(branches))

    def forward(self, images: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for name in self.shared:
            x = self.get_submodule(name)(x)
        return x

    @property
    def stages(self) -> list[nn.Module]:
        """One by one; of a stage that every branch has for itself all of them together."""
        names = [f"layer{index + 1}" for index in range(self.depth)]
        return [
            self.get_submodule(name)
            if name in self.shared
            else nn.ModuleList(each.get_submodule(name) for each in self.branches)
            for name in names
        ]


def conv(before: int, after: int, side: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(before, after, side, stride, padding=side // 2, groups=groups, bias=False)


def shortcut(design: Design, before: int, after: int, stride: int) -> nn.Module | None:
    """What takes a block's input to the shape of its output; None: it has that shape."""
    if stride == 1 and before == after:
        return None
    if design.cifar:
        return Pad(after - before)
    return nn.Sequential(conv(before, after, 1, stride), nn.BatchNorm2d(after))


def stage(design: Design, index: int, before: int, planes: int) -> nn.Module:
    """The first block halves the map, but not that of the first stage."""
    block = Bottleneck if design.bottleneck else Basic
    after = planes * design.expansion
    rest = (block(design, after, planes, 1) for _ in range(1, design.blocks[index]))
    return nn.Sequential(block(design, before, planes, 2 if index else 1), *rest)


def make_resnet(design: Design, seed: int, branches: int = 0, own: int = 0, reduced: bool = False) -> ResNet:
    """A network with random weights, of their own in every branch, that are a function of the seed.

    CIFAR's are of variance 2 / fan_in (He et al. 2015), ImageNet's of 2 / (side² · output channels), whatever the
    groups.
    """
    with torch.device("meta"):  # the modules' own initialisers would take longer than all the rest
        net = ResNet(design, branches, own, reduced)
    net = net.to_empty(device=torch.get_default_device())
    with seeded(seed, "backbone"):
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and design.cifar:
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()  # and its statistics
    return net
