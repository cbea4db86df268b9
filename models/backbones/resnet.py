"""Residual networks for CIFAR and ImageNet, whole or cut into a trunk and the branches of experts.

He et al. 2016 (arXiv:1512.03385), Xie et al. 2017 (arXiv:1611.05431); experts as in RIDE (arXiv:2010.01809, §4).
Weights have the names that torchvision and timm use; those of one expert stand below `branches.<expert>`. Module
attributes here are therefore part of the file format.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailtune.configs.seeding import seeded

CIFAR_WIDTH, IMAGENET_WIDTH = 16, 64
"""Planes of the first stage."""


@dataclass(frozen=True)
class ResNetDesign:
    """The shape of a network.

    Args:
        blocks: number of blocks of each stage.
        bottleneck: whether a block is 1x1, 3x3 and 1x1 instead of two 3x3 convolutions.
        groups: groups of the 3x3 convolution in a bottleneck block (ResNeXt's cardinality).
        group_width: channels of a group where a block has 64 planes.
        cifar: whether it is for images of 32 pixels: a small stem without pooling, and shortcuts without weights.
        widening: factor on the planes of every stage.
    """

    blocks: tuple[int, ...]
    bottleneck: bool = False
    groups: int = 1
    group_width: int = 64
    cifar: bool = False
    widening: int = 1

    def planes(self, reduced: bool = False) -> list[int]:
        """Planes of each stage.

        Args:
            reduced: whether the last two stages lose a quarter, whether experts have them for themselves or not.
        """
        first = self.widening * (CIFAR_WIDTH if self.cifar else IMAGENET_WIDTH)
        full = [first * 2**index for index in range(len(self.blocks))]
        return [*full[:-2], *(planes * 3 // 4 for planes in full[-2:])] if reduced else full

    @property
    def expansion(self) -> int:
        """Output channels of a block, as a multiple of its planes."""
        return 4 if self.bottleneck else 1


class PaddingShortcut(nn.Module):
    """A shortcut without weights: it takes every second pixel and adds channels of zeros, half on each side.

    Args:
        new_channels: how many channels are added.
    """

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.channels_per_side = new_channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] → [B, C + new_channels, H / 2, W / 2]."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.channels_per_side, self.channels_per_side))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut.

    Args:
        design: the shape of the network.
        in_channels: channels of the input.
        planes: channels of both convolutions.
        stride: stride of the first convolution.
    """

    def __init__(self, design: ResNetDesign, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = make_conv(in_channels, planes, 3, stride), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = make_conv(planes, planes, 3), nn.BatchNorm2d(planes)
        self.downsample = make_shortcut(design, in_channels, planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] → [B, planes, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class BottleneckBlock(nn.Module):
    """Convolutions 1x1, 3x3 (with the stride and the groups) and 1x1, and a shortcut.

    Args:
        design: the shape of the network.
        in_channels: channels of the input.
        planes: a quarter of the channels of the output.
        stride: stride of the 3x3 convolution.
    """

    def __init__(self, design: ResNetDesign, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        inner_channels, out_channels = planes * design.group_width // 64 * design.groups, planes * design.expansion
        self.conv1, self.bn1 = make_conv(in_channels, inner_channels, 1), nn.BatchNorm2d(inner_channels)
        self.conv2 = make_conv(inner_channels, inner_channels, 3, stride, design.groups)
        self.bn2 = nn.BatchNorm2d(inner_channels)
        self.conv3, self.bn3 = make_conv(inner_channels, out_channels, 1), nn.BatchNorm2d(out_channels)
        self.downsample = make_shortcut(design, in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] → [B, planes · expansion, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y, inplace=True)


class GlobalAveragePool(nn.Module):
    """The mean over a map of any size, [B, C, H, W] → [B, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class ResNet(nn.Module):
    """Normalised images [B, 3, H, W] → features [B, feature_dim], or the map from which the branches go on.

    Args:
        design: the shape.
        branches: number of branches, each of which gives features [B, feature_dim]; 0: the network is whole.
        branch_stages: how many of the last stages are in the branches.
        reduced: whether the last two stages are narrower.
    """

    def __init__(self, design: ResNetDesign, branches: int = 0, branch_stages: int = 0, reduced: bool = False) -> None:
        super().__init__()
        planes = design.planes(reduced)
        depth = len(planes)
        cut = depth - branch_stages if branches else depth  # the first stage of the branches
        # Channels before the first stage, and after each.
        channels = [planes[0], *(width * design.expansion for width in planes)]

        def stages(start: int, end: int) -> "OrderedDict[str, nn.Module]":
            layers = {f"layer{i + 1}": make_stage(design, i, channels[i], planes[i]) for i in range(start, end)}
            return OrderedDict(layers | ({"pool": GlobalAveragePool()} if end == depth else {}))

        self.feature_dim, self.depth = channels[-1], depth
        self.conv1 = make_conv(3, planes[0], 3) if design.cifar else make_conv(3, planes[0], 7, stride=2)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.maxpool = nn.Identity() if design.cifar else nn.MaxPool2d(3, stride=2, padding=1)
        shared = stages(0, cut)
        for name, module in shared.items():
            self.add_module(name, module)
        self.shared = list(shared)  # names of the trunk's stages
        self.branches = nn.ModuleList(nn.Sequential(stages(cut, depth)) for _ in range(branches))

    def forward(self, images: Tensor) -> Tensor:
        """Run the trunk; without branches that is the whole network."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(images)), inplace=True))
        for name in self.shared:
            x = self.get_submodule(name)(x)
        return x

    @property
    def stages(self) -> list[nn.Module]:
        """The stages in order; a stage that every branch has for itself is a list of these modules."""
        names = [f"layer{index + 1}" for index in range(self.depth)]
        return [
            self.get_submodule(name)
            if name in self.shared
            else nn.ModuleList(branch.get_submodule(name) for branch in self.branches)
            for name in names
        ]


def make_conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias that keeps the size of the map, up to the stride."""
    padding = kernel_size // 2
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=padding, groups=groups, bias=False)


def make_shortcut(design: ResNetDesign, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """The module that brings a block's input to the shape of its output.

    Args:
        design: the shape of the network.
        in_channels: channels of the block's input.
        out_channels: channels of its output.
        stride: the block's stride.

    Returns:
        None where the two shapes are equal.
    """
    if stride == 1 and in_channels == out_channels:
        return None
    if design.cifar:
        return PaddingShortcut(out_channels - in_channels)
    return nn.Sequential(make_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


def make_stage(design: ResNetDesign, index: int, in_channels: int, planes: int) -> nn.Module:
    """The blocks of one stage. The first block halves the map, except in the first stage.

    Args:
        design: the shape of the network.
        index: index of the stage.
        in_channels: channels of its input.
        planes: planes of its blocks.
    """
    block = BottleneckBlock if design.bottleneck else BasicBlock
    out_channels = planes * design.expansion
    rest = (block(design, out_channels, planes, 1) for _ in range(1, design.blocks[index]))
    return nn.Sequential(block(design, in_channels, planes, 2 if index else 1), *rest)


def make_resnet(
    design: ResNetDesign, seed: int, branches: int = 0, branch_stages: int = 0, reduced: bool = False
) -> ResNet:
    """A network with random weights that depend on the seed alone. Every branch draws weights of its own.

    Convolutions for CIFAR have variance 2 / fan_in (He et al. 2015), those for ImageNet
    2 / (kernel_size² · out_channels), whatever the groups are.

    Args:
        design: the shape.
        seed: seed of the weights.
        branches: number of branches; 0: the network is whole.
        branch_stages: how many of the last stages are in the branches.
        reduced: whether the last two stages are narrower.
    """
    with torch.device("meta"):  # skips PyTorch's own initialisation, which would take longer than everything else
        net = ResNet(design, branches, branch_stages, reduced)
    net = net.to_empty(device=torch.get_default_device())
    with seeded(seed, "backbone"):
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and design.cifar:
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()  # resets the running statistics too
    return net
