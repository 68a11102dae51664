"""The same networks in PyTorch, layer by layer as in hpctrain.models: NCHW images to logits."""

import torch
from torch import nn
from torch.nn import functional


def build(model: str, classes: int) -> nn.Module:
    """Return `resnet50` (224 pixels), `alexnet_bn` (227) or `resnet20` (32)."""
    return {"resnet50": ResNet50, "alexnet_bn": AlexNetBN, "resnet20": ResNet20}[model](classes)


def _convolution(before: int, after: int, size: int, stride: int = 1, **options: int) -> nn.Conv2d:
    return nn.Conv2d(before, after, size, stride, **({"padding": size // 2} | options), bias=False)


class AlexNetBN(nn.Sequential):
    """AlexNet with two groups in conv2, conv4 and conv5, batch norm after each convolution, and dropout."""

    def __init__(self, classes: int) -> None:
        def convolution(before: int, after: int, size: int, stride: int = 1, **options: int) -> list[nn.Module]:
            norm = nn.BatchNorm2d(after, eps=1e-4)
            return [_convolution(before, after, size, stride, **options), norm, nn.ReLU(inplace=True)]

        def dense(before: int, after: int) -> list[nn.Module]:
            return [nn.Linear(before, after), nn.ReLU(inplace=True), nn.Dropout(0.5)]

        super().__init__(
            *convolution(3, 96, 11, 4, padding=0),
            nn.MaxPool2d(3, 2),
            *convolution(96, 256, 5, groups=2),
            nn.MaxPool2d(3, 2),
            *convolution(256, 384, 3),
            *convolution(384, 384, 3, groups=2),
            *convolution(384, 256, 3, groups=2),
            nn.MaxPool2d(3, 2),
            nn.Flatten(),
            *dense(256 * 6 * 6, 4096),
            *dense(4096, 4096),
            nn.Linear(4096, classes),
        )


class _Bottleneck(nn.Module):
    """1x1 (with the stride, as in the paper), 3x3, 1x1."""

    def __init__(self, before: int, filters: int, stride: int) -> None:
        super().__init__()
        after = 4 * filters
        self.conv1, self.bn1 = _convolution(before, filters, 1, stride), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = _convolution(filters, filters, 3), nn.BatchNorm2d(filters)
        self.conv3, self.bn3 = _convolution(filters, after, 1), nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = nn.Sequential(_convolution(before, after, 1, stride), nn.BatchNorm2d(after))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = functional.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return functional.relu(y, inplace=True)


class ResNet50(nn.Sequential):
    """ResNet-50, version 1."""

    def __init__(self, classes: int) -> None:
        blocks, before = [], 64
        for stage, count in enumerate((3, 4, 6, 3)):
            for block in range(count):
                blocks.append(_Bottleneck(before, 64 * 2**stage, 2 if stage and not block else 1))
                before = 256 * 2**stage
        super().__init__(
            _convolution(3, 64, 7, 2),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2048, classes),
        )


class _Basic(nn.Module):
    """Two 3x3; the shortcut takes every second pixel and fills new channels with zeros."""

    def __init__(self, before: int, filters: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = _convolution(before, filters, 3, stride), nn.BatchNorm2d(filters)
        self.conv2, self.bn2 = _convolution(filters, filters, 3), nn.BatchNorm2d(filters)
        self.stride, self.added = stride, filters - before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        if self.stride > 1:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.added))
        y += x
        return functional.relu(y, inplace=True)


class ResNet20(nn.Sequential):
    """ResNet-20 for small images."""

    def __init__(self, classes: int) -> None:
        blocks, before = [], 16
        for stage, filters in enumerate((16, 32, 64)):
            for block in range(3):
                blocks.append(_Basic(before, filters, 2 if stage and not block else 1))
                before = filters
        super().__init__(
            _convolution(3, 16, 3),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            *blocks,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes),
        )
