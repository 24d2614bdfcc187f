"""The Inception network of FID, KID and the Inception score, with weights from a local file.

Knows the graph of 2015-12-05 as TensorFlow ran it, in the names of torch-fidelity's weight file:
average pools that leave the padding out, a max pool in the last block, and the resize of TensorFlow
1. It downloads nothing and does not know what its features are for.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bkprune.single_file import fill

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
WHERE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
SIZE, WIDTH, N_CLASSES = 299, 2048, 1008

Chain = list[tuple[str, int, int | tuple[int, int], int]]  # name, channels, kernel, stride


class _Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU; "same" padding unless it is told otherwise."""

    def __init__(
        self, n_in: int, n_out: int, kernel: int | tuple[int, int], stride: int = 1, *, same: bool
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if same else 0
        self.conv = nn.Conv2d(n_in, n_out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(n_out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _largest(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halved(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


class _Mixed(nn.Module):
    """Branches side by side, each a chain of convolutions; a chain may end in a fork, a and b."""

    def __init__(self, n_in: int, branches: list[Chain], pool: str, n_pool: int = 0) -> None:
        super().__init__()
        self._pool = {"average": _average, "largest": _largest, "halved": _halved}[pool]
        self._chains: list[list[str]] = []
        for chain in branches:
            width, last = n_in, 0
            for name, n_out, kernel, stride in chain:
                if name[-1] == "b":
                    width = last  # the second tine of a fork reads what the first one read
                same = stride == 1
                self.add_module(name, _Conv(width, n_out, kernel, stride, same=same))
                last, width = width, n_out
            self._chains.append([name for name, *_ in chain])
        if n_pool:
            self.branch_pool = _Conv(n_in, n_pool, 1, same=True)

    def forward(self, x: Tensor) -> Tensor:
        out = []
        for names in self._chains:
            h = x
            is_fork = names[-1][-1] == "b"
            for name in names[:-2] if is_fork else names:
                h = self.get_submodule(name)(h)
            out += [self.get_submodule(name)(h) for name in names[-2:]] if is_fork else [h]
        pooled = self._pool(x)
        out.append(self.branch_pool(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(out, 1)


def _a(n_in: int, n_pool: int) -> _Mixed:
    chains: list[Chain] = [
        [("branch1x1", 64, 1, 1)],
        [("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)],
        [
            ("branch3x3dbl_1", 64, 1, 1),
            ("branch3x3dbl_2", 96, 3, 1),
            ("branch3x3dbl_3", 96, 3, 1),
        ],
    ]
    return _Mixed(n_in, chains, "average", n_pool)


def _b(n_in: int) -> _Mixed:
    chains: list[Chain] = [
        [("branch3x3", 384, 3, 2)],
        [
            ("branch3x3dbl_1", 64, 1, 1),
            ("branch3x3dbl_2", 96, 3, 1),
            ("branch3x3dbl_3", 96, 3, 2),
        ],
    ]
    return _Mixed(n_in, chains, "halved")


def _c(n: int) -> _Mixed:
    row, column = (1, 7), (7, 1)
    chains: list[Chain] = [
        [("branch1x1", 192, 1, 1)],
        [("branch7x7_1", n, 1, 1), ("branch7x7_2", n, row, 1), ("branch7x7_3", 192, column, 1)],
        [
            ("branch7x7dbl_1", n, 1, 1),
            ("branch7x7dbl_2", n, column, 1),
            ("branch7x7dbl_3", n, row, 1),
            ("branch7x7dbl_4", n, column, 1),
            ("branch7x7dbl_5", 192, row, 1),
        ],
    ]
    return _Mixed(768, chains, "average", 192)


def _d() -> _Mixed:
    chains: list[Chain] = [
        [("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)],
        [
            ("branch7x7x3_1", 192, 1, 1),
            ("branch7x7x3_2", 192, (1, 7), 1),
            ("branch7x7x3_3", 192, (7, 1), 1),
            ("branch7x7x3_4", 192, 3, 2),
        ],
    ]
    return _Mixed(768, chains, "halved")


def _e(n_in: int, pool: str) -> _Mixed:
    chains: list[Chain] = [
        [("branch1x1", 320, 1, 1)],
        [
            ("branch3x3_1", 384, 1, 1),
            ("branch3x3_2a", 384, (1, 3), 1),
            ("branch3x3_2b", 384, (3, 1), 1),
        ],
        [
            ("branch3x3dbl_1", 448, 1, 1),
            ("branch3x3dbl_2", 384, 3, 1),
            ("branch3x3dbl_3a", 384, (1, 3), 1),
            ("branch3x3dbl_3b", 384, (3, 1), 1),
        ],
    ]
    return _Mixed(n_in, chains, pool, 192)


class Inception(nn.Module):
    """Features `[N, 2048]` and logits `[N, 1008]` without bias, as torch-fidelity gives them."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, same=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, same=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3, same=True)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1, same=True)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, same=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _c(128),
            _c(160),
            _c(160),
            _c(192),
        )
        self.Mixed_7a = _d()
        self.Mixed_7b, self.Mixed_7c = _e(1280, "average"), _e(2048, "largest")
        self.fc = nn.Linear(WIDTH, N_CLASSES)
        self.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: Path) -> Inception:
        """From torch-fidelity's weight file.

        Raises:
            ValueError: not there, or other weights.
        """
        out = cls()
        fill(out, path, WEIGHTS, WHERE)
        return out

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures `[N, 3, H, W]` in uint8, of any size."""
        x = (resize_like_tensorflow(pictures.float(), SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halved(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halved(x))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resize_like_tensorflow(x: Tensor, size: int) -> Tensor:
    """Bilinear as in TensorFlow 1: corner pixels at coordinate 0, no antialiasing, `[N, C, H, W]`.

    This is the resize of the network's original graph (clean-fid, arXiv 2104.11222, section 3,
    shows what it costs), kept because published values rest on it.
    """
    for axis in (-2, -1):
        n = x.shape[axis]
        at = torch.arange(size, dtype=x.dtype, device=x.device) * (n / size)
        low = at.long()
        high = (low + 1).clamp(max=n - 1)
        share = (at - low).view(-1, 1) if axis == -2 else at - low
        below = x.index_select(axis, low)
        x = below + (x.index_select(axis, high) - below) * share
    return x
