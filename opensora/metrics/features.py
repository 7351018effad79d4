"""Features of videos for Fréchet distances; without real weights, a fixed random network says so in its name."""

import numpy as np

EXTRACTOR = "randconv"
CHANNELS = 32
SEED = 20240318


def randconv_features(videos: np.ndarray) -> np.ndarray:
    """Features [N, 64] float64 of uint8 videos [N, T, H, W, 3] by a random 3D convolution network of a fixed seed.

    It tells distributions apart, roughly; it is no FVD, and its numbers compare only with its own.
    """
    import torch
    from torch.nn import functional as F

    generator = torch.Generator().manual_seed(SEED)
    first = torch.randn(CHANNELS, 3, 3, 5, 5, generator=generator) / 15
    second = torch.randn(CHANNELS, CHANNELS, 3, 3, 3, generator=generator) / 29
    features = []
    with torch.no_grad():
        for video in videos:
            x = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
            x = F.relu(F.conv3d(x, first, stride=(1, 2, 2), padding=(1, 2, 2)))
            x = F.relu(F.conv3d(x, second, stride=(1, 2, 2), padding=1)).flatten(2)
            features.append(torch.cat([x.mean(2), x.std(2)], dim=1)[0])
    return torch.stack(features).double().numpy()
