"""I3D (Carreira & Zisserman 2017, arXiv 1705.07750): Inception-v1 with its filters inflated into time.

B batch, T frames, C channels. Layers are named as in the state dicts that are published (`rgb_imagenet.pt`,
`i3d_pretrained_400.pt`), and padded as TensorFlow pads (`SAME`), with which those weights were trained.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 400  # Kinetics
MIN_FRAMES = 9  # of fewer, too few steps in time are left for the last pooling
# Channels of the branches: 1×1×1; 1×1×1 → 3×3×3; 1×1×1 → 3×3×3; pooling → 1×1×1.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
POOLED_BEFORE = {"Mixed_4b": ((3, 3, 3), (2, 2, 2)), "Mixed_5b": ((2, 2, 2), (2, 2, 2))}  # kernel, stride


class I3D(nn.Module):
    """Videos [B, 3, T ≥ 9, 224, 224] in −1…1 to the logits of 400 actions [B, 400], averaged over time."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = Unit(64, 64, 1)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        width = 192
        for name, channels in MIXED.items():
            self.add_module(name, Mixed(width, channels))
            width = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(width, CLASSES, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """Logits; raises ValueError for another shape."""
        if x.ndim != 5 or x.shape[1] != 3 or x.shape[2] < MIN_FRAMES or x.shape[3:] != (224, 224):
            raise ValueError(f"I3D takes [B, 3, T ≥ {MIN_FRAMES}, 224, 224], got {list(x.shape)}")
        x = self.Conv3d_1a_7x7(x)  # [B, 64, T/2, 112, 112]
        x = self.Conv3d_2b_1x1(pool(x, (1, 3, 3), (1, 2, 2)))
        x = pool(self.Conv3d_2c_3x3(x), (1, 3, 3), (1, 2, 2))  # [B, 192, T/2, 28, 28]
        for name in MIXED:
            if name in POOLED_BEFORE:
                x = pool(x, *POOLED_BEFORE[name])
            x = getattr(self, name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # [B, 1024, T/8 − 1, 1, 1]
        return self.logits["conv3d"](x).mean(dim=(2, 3, 4))


class Unit(nn.Module):
    """Convolution, batch normalisation and ReLU."""

    def __init__(self, width: int, channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(width, channels, kernel, stride, bias=False)
        self.bn = nn.BatchNorm3d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv3d(pad_same(x, self.conv3d.kernel_size, self.conv3d.stride))))


class Mixed(nn.Module):
    """Inception's four branches."""

    def __init__(self, width: int, channels: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        plain, narrow1, wide1, narrow2, wide2, pooled = channels
        self.b0 = Unit(width, plain, 1)
        self.b1a, self.b1b = Unit(width, narrow1, 1), Unit(narrow1, wide1, 3)
        self.b2a, self.b2b = Unit(width, narrow2, 1), Unit(narrow2, wide2, 3)
        self.b3b = Unit(width, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        last = self.b3b(pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), last], dim=1)


def pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    """Maxima; the padding's zeros lose against what ReLU leaves."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around [B, C, T, H, W] so that a step of `stride` leaves ⌈size / stride⌉, the odd one behind."""
    pad: list[int] = []
    for size, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        total = max(k - (size % s or s), 0)
        pad = [total // 2, total - total // 2, *pad]  # the last dimension comes first
    return F.pad(x, pad)
