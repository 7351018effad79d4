"""Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567) as FID takes it (Heusel et al. 2017, arXiv 1706.08500).

Layers are named as in the state dict in which TensorFlow's weights of 2015 are published for PyTorch
(`pt_inception-2015-12-05-6726825d.pth`). The network differs from the usual one where those weights were trained so:
average pooling leaves the padding out, and the last block pools by maxima.

B batch, C channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE = 299  # pixels of a side
WIDTH = 2048  # features
CLASSES = 1008


class Inception(nn.Module):
    """Images [B, 3, 299, 299] in −1…1 to the features before the classes [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Unit(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Unit(32, 64, 3)
        self.Conv2d_3b_1x1 = Unit(64, 80, 1)
        self.Conv2d_4a_3x3 = Unit(80, 192, 3, padded=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = BlockA(192, 32), BlockA(256, 64), BlockA(288, 64)
        self.Mixed_6a = BlockB(288)
        self.Mixed_6b, self.Mixed_6c = BlockC(768, 128), BlockC(768, 160)
        self.Mixed_6d, self.Mixed_6e = BlockC(768, 160), BlockC(768, 192)
        self.Mixed_7a = BlockD(768)
        self.Mixed_7b, self.Mixed_7c = BlockE(1280, average), BlockE(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(WIDTH, CLASSES)  # of the published weights; no feature passes it

    def forward(self, x: Tensor) -> Tensor:
        """Features; raises ValueError for another shape."""
        if x.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"Inception takes [B, 3, {SIZE}, {SIZE}], got {list(x.shape)}")
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, 2))))  # [B, 288, 35, 35]
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # [B, 768, 17, 17]
        x = self.Mixed_7a(self.Mixed_6e(self.Mixed_6d(x)))  # [B, 1280, 8, 8]
        return self.Mixed_7c(self.Mixed_7b(x)).mean((2, 3))


class Unit(nn.Module):
    """Convolution, batch normalisation and ReLU; with stride 1 the size stays, unless it is not padded."""

    def __init__(
        self, width: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, padded: bool = True
    ) -> None:
        super().__init__()
        high, wide = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = (high // 2, wide // 2) if stride == 1 and padded else 0
        self.conv = nn.Conv2d(width, channels, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def average(x: Tensor) -> Tensor:
    """Means of 3×3 places, of fewer at the border."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class BlockA(nn.Module):
    """35×35: 1×1, 5×5, two 3×3, pooling."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(width, 64, 1)
        self.branch5x5_1, self.branch5x5_2 = Unit(width, 48, 1), Unit(48, 64, 5)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(width, 64, 1), Unit(64, 96, 3)
        self.branch3x3dbl_3 = Unit(96, 96, 3)
        self.branch_pool = Unit(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat(
            [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(average(x))], 1
        )


class BlockB(nn.Module):
    """35×35 to 17×17."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3 = Unit(width, 384, 3, stride=2)
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(width, 64, 1), Unit(64, 96, 3)
        self.branch3x3dbl_3 = Unit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, 2)], 1)


class BlockC(nn.Module):
    """17×17: 7×7 as 1×7 and 7×1, once and twice."""

    def __init__(self, width: int, narrow: int) -> None:
        super().__init__()
        self.branch1x1 = Unit(width, 192, 1)
        self.branch7x7_1, self.branch7x7_2 = Unit(width, narrow, 1), Unit(narrow, narrow, (1, 7))
        self.branch7x7_3 = Unit(narrow, 192, (7, 1))
        self.branch7x7dbl_1, self.branch7x7dbl_2 = Unit(width, narrow, 1), Unit(narrow, narrow, (7, 1))
        self.branch7x7dbl_3, self.branch7x7dbl_4 = Unit(narrow, narrow, (1, 7)), Unit(narrow, narrow, (7, 1))
        self.branch7x7dbl_5 = Unit(narrow, 192, (1, 7))
        self.branch_pool = Unit(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        twice = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        twice = self.branch7x7dbl_5(self.branch7x7dbl_4(twice))
        return torch.cat([self.branch1x1(x), once, twice, self.branch_pool(average(x))], 1)


class BlockD(nn.Module):
    """17×17 to 8×8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch3x3_1, self.branch3x3_2 = Unit(width, 192, 1), Unit(192, 320, 3, stride=2)
        self.branch7x7x3_1, self.branch7x7x3_2 = Unit(width, 192, 1), Unit(192, 192, (1, 7))
        self.branch7x7x3_3, self.branch7x7x3_4 = Unit(192, 192, (7, 1)), Unit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        long = self.branch7x7x3_2(self.branch7x7x3_1(x))
        long = self.branch7x7x3_4(self.branch7x7x3_3(long))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), long, F.max_pool2d(x, 3, 2)], 1)


class BlockE(nn.Module):
    """8×8: 3×3 as 1×3 beside 3×1."""

    def __init__(self, width: int, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.pool = pool
        self.branch1x1 = Unit(width, 320, 1)
        self.branch3x3_1 = Unit(width, 384, 1)
        self.branch3x3_2a, self.branch3x3_2b = Unit(384, 384, (1, 3)), Unit(384, 384, (3, 1))
        self.branch3x3dbl_1, self.branch3x3dbl_2 = Unit(width, 448, 1), Unit(448, 384, 3)
        self.branch3x3dbl_3a, self.branch3x3dbl_3b = Unit(384, 384, (1, 3)), Unit(384, 384, (3, 1))
        self.branch_pool = Unit(width, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        once, twice = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        parts = [self.branch1x1(x), self.branch3x3_2a(once), self.branch3x3_2b(once)]
        parts += [self.branch3x3dbl_3a(twice), self.branch3x3dbl_3b(twice), self.branch_pool(self.pool(x))]
        return torch.cat(parts, 1)
