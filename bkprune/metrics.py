"""Quality metrics: name, direction and unit of each, its value, and its error by the bootstrap.

Knows formulas on features, logits and values that others have computed, in float64. Every metric
has its value and can be had again for any weighting of its samples, so that one set of bootstrap
weights gives errors, and errors of paired differences, for all. It does not know networks or files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Features = NDArray[Any]  # [n, D], on the disk or in memory

_BLOCK = 2048  # rows at a time
_WIDE = 256  # above this a Frechet distance takes seconds
N_RESAMPLES, N_RESAMPLES_WIDE = 200, 20
KID_SUBSETS, KID_SUBSET_SIZE, IS_SPLITS, RNG_SEED = 100, 1000, 10, 2020  # torch-fidelity's


@dataclass(frozen=True)
class Metric:
    """What a number means."""

    name: str
    better: Literal["lower", "higher", ""]
    unit: str
    words: str


METRICS = {
    m.name: m
    for m in (
        Metric("fid", "lower", "", "Frechet distance of Inception features"),
        Metric("kid", "lower", "", "kernel distance of Inception features"),
        Metric("is", "higher", "", "Inception score"),
        Metric("clip_score", "higher", "100 x cosine", "picture with its caption, by CLIP"),
        Metric("frechet_clip", "lower", "", "Frechet distance of CLIP features"),
        Metric("kernel_clip", "lower", "", "kernel distance of CLIP features"),
        Metric("lpips", "lower", "", "from the teacher's picture of the same seed"),
        Metric("psnr", "higher", "dB", "against the teacher's picture of the same seed"),
        Metric("ssim", "higher", "", "with the teacher's picture of the same seed"),
        Metric("output_error", "lower", "", "E||eps - eps_teacher||^2 on held-out data"),
        Metric("s_per_image", "lower", "s", "one picture, batch 1"),
        Metric("s_text_encoder", "lower", "s", "of it, the text encoder"),
        Metric("s_unet", "lower", "s", "of it, the U-Net's steps"),
        Metric("s_vae_decoder", "lower", "s", "of it, the decoder"),
        Metric("black", "lower", "pictures", "wholly black"),
        Metric("not_finite", "lower", "pictures", "NaN or infinite, kept as black"),
        Metric("flagged", "lower", "pictures", "blacked out by the safety checker"),
    )
}


class Estimate(Protocol):
    """A metric over n samples."""

    value: float

    def resampled(self, weights: Array) -> float:
        """The metric if sample i came `weights[i]` times, `[n]`."""


def bootstrap_weights(
    groups: NDArray[np.int64], n_resamples: int, seed: int = 0
) -> Iterator[Array]:
    """How often each sample comes, `[n]`, for one resample after the other.

    Whole groups are drawn with replacement: pictures of one prompt stay together.
    """
    names, index = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    share = np.full(len(names), 1 / len(names))
    for _ in range(n_resamples):
        yield rng.multinomial(len(names), share)[index].astype(np.float64)


class Mean:
    """Mean of one value a sample."""

    def __init__(self, values: Array) -> None:
        self._values = np.asarray(values, np.float64)
        self.value = float(self._values.mean())

    def resampled(self, weights: Array) -> float:
        """The weighted mean."""
        return float(weights @ self._values / weights.sum())


@dataclass(frozen=True)
class Moments:
    """Mean `[D]` and unbiased covariance `[D, D]` of n features, in float64."""

    mean: Array
    cov: Array
    n: int

    @classmethod
    def of(cls, features: Features, weights: Array | None = None) -> Moments:
        """Of features `[n, D]`, a block of rows at a time."""
        n, d = features.shape
        w = np.ones(n) if weights is None else weights
        total = w.sum()
        mean = sum((w[rows] @ block for rows, block in _blocks(features)), np.zeros(d)) / total
        cov = np.zeros((d, d))
        for rows, block in _blocks(features):
            centred = block - mean
            cov += (centred * w[rows, None]).T @ centred
        return cls(mean, cov / (total - 1), n)


def _blocks(features: Features) -> Iterator[tuple[slice, Array]]:
    for start in range(0, len(features), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(features)))
        yield rows, np.asarray(features[rows], np.float64)


class Frechet:
    """||mu_a - mu_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (arXiv 1706.08500, eq. 6).

    Few samples bias it upwards: below twice as many as dimensions it warns.
    """

    def __init__(self, features: Features, reference: Moments) -> None:
        d = features.shape[1]
        n = min(len(features), reference.n)
        if n < 2 * d:
            warnings.warn(
                f"a Frechet distance of {n} samples in {d} dimensions is biased upwards",
                stacklevel=2,
            )
        self._features, self._reference = features, reference
        values, vectors = torch.linalg.eigh(torch.from_numpy(reference.cov))
        self._root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        self.value = self._to(Moments.of(features))

    def resampled(self, weights: Array) -> float:
        """The distance of the weighted features; the reference stays as it is."""
        return self._to(Moments.of(self._features, weights))

    def _to(self, ours: Moments) -> float:
        # tr (C_a C_b)^(1/2) from the eigenvalues of the similar, symmetric C_b^(1/2) C_a C_b^(1/2)
        inner = self._root @ torch.from_numpy(ours.cov) @ self._root
        cross = float(torch.linalg.eigvalsh(inner).clamp(min=0).sqrt().sum())
        shift = ours.mean - self._reference.mean
        trace = float(np.trace(ours.cov) + np.trace(self._reference.cov))
        return float(shift @ shift) + trace - 2 * cross


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Between two sets of features `[n, D]`."""
    return Frechet(a.numpy(), Moments.of(b.numpy())).value


