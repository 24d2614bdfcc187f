"""Which mask to look at next: people's baselines, local moves, and a surrogate of the measured.

Knows greedy value per cost (SnapFusion, arXiv 2306.00980), random feasible choices, and a Gaussian
process on how much more a mask loses than its units do one by one. It does not measure anything and
does not know Optuna.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from bkprune.program import least_score
from bkprune.space import Array, Bits, Budget, Space

N_STARTS, N_RANDOM, N_CUTS = 6, 64, 100
_CHARGES = (0.5, 1.0, 2.0, 4.0)  # as multiples of what a parameter is worth at the optimum
_SPARE = 4  # times as many choices are reached as are ranked
_LENGTHS, _NOISE = (2.0, 5.0, 12.0), (1e-4, 1e-3, 1e-2)


def greedy(space: Space, scores: Array, budgets: Sequence[Budget]) -> Bits | None:
    """Remove what loses least for what it saves of the budget most broken, until all are kept."""
    bits = np.zeros(len(space), dtype=bool)
    while True:
        broken = space.violations(bits[None], budgets)[0]
        if not (broken > 1e-12).any():
            return bits
        metric = budgets[int(broken.argmax())].metric
        saved = space.saved("weight_bytes" if metric == "memory_mb" else metric)
        value = np.where(bits | (saved <= 0), np.inf, scores / np.maximum(saved, 1e-300))
        if not np.isfinite(value).any():
            return None
        bits[int(value.argmin())] = True


def roomy(space: Space, scores: Array, budgets: Sequence[Budget]) -> list[Bits]:
    """Choices that trade summed score for parameters that stay, the exact optimum of each trade.

    What is left to learn with decides how far a mask recovers: at equal cost the masks that lose
    least at once often keep the fewest parameters (reports/emoji-recoverability). A parameter that
    goes is charged `k a / p`, where the optimum of the scores alone loses `a` with `p` parameters.
    """
    best = least_score(space, scores, budgets)
    gone = space.saved("params")
    if best is None or not best.any():
        return []
    charge = float(best @ scores) / max(float(best @ gone), 1.0)
    found = [least_score(space, scores + k * charge * gone, budgets) for k in _CHARGES]
    return [bits for bits in found if bits is not None]


def random_feasible(
    space: Space, budgets: Sequence[Budget], random: np.random.Generator, n: int
) -> list[Bits]:
    """Units removed in random order until every budget is kept: no more is removed than needed."""
    found = []
    for _ in range(20 * n):
        bits = np.zeros(len(space), dtype=bool)
        for i in random.permutation(len(space)):
            if space.feasible(bits[None], budgets)[0]:
                break
            bits[i] = True
        if space.feasible(bits[None], budgets)[0]:
            found.append(bits)
        if len(found) == n:
            break
    return found


def neighbours(bits: Bits) -> Bits:
    """Every choice that differs by one unit, or by one removed and one kept."""
    n = len(bits)
    flips = np.repeat(bits[None], n, axis=0) ^ np.eye(n, dtype=bool)
    gone, kept = np.flatnonzero(bits), np.flatnonzero(~bits)
    swaps = np.repeat(bits[None], len(gone) * len(kept), axis=0)
    rows = np.arange(len(swaps))
    swaps[rows, np.repeat(gone, len(kept))] = False
    swaps[rows, np.tile(kept, len(gone))] = True
    return np.concatenate([flips, swaps])


def ranked(space: Space, scores: Array, budgets: Sequence[Budget], n: int) -> tuple[Bits, Array]:
    """Up to `n` feasible choices of least summed score, from the exact optimum outwards.

    Best first over flips and swaps: the first is proven optimal, the others are the best that were
    reached. Returns the choices `[n, units]` and their scores, in order.
    """
    start = least_score(space, scores, budgets)
    if start is None:
        return np.zeros((0, len(space)), dtype=bool), np.zeros(0)
    heap = [(float(start @ scores), start.tobytes())]
    seen = {start.tobytes(): float(start @ scores)}
    while heap and len(seen) < _SPARE * n:
        _, key = heapq.heappop(heap)
        near = neighbours(np.frombuffer(key, dtype=bool))
        near = near[space.feasible(near, budgets)]
        for bits, score in zip(near, near @ scores, strict=True):
            if (found := bits.tobytes()) not in seen:
                seen[found] = float(score)
                heapq.heappush(heap, (float(score), found))
    best = sorted(seen, key=lambda key: (seen[key], key))[:n]
    return np.array([np.frombuffer(k, dtype=bool) for k in best]), np.array([seen[k] for k in best])


class Surrogate:
    """What a mask loses, learned from those measured: a Gaussian process on a logarithm.

    With `a(x)` the summed importance of the removed units, log(loss / a) is modelled with a
    constant, a linear and a Hamming kernel; hyper-parameters by marginal likelihood on a grid. A
    mask without data is predicted to lose what its units lose one by one.
    """

    def __init__(self, scores: Array, seen: Bits, losses: Array) -> None:
        self.scores = np.maximum(scores, max(float(scores.max()), 1e-300) * 1e-9)
        self.seen = seen
        target = np.log(np.maximum(losses, 1e-300)) - np.log(self.additive(seen))
        best = -np.inf
        for length in _LENGTHS:
            for noise in _NOISE:
                kernel = self._kernel(seen, seen, length) + noise * np.eye(len(seen))
                factor = cho_factor(kernel, lower=True)
                weights = cho_solve(factor, target)
                scale = max(float(target @ weights) / len(seen), 1e-12)
                log_det = 2 * float(np.log(np.diag(factor[0])).sum())
                likelihood = -0.5 * (len(seen) * np.log(scale) + log_det)
                if likelihood > best:
                    best = likelihood
                    self._fit = (length, factor, weights, scale)

    def additive(self, many: Bits) -> Array:
        """Summed importance of what each choice removes; a floor keeps its logarithm finite."""
        total: Array = many.astype(float) @ self.scores + float(self.scores.min())
        return total

    def predict(self, many: Bits) -> tuple[Array, Array]:
        """Mean and standard deviation of the logarithm of each choice's loss."""
        length, factor, weights, scale = self._fit
        cross = self._kernel(many, self.seen, length)
        mean: Array = cross @ weights + np.log(self.additive(many))
        own = 1.0 + many.sum(axis=1) / many.shape[1] + 1.0
        spread = own - np.einsum("ij,ji->i", cross, cho_solve(factor, cross.T))
        return mean, np.sqrt(np.maximum(spread, 1e-12) * scale)

    @staticmethod
    def _kernel(a: Bits, b: Bits, length: float) -> Array:
        x, y = a.astype(float), b.astype(float)
        shared = x @ y.T
        hamming = x.sum(1)[:, None] + y.sum(1)[None] - 2 * shared
        kernel: Array = 1.0 + shared / a.shape[1] + np.exp(-hamming / length)
        return kernel


