"""LPIPS: how far two pictures are apart in the features of AlexNet, backbone from a local file.

Knows the network of arXiv 1801.03924, version 0.1: torchvision's AlexNet up to its fifth ReLU, unit
features, the learned weights that torchmetrics ships. It downloads nothing.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkprune.single_file import fill

WEIGHTS = "alexnet-owt-7be5be79.pth"
WHERE = f"https://download.pytorch.org/models/{WEIGHTS}"
_TAPS = (1, 4, 7, 9, 11)  # the ReLUs
_MEAN, _STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Lpips(nn.Module):
    """Distances `[N]` of pictures `[N, 3, H, W]` in [-1, 1]; 0 for equal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
        shipped = files("torchmetrics") / "functional" / "image" / "lpips_models" / "alex.pth"
        learned = torch.load(str(shipped), map_location="cpu", weights_only=True)
        for i in range(len(_TAPS)):
            self.register_buffer(f"lin{i}", learned[f"lin{i}.model.1.weight"])
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path) -> Lpips:
        """With the backbone from torchvision's weight file.

        Raises:
            ValueError: not there, or other weights.
        """
        out = cls()
        fill(out.features, path, WEIGHTS, WHERE, "features.")
        return out

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """One distance a pair."""
        out = torch.zeros(len(a))
        pairs = zip(self._unit_features(a), self._unit_features(b), strict=True)
        for i, (one, other) in enumerate(pairs):
            apart = (one - other).square() * self.get_buffer(f"lin{i}")
            out = out + apart.sum(1).mean((1, 2)).cpu()
        return out

    def _unit_features(self, x: Tensor) -> list[Tensor]:
        x = (x - self.get_buffer("mean")) / self.get_buffer("std")
        found = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in _TAPS:
                found.append(F.normalize(x, dim=1, eps=1e-8))
        return found