class Kernel:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3 (KID, arXiv 1801.01401), as torch-fidelity.

    The value is the mean over 100 random subsets of 1,000 (or all, where there are fewer).
    Resampling moves it along its influence function, 2 (mean_j k(x_i, x_j) - mean_j k(x_i, y_j)),
    which is exact to first order.
    """

    def __init__(self, features: Features, reference: Features) -> None:
        self.subset_size = min(KID_SUBSET_SIZE, len(features), len(reference))
        rng = np.random.RandomState(RNG_SEED)
        values = []
        for _ in range(KID_SUBSETS):
            mine = np.sort(rng.choice(len(features), self.subset_size, replace=False))
            theirs = np.sort(rng.choice(len(reference), self.subset_size, replace=False))
            values.append(_mmd2(np.asarray(features[mine]), np.asarray(reference[theirs])))
        self.value = float(np.mean(values))
        self._influence = np.concatenate(
            [
                2 * (_mean_kernel(block, features) - _mean_kernel(block, reference))
                for _, block in _blocks(features)
            ]
        )

    def resampled(self, weights: Array) -> float:
        """The value moved along the influence function."""
        share = weights / weights.sum() - 1 / len(weights)
        return self.value + float(share @ self._influence)


def _kernel(a: Array, b: Array) -> Array:
    out: Array = (a @ b.T / a.shape[1] + 1) ** 3
    return out


def _mmd2(a: Features, b: Features) -> float:
    a, b, n = a.astype(np.float64), b.astype(np.float64), len(a)
    own = [(k.sum() - np.trace(k)) / (n * (n - 1)) for k in (_kernel(a, a), _kernel(b, b))]
    return float(sum(own) - 2 * _kernel(a, b).mean())


def _mean_kernel(rows: Array, others: Features) -> Array:
    total = sum((_kernel(rows, block).sum(1) for _, block in _blocks(others)), np.zeros(len(rows)))
    return total / len(others)


class InceptionScore:
    """exp E KL(p(y|x) || p(y)) (arXiv 1606.03498), the mean over 10 splits as torch-fidelity.

    Resampling takes all samples as one split.
    """

    def __init__(self, logits: Features) -> None:
        order = np.random.RandomState(RNG_SEED).permutation(len(logits))
        shuffled = torch.from_numpy(np.asarray(logits, np.float64)[order])
        self._log_p: Array = torch.log_softmax(shuffled, 1).numpy()
        self._back = np.argsort(order)
        n = len(logits)
        cuts = [slice(i * n // IS_SPLITS, (i + 1) * n // IS_SPLITS) for i in range(IS_SPLITS)]
        scores = [_score(self._log_p[cut], np.ones(cut.stop - cut.start)) for cut in cuts]
        self.value = float(np.mean(scores))

    def resampled(self, weights: Array) -> float:
        """The score of all weighted samples at once."""
        moved = np.empty_like(weights)
        moved[self._back] = weights
        return _score(self._log_p, moved)


def _score(log_p: Array, weights: Array) -> float:
    p, w = np.exp(log_p), weights / weights.sum()
    marginal = np.log(np.maximum(w @ p, 1e-300))
    return float(np.exp(w @ (p * (log_p - marginal)).sum(1)))


# --- errors ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A metric of one model with its resamples, from which errors follow."""

    value: float
    n: int
    resamples: Array

    @classmethod
    def of(cls, estimate: Estimate, groups: NDArray[np.int64], width: int = 1) -> Measured:
        """Value and bootstrap of an estimate whose samples belong to these groups, `[n]`."""
        n_resamples = N_RESAMPLES_WIDE if width > _WIDE else N_RESAMPLES
        weights = bootstrap_weights(groups, n_resamples)
        resamples = np.array([estimate.resampled(row) for row in weights])
        return cls(estimate.value, len(groups), resamples)

    @property
    def stderr(self) -> float:
        """Bootstrap standard error."""
        return float(self.resamples.std(ddof=1))

    def minus(self, other: Measured) -> tuple[float, float]:
        """The paired difference, and its standard error from the same resamples of both."""
        both = min(len(self.resamples), len(other.resamples))
        apart = self.resamples[:both] - other.resamples[:both]
        return self.value - other.value, float(apart.std(ddof=1))