def propose(
    space: Space,
    scores: Array,
    budgets: Sequence[Budget],
    seen: Bits,
    losses: Array,
    random: np.random.Generator,
) -> tuple[Bits, str] | None:
    """The unseen feasible choice that the surrogate holds most promising, and where it came from.

    The pool: moves from the best choices so far, the integer program on scores that the surrogate
    has corrected, and random feasible ones. Taken is the least lower confidence bound.
    """
    surrogate = Surrogate(scores, seen, losses)
    order = np.argsort(losses, kind="stable")
    fits = order[space.feasible(seen[order], budgets)]
    pools = [(neighbours(seen[i]), "local move") for i in fits[:N_STARTS]]
    slopes = _slopes(surrogate, seen[fits[0]] if len(fits) else np.zeros(len(space), dtype=bool))
    known = {row.tobytes() for row in seen}
    solved = least_score(space, slopes, budgets, without=list(seen[fits[:N_CUTS]]))
    if solved is not None:
        pools.append((solved[None], "integer program"))
    drawn = random_feasible(space, budgets, random, N_RANDOM)
    if drawn:
        pools.append((np.array(drawn), "random move"))
    many = np.concatenate([pool for pool, _ in pools]) if pools else np.zeros((0, len(space)), bool)
    source = [name for pool, name in pools for _ in range(len(pool))]
    fresh = np.array([row.tobytes() not in known for row in many], dtype=bool)
    usable = np.flatnonzero(fresh)
    usable = usable[space.feasible(many[usable], budgets)]
    if not len(usable):
        return None
    mean, spread = surrogate.predict(many[usable])
    boldness = random.choice([0.0, 0.5, 1.5])
    best = int(usable[int((mean - boldness * spread).argmin())])
    return many[best], source[best]


def _slopes(surrogate: Surrogate, around: Bits) -> Array:
    """What each unit adds to the predicted loss near one choice: scores for the integer program."""
    flipped = np.repeat(around[None], len(around), axis=0) ^ np.eye(len(around), dtype=bool)
    here = float(np.exp(surrogate.predict(around[None])[0][0]))
    there = np.exp(surrogate.predict(flipped)[0])
    slopes: Array = np.where(around, here - there, there - here)
    return slopes
